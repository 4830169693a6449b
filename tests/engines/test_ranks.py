"""Tensor parallelism: each rank has a space of its own, and a hit is what all of them have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from penstock.pool.layout import plan_geometry
from tests.engines.blocks import ALONE, Place, PoolView, hit_of
from tests.engines.client import complete, complete_all
from tests.engines.fleet import Fleet
from tests.engines.models import prompt_tokens, tiny_llama
from tests.engines.server import ServerConfig, VllmServer, penstock_transfer
from tests.support import MIB, Keeper, until

BLOCK = 32
LAYERS = 3
SAVE_NOTHING = {"penstock": {"skip_save": True}}


@dataclass
class Rig:
    keeper: Keeper
    view: PoolView
    two: VllmServer
    """Two ranks. Without a prefix cache of its own, so that what it finds comes from the pool."""
    one: VllmServer
    """One rank."""

    def ranks(self) -> list[Place]:
        """The spaces of the two ranks, which hold half as much of a block."""
        places = self.view.places()
        least = min(place.space.block_bytes for place in places)
        return [place for place in places if place.space.block_bytes == least]

    def wait_stored(self, prompt: list[int]) -> None:
        """Until both ranks' blocks are there. A save that found no room in time, as on a machine whose cores both poll,
        is dropped, which is allowed; the next request for the prompt stores what is missing."""
        n_blocks = len(prompt) // BLOCK
        for _ in range(4):
            with contextlib.suppress(AssertionError):
                until(
                    lambda: all(self.view.n_resident(place, prompt) == n_blocks for place in self.ranks()), timeout_s=20
                )
                return
            complete(self.two, prompt)
        raise AssertionError(f"{n_blocks} blocks are not stored, however often they are asked for")


@pytest.fixture(scope="module")
def rig(fleet: Fleet, models: Path, runtime_dir: Path) -> Iterator[Rig]:
    with Keeper(plan_geometry(128 * MIB)) as keeper:
        transfer = penstock_transfer(keeper.name)
        one = ServerConfig(tiny_llama(models / "tiny-float32"), kv_transfer=transfer, prefix_caching=False)
        two = ServerConfig(
            one.model,
            kv_transfer=transfer,
            prefix_caching=False,
            arguments=("--tensor-parallel-size", "2"),
            variables=(("VLLM_CPU_OMP_THREADS_BIND", "0|1"),),
        )
        try:
            servers = fleet.get(two, one)
            with PoolView(keeper, LAYERS) as view:
                yield Rig(keeper, view, *servers)
        finally:
            fleet.end_where(lambda config: config in (one, two))


def test_both_ranks_store_and_hit(rig: Rig) -> None:
    prompts = [prompt_tokens(n, 1, n) for n in (31, 64, 1000, 3000)]
    expected = [complete(rig.two, prompt, kv_transfer_params=ALONE) for prompt in prompts]
    stored = [complete(rig.two, prompt) for prompt in prompts]
    assert len(rig.ranks()) == 2
    for prompt in prompts:
        rig.wait_stored(prompt)
    hits = complete_all(rig.two, prompts)
    for prompt, wanted, first, again in zip(prompts, expected, stored, hits):
        assert first.tokens == again.tokens == wanted.tokens
        assert (wanted.cached_tokens, first.cached_tokens) == (0, 0)
        assert again.cached_tokens == hit_of(prompt)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_block_that_one_rank_lacks_is_a_miss_of_all(rig: Rig, rank: int) -> None:
    prompt = prompt_tokens(20 * BLOCK + 7, 2, rank)
    expected = complete(rig.two, prompt)
    rig.wait_stored(prompt)
    place, other = rig.ranks()[rank], rig.ranks()[1 - rank]
    rig.view.damage(prompt, 5, place=place)
    with rig.view.match(place, prompt) as lease:
        assert lease.verify() == 5
    until(lambda: rig.view.n_resident(place, prompt) == 5, "the damaged block and what continues it are gone")
    assert rig.view.n_resident(other, prompt) == 20
    answer = complete(rig.two, prompt, kv_transfer_params=SAVE_NOTHING)
    assert (answer.cached_tokens, answer.tokens) == (5 * BLOCK, expected.tokens)
    rig.two.wait_log(rf"prompt_tokens={len(prompt)} .*hit_tokens={5 * BLOCK} miss=absent")
    # The next that may save fills what is missing.
    assert complete(rig.two, prompt).cached_tokens == 5 * BLOCK
    rig.wait_stored(prompt)
    answer = complete(rig.two, prompt)
    assert (answer.cached_tokens, answer.tokens) == (20 * BLOCK, expected.tokens)


@pytest.mark.parametrize("rank", [0, 1])
def test_damage_in_one_rank_is_computed_again_by_all(rig: Rig, rank: int) -> None:
    base = prompt_tokens(20 * BLOCK, 3, rank)
    longer = [*base, *prompt_tokens(6 * BLOCK, 4)]
    expected = [complete(rig.two, prompt, 40, kv_transfer_params=ALONE) for prompt in (longer, base)]
    complete(rig.two, base, 2)
    rig.wait_stored(base)
    damaged = rig.keeper.counters()["damaged"]
    rig.view.damage(base, 9, place=rig.ranks()[rank])
    answers = complete_all(rig.two, [longer, base], 40)
    assert [answer.tokens for answer in answers] == [wanted.tokens for wanted in expected]
    until(lambda: rig.keeper.counters()["damaged"] > damaged, "the damaged block is dropped")
    for _ in range(2):
        assert [complete(rig.two, prompt, 40).tokens for prompt in (longer, base)] == [e.tokens for e in expected]
    rig.wait_stored(longer)
    assert complete(rig.two, longer, 40).cached_tokens == hit_of(longer)
    rig.view.wait_quiet()
    rig.keeper.fsck()


def test_other_numbers_of_ranks_do_not_share(rig: Rig) -> None:
    prompt = prompt_tokens(700, 5)
    complete(rig.two, prompt)
    rig.wait_stored(prompt)
    expected = complete(rig.one, prompt, kv_transfer_params=ALONE)
    answer = complete(rig.one, prompt)
    assert (answer.cached_tokens, answer.tokens) == (0, expected.tokens)
    rig.one.wait_log(r"prompt_tokens=700 .*hit_tokens=0 miss=absent")
    [whole] = [place for place in rig.view.places() if place not in rig.ranks() and place.space.digest() not in {
        rank.space.digest() for rank in rig.ranks()}]  # fmt: skip
    rig.view.wait_stored(prompt, place=whole)
    hit = complete(rig.one, prompt)
    assert (hit.cached_tokens, hit.tokens) == (hit_of(prompt), expected.tokens)
    assert complete(rig.two, prompt).cached_tokens == hit_of(prompt)
