"""N-gram speculation: what is stored while answers are generated are accepted tokens' blocks, usable by everybody."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engines.blocks import ALONE, forget, hit_of
from tests.engines.client import complete, complete_all, metrics
from tests.engines.fleet import Fleet
from tests.engines.models import shipped_float32
from tests.engines.server import ServerConfig, VllmServer, penstock_transfer
from tests.support import Keeper, until

BLOCK = 32
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
STORY = "Once upon a time there was a little dog. The little dog ran to the little house. "
N_NEW = 150


@pytest.fixture(scope="module")
def pair(fleet: Fleet, models: Path, shared_keeper: Keeper) -> list[VllmServer]:
    """A server that speculates, and one that does not."""
    plain = ServerConfig(
        shipped_float32(models / "shipped-float32"),
        max_model_len=4096,
        kv_transfer=penstock_transfer(shared_keeper.name),
        variables=(("VLLM_SERVER_DEV_MODE", "1"),),
    )
    return fleet.get(replace(plain, arguments=("--speculative-config", json.dumps(NGRAM))), plain)


def test_blocks_of_accepted_drafts_are_right(pair: list[VllmServer]) -> None:
    speculating, plain = pair
    prompts = [STORY * n + f"Chapter {n}." for n in (3, 4, 5, 6)]
    expected = [complete(plain, prompt, N_NEW, kv_transfer_params=ALONE) for prompt in prompts]
    answers = complete_all(speculating, prompts, N_NEW)
    assert [answer.tokens for answer in answers] == [wanted.tokens for wanted in expected]
    counted = metrics(speculating)
    drafted = counted.total("vllm:spec_decode_num_draft_tokens_total")
    accepted = counted.total("vllm:spec_decode_num_accepted_tokens_total")
    assert 0 < accepted < drafted, "some drafts are accepted and some are not"

    # The next turn, on the other server: all blocks are there, those of the answer too.
    forget(plain)
    for answer in answers:
        turn = [*answer.raw["choices"][0]["prompt_token_ids"], *answer.tokens]
        computed = answer.prompt_tokens + N_NEW - 1  # nothing was computed of the last token
        wanted = complete(plain, turn, 24, kv_transfer_params=ALONE)
        own = complete(speculating, turn, 24, logprobs=1, kv_transfer_params=ALONE)
        n_hit = computed // BLOCK * BLOCK

        def found(turn: list[int] = turn) -> int:
            forget(plain)
            return complete(plain, turn, 1, kv_transfer_params={"penstock": {"skip_save": True}}).cached_tokens

        try:
            until(lambda n_hit=n_hit, found=found: found() == n_hit, f"{n_hit} tokens are found", timeout_s=20)
        except AssertionError:  # a save found no room in time, which is allowed: the next turn stores what is missing
            complete(speculating, turn, 1)
            until(lambda n_hit=n_hit, found=found: found() == n_hit, f"{n_hit} tokens are found")
        forget(plain)
        again = complete(plain, turn, 24, logprobs=1)
        assert again.cached_tokens == n_hit > hit_of(turn[: answer.prompt_tokens])
        assert again.tokens == wanted.tokens
        # To the bit what the server that speculated goes on with itself. A computation without speculation may differ
        # more: that is the engine's, pool or not.
        assert own.cached_tokens == n_hit
        assert again.logprobs == pytest.approx(own.logprobs, abs=1e-5)
        forget(plain)


def test_a_server_that_speculates_uses_the_others_blocks(pair: list[VllmServer]) -> None:
    speculating, plain = pair
    prompt = "The old house stood near the river. " * 30
    forget(speculating)
    expected = complete(plain, prompt, N_NEW)
    n_hit = hit_of(expected.raw["choices"][0]["prompt_token_ids"])

    def found() -> int:
        forget(speculating)
        return complete(speculating, prompt, 1).cached_tokens

    until(lambda: found() == n_hit, "the prompt is found")
    forget(speculating)
    answer = complete(speculating, prompt, N_NEW)
    assert (answer.cached_tokens, answer.tokens) == (n_hit, expected.tokens)
