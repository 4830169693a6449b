"""Two real servers on one pool: each gets the prefixes that the other computed, all of them, and answers the same.

The reference for every answer is a third server without a connector. `pairs.py` says what the two are like.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engines.client import Completion, complete, complete_all, metrics
from tests.engines.fleet import Fleet
from tests.engines.models import prompt_tokens
from tests.engines.pairs import BLOCK, Trio, computed, hit_of, stores, until_idle
from tests.engines.server import VllmServer
from tests.support import Keeper

N_ANSWER = 16


@dataclass(frozen=True)
class Servers:
    keeper: Keeper
    plain: VllmServer
    one: VllmServer
    other: VllmServer

    def store(self, server: VllmServer, prompt: list[int], n_new: int, n_answer: int = N_ANSWER) -> Completion:
        """A completion that stores exactly `n_new` blocks; right, and in the pool when this returns."""
        with stores(self.keeper, n_new):
            done = complete(server, prompt, n_answer)
        assert done.tokens == complete(self.plain, prompt, n_answer).tokens
        return done

    def find(self, server: VllmServer, prompt: list[int], n_answer: int = N_ANSWER) -> int:
        """The prompt tokens that a server did not compute; its answer is right and nothing new is stored."""
        with stores(self.keeper, 0):
            done = complete(server, prompt, n_answer)
        assert done.tokens == complete(self.plain, prompt, n_answer).tokens
        return done.cached_tokens


@pytest.fixture
def servers(fleet: Fleet, shared_keeper: Keeper, models: Path) -> Servers:
    trio = Trio.on(shared_keeper, models)
    return Servers(shared_keeper, *fleet.get(trio.plain, trio.one, trio.other))


@pytest.mark.parametrize("n_prompt", [100, 777, 1024, 3000, 8000])
@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
def test_the_second_server_gets_the_firsts_prefix(servers: Servers, n_prompt: int, back: bool) -> None:
    first, second = (servers.one, servers.other) if back else (servers.other, servers.one)
    prompt = prompt_tokens(n_prompt, 10, n_prompt, back)
    n_blocks = computed(n_prompt, N_ANSWER) // BLOCK
    assert servers.store(first, prompt, n_blocks).cached_tokens == 0
    expected = hit_of(n_prompt, n_prompt)
    loaded = metrics(second).total("vllm:external_prefix_cache_hits_total")
    assert servers.find(second, prompt) == expected
    assert metrics(second).total("vllm:external_prefix_cache_hits_total") == loaded + expected
    # Again: one has it in a prefix cache of its own now and needs the pool for a last block at most.
    loaded = metrics(servers.one).total("vllm:external_prefix_cache_hits_total")
    assert servers.find(servers.one, prompt) == expected
    own = (n_prompt - 1) // BLOCK * BLOCK
    assert metrics(servers.one).total("vllm:external_prefix_cache_hits_total") == loaded + expected - own
    # The other has none, so that the pool serves what the server stored itself.
    assert servers.find(servers.other, prompt) == expected
    until_idle(servers.keeper)


def test_only_what_was_stored_is_a_hit(servers: Servers) -> None:
    """Without a connector there is none, and none for a prompt that differs in its first token."""
    prompt = prompt_tokens(500, 11)
    with stores(servers.keeper, computed(500, N_ANSWER) // BLOCK):
        complete(servers.other, prompt, N_ANSWER)
    assert complete(servers.plain, prompt, N_ANSWER).cached_tokens == 0
    changed = [prompt[0] + 1, *prompt[1:]]
    assert servers.store(servers.one, changed, computed(500, N_ANSWER) // BLOCK).cached_tokens == 0
    assert servers.find(servers.one, prompt) == hit_of(500, 500)


def test_turns_of_a_conversation_on_either_server(servers: Servers) -> None:
    """Full blocks that were written while decoding are hits in the next turn."""
    text, n_stored = prompt_tokens(150, 12), 0
    for turn, server in enumerate([servers.one, servers.other, servers.one, servers.other, servers.other]):
        n_answer = 70 + 11 * turn
        n_now = computed(len(text), n_answer)
        done = servers.store(server, text, n_now // BLOCK - n_stored // BLOCK, n_answer)
        assert done.cached_tokens == hit_of(n_stored, len(text)), f"turn {turn}"
        n_stored = n_now
        text = [*text, *done.tokens, *prompt_tokens(45, 12, turn)]


@pytest.mark.parametrize("n_common", [31, 32, 500, 999])
def test_a_prefix_that_matches_in_part(servers: Servers, n_common: int) -> None:
    stored = prompt_tokens(1000, 13, n_common)
    servers.store(servers.other, stored, computed(1000, N_ANSWER) // BLOCK)
    asked = [*stored[:n_common], *prompt_tokens(300, 14, n_common)]
    n_new = computed(len(asked), N_ANSWER) // BLOCK - n_common // BLOCK
    assert servers.store(servers.one, asked, n_new).cached_tokens == hit_of(n_common, len(asked))


def test_each_page_gets_its_own_block(servers: Servers) -> None:
    """To whoever attends to all of a prefix the order of its pages does not matter, keys being rotated already; so
    others come who share only a part of it, and find that in the pages which were loaded."""
    stored = prompt_tokens(1000, 18)
    servers.store(servers.other, stored, computed(1000, N_ANSWER) // BLOCK)
    servers.find(servers.one, stored)
    loaded = metrics(servers.one).total("vllm:external_prefix_cache_hits_total")
    for n_common in (32, 320, 640, 960):
        asked = [*stored[:n_common], *prompt_tokens(40, 18, n_common)]
        n_new = computed(len(asked), N_ANSWER) // BLOCK - n_common // BLOCK
        assert servers.store(servers.one, asked, n_new).cached_tokens == n_common
    assert metrics(servers.one).total("vllm:external_prefix_cache_hits_total") == loaded


def test_a_prompt_that_ends_with_a_block(servers: Servers) -> None:
    """All of it is stored; its last token is computed, in the page that was loaded."""
    for n_blocks in (1, 2, 40):
        prompt = prompt_tokens(n_blocks * BLOCK, 15, n_blocks)
        servers.store(servers.other, prompt, n_blocks)
        for server in (servers.other, servers.one, servers.one):
            assert servers.find(server, prompt) == n_blocks * BLOCK - 1


def test_many_at_once_find_what_was_stored_by_another(servers: Servers) -> None:
    document = prompt_tokens(2000, 16)
    prompts = [[*document, *prompt_tokens(50 + i, 16, i)] for i in range(16)]
    servers.store(servers.other, document, computed(2000, N_ANSWER) // BLOCK)
    wanted = [done.tokens for done in complete_all(servers.plain, prompts)]
    found = complete_all([servers.one, servers.other], prompts)
    assert [done.tokens for done in found] == wanted
    assert all(done.cached_tokens >= hit_of(2000, 2050) for done in found)
    until_idle(servers.keeper)


def test_a_prompt_shorter_than_a_block_is_left_alone(servers: Servers) -> None:
    prompt = prompt_tokens(BLOCK - 1, 17)
    with stores(servers.keeper, 0):
        assert complete(servers.one, prompt, 1).cached_tokens == 0
    assert servers.find(servers.other, prompt, 1) == 0
