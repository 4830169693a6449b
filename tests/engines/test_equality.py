"""The same tokens with the pool as without, by the rule of `penstock.connectors.equality`.

In float32 the tokens are the reference's. In bfloat16 a token may differ where the reference's own log-probability of
it is less than BF16_BOUND below that of its best; later tokens are judged by what the reference says after the
candidate's own tokens (`ServedModel` asks it for the log-probabilities of a given text).

Blocks do not depend on how an engine schedules, so that the servers of a pair differ: whichever has no prefix cache of
its own is the reference too, with requests that leave the pool alone. Over the pairs here and the one of
`test_sharing.py` (blocks of 32) each block size meets both settings of each switch, and each setting of one switch
both of the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from penstock.connectors.equality import BF16_BOUND, Equality
from tests.engines.client import Completion, complete, complete_all
from tests.engines.fleet import Fleet
from tests.engines.models import SHIPPED, prompt_tokens, tiny_llama
from tests.engines.pairs import LEFT_ALONE, compare, computed, hit_of, stores, until_idle
from tests.engines.server import ServerConfig, VllmServer, penstock_transfer
from tests.support import Keeper

N_ANSWER = 32
LENGTHS = [100, 1000, 2500, 8000]


@dataclass(frozen=True)
class Pair:
    keeper: Keeper
    block: int
    dtype: torch.dtype
    caching: VllmServer
    computing: VllmServer
    """Has no prefix cache of its own: what it answers without the pool is the reference."""

    def reference(self, prompt: list[int]) -> Completion:
        done = complete(self.computing, prompt, N_ANSWER, kv_transfer_params=LEFT_ALONE)
        assert done.cached_tokens == 0
        return done

    def judge(self, prompt: list[int], *found: Completion) -> Equality:
        """All of them against one reference."""
        wanted = self.reference(prompt)
        return sum((compare(self.computing, self.dtype, prompt, wanted, one) for one in found), Equality())


PAIRS = {
    # block size: dtype, chunked prefill of the caching and of the computing server
    64: ("bfloat16", (False, True)),
    128: ("float32", (True, False)),
}


@pytest.fixture(params=PAIRS, ids=lambda block: f"block{block}", scope="module")
def pair(request: pytest.FixtureRequest, fleet: Fleet, shared_keeper: Keeper, models: Path) -> Pair:
    block = request.param
    name, chunked = PAIRS[block]
    model = SHIPPED if name == "bfloat16" else tiny_llama(models / "tiny-float32")
    # Named, for "auto" would make 16 bits of a checkpoint of 32.
    common = ServerConfig(model, name, block_size=block, kv_transfer=penstock_transfer(shared_keeper.name))
    configs = [
        replace(common, chunked_prefill=chunks, prefix_caching=caching)
        for chunks, caching in zip(chunked, (True, False), strict=True)
    ]
    one, other = fleet.get(*configs)
    for server in (one, other):
        assert f"dtype=torch.{name}," in server.read_log()
    return Pair(shared_keeper, block, getattr(torch, name), one, other)


@pytest.mark.parametrize("from_caching", [False, True], ids=["from_computing", "from_caching"])
def test_answers_after_a_hit_are_equal(pair: Pair, from_caching: bool) -> None:
    writer, reader = (pair.caching, pair.computing) if from_caching else (pair.computing, pair.caching)
    total = Equality()
    for n_prompt in LENGTHS:
        prompt = prompt_tokens(n_prompt, 20, n_prompt, from_caching)
        with stores(pair.keeper, computed(n_prompt, N_ANSWER) // pair.block):
            first = complete(writer, prompt, N_ANSWER)
        second = complete(reader, prompt, N_ANSWER)
        assert (first.cached_tokens, second.cached_tokens) == (0, hit_of(n_prompt, n_prompt, pair.block))
        total += pair.judge(prompt, first, second)
    print(total)
    assert total.ok, total
    assert total.equal + total.near_ties == 2 * N_ANSWER * len(LENGTHS)
    if pair.dtype == torch.float32:
        assert total.near_ties == 0


def test_answers_to_many_at_once_are_equal(pair: Pair) -> None:
    """Steps that mix hits, chunks and decoding."""
    document = prompt_tokens(1500, 21, pair.block)
    prompts = [[*document[: 100 * (i + 1)], *prompt_tokens(60 * i, 21, i)] for i in range(12)]
    complete(pair.computing, document, 1)
    total = Equality()
    found = complete_all([pair.caching, pair.computing], prompts, N_ANSWER)
    for prompt, done in zip(prompts, found, strict=True):
        total += pair.judge(prompt, done)
    print(total)
    assert total.ok, total
    until_idle(pair.keeper)


def test_another_answer_is_a_violation(pair: Pair) -> None:
    """The rule as applied here sees a wrong token, wherever it is, and the lack of one."""
    prompt = prompt_tokens(300, 22)
    wanted = pair.reference(prompt)
    assert pair.judge(prompt, wanted) == Equality(equal=N_ANSWER)
    for at in (0, 10, N_ANSWER - 1):
        tokens = [*wanted.tokens]
        tokens[at] = (tokens[at] + 1000) % 4000
        assert not pair.judge(prompt, replace(wanted, tokens=tuple(tokens))).ok
    assert not pair.judge(prompt, replace(wanted, tokens=wanted.tokens[:-1])).ok
    other = complete(pair.computing, prompt_tokens(300, 23), N_ANSWER, kv_transfer_params=LEFT_ALONE)
    assert pair.judge(prompt, other).widest > BF16_BOUND
