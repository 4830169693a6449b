"""Requests whose blocks lie on disk, on vLLM's own scheduler: who waits, who goes on, and that nothing stays behind."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.connectors import below
from tests.engines.sim.engine import Engine
from tests.engines.sim.house import House, prompt
from tests.engines.sim.model import Course
from tests.engines.sim.runner import BLOCK
from tests.support import PATIENCE_S, Keeper, small_geometry, until, wait_stopped
from tests.tiered import damage, tiered_keeper, wait_stored

P = prompt(8, 10 * BLOCK)
LONGER = [*P, *prompt(9, 40)]
ALWAYS = {"fetch": "always"}
KINDS: dict[str, dict[str, Any]] = {
    "at once": {"extra": ALWAYS},
    "beside": {"extra": {**ALWAYS, "sync_load_ms": 0.0}},
    "overlap": {"extra": ALWAYS, "overlap": True},
    "overlap, drafts": {"extra": ALWAYS, "overlap": True, "drafts": 2},
    "two ranks": {"extra": ALWAYS, "ranks": 2},
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, runtime_dir: Path) -> Path:
    """A disk on which the blocks of P are, of an engine of one rank and of one of two; to be copied."""
    folder = tmp_path_factory.mktemp("stored") / "disk"
    with tiered_keeper(folder) as keeper:
        house = House(keeper)
        for ranks in (1, 2):
            house.ask(house.engine(ranks=ranks), P)
        house.close()
        wait_stored(keeper)
    return folder


@pytest.fixture
def folder(stored: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stored, tmp_path / "disk")


@pytest.fixture
def keeper(folder: Path) -> Iterator[Keeper]:
    """An empty pool above that disk."""
    with tiered_keeper(folder) as running:
        yield running


def ends(engine: Engine) -> dict[str, int]:
    counted = engine.scheduler.connector._counters.read()
    return {name.removeprefix("fetch.end."): n for name, n in counted.items() if name.startswith("fetch.end.")}


def finish(house: House) -> None:
    """Everything is answered, nothing is held, and no thread works on."""
    for engine in house.engines:
        run(engine)
    house.finish()
    for engine in house.engines:
        until(lambda e=engine: not len(e.half._fetches), "no fetch is left", timeout_s=5)


def run(engine: Engine) -> None:
    """Until every request has ended: a fetch takes as many steps as it takes."""
    until(lambda: engine.step() or not (engine.scheduler.has_requests() or engine.in_flight), "all requests ended")


class Gate:
    """Holds fetches up before they begin."""

    def __init__(self, engine: Engine) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        bringer = engine.half._bringer
        self._fetch = bringer._fetch
        bringer._fetch = self._held_up  # type: ignore[method-assign]

    def _held_up(self, *args: Any) -> Any:
        self.reached.set()
        assert self.open.wait(PATIENCE_S)
        return self._fetch(*args)


def fetching(engine: Engine, house: House, tokens: list[int] = LONGER, **more: Any) -> tuple[str, Gate]:
    """A request that waits for its blocks."""
    gate = Gate(engine)
    name = house.add(engine, tokens, **more)
    until(lambda: (engine.step(), gate.reached.is_set())[1], "it fetches")
    assert engine.half._tracked[name].fetching is not None
    return name, gate


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_come_back_from_disk(house: House, kind: str) -> None:
    settings = KINDS[kind]
    engine = house.engine(**settings)
    name = house.add(engine, LONGER)
    finish(house)
    assert engine.counter("hit_tokens") == len(P)
    assert engine.counter("fetch.blocks") == 10 * settings.get("ranks", 1) and ends(engine) == {"done": 1}
    assert engine.is_done(name)


@pytest.mark.parametrize("kind", KINDS)
def test_others_go_on_while_one_waits(house: House, kind: str) -> None:
    engine = house.engine(**KINDS[kind])
    waiting, gate = fetching(engine, house)
    other = house.add(
        engine, prompt(5, 3 * BLOCK), 12, extra_args={"kv_transfer_params": {"penstock": {"fetch": "never"}}}
    )
    until(lambda: (engine.step(), engine.is_done(other))[1], "the other one is done")
    assert not engine.is_done(waiting) and not engine.tokens[waiting]
    gate.open.set()
    finish(house)
    assert engine.counter("hit_tokens") == len(P)


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_ends_calls_its_fetch_off(house: House, kind: str) -> None:
    engine = house.engine(**KINDS[kind])
    name, gate = fetching(engine, house)
    engine.abort(name)
    gate.open.set()
    finish(house)
    assert ends(engine) == {"called_off": 1} and engine.counter("hit_tokens") == 0


def test_the_prefix_is_leased_while_the_rest_comes(house: House) -> None:
    engine = house.engine(extra={**ALWAYS, "lease_age_s": 30.0}, prefix_caching=False)
    house.ask(engine, P[: 4 * BLOCK + 3])
    name, gate = fetching(engine, house)
    now = engine.half._now_s() + 31.0
    real, engine.half._now_s = engine.half._now_s, lambda: now
    engine.step()
    assert engine.half._tracked[name].lookup is not None and engine.pools[0].held()["leases"] == 4
    engine.half._now_s = real
    gate.open.set()
    finish(house)
    assert engine.counter("hit_tokens") == 4 * BLOCK + len(P)


def test_what_the_engine_has_itself_is_not_waited_for(house: House) -> None:
    """Its own pages have the first blocks; the pool and the disk have them as well, and what follows."""
    engine = house.engine(extra=ALWAYS)
    house.ask(engine, P[: 6 * BLOCK + 3], extra_args={"kv_transfer_params": {"penstock": {"fetch": "never"}}})
    assert house.hit(engine, LONGER) == len(P) - 6 * BLOCK
    assert engine.counter("fetch.blocks") == 4


def test_nobody_waits_beyond_the_deadline(house: House) -> None:
    """Whatever the thread does: it is the engine's clock that counts."""
    engine = house.engine(extra={**ALWAYS, "fetch_deadline_s": 0.2})
    name, gate = fetching(engine, house)
    until(lambda: (engine.step(), engine.is_done(name))[1], "computed")
    assert not gate.open.is_set() and engine.counter("hit_tokens") == 0
    gate.open.set()
    finish(house)


def test_more_requests_than_threads(house: House) -> None:
    """Those that never get their turn are computed at the deadline, and their fetches do not run afterwards."""
    engine = house.engine(extra={**ALWAYS, "fetch_deadline_s": 0.3}, n_seqs=32)
    gate = Gate(engine)
    names = [house.add(engine, [*P, *prompt(20 + seed, 20)], 2) for seed in range(12)]
    until(lambda: (engine.step(), all(map(engine.is_done, names)))[1], "all are computed")
    gate.open.set()
    finish(house)
    assert sum(ends(engine).values()) == 12 and ends(engine)["called_off"] == 12


def test_a_mover_that_is_stopped(house: House) -> None:
    mover = house.keeper.tier_report()["mover"]["pid"]
    engine = house.engine(extra={**ALWAYS, "fetch_deadline_s": 0.2})
    os.kill(mover, signal.SIGSTOP)
    wait_stopped(mover)
    try:
        for seed in (1, 2):
            house.add(engine, [*P, *prompt(seed, 20)])
            run(engine)
        assert engine.counter("hit_tokens") == 0 and ends(engine)["paused"] >= 1
    finally:
        os.kill(mover, signal.SIGCONT)
    finish(house)


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_a_damaged_block_ends_the_hit_of_every_rank(folder: Path, ranks: int, rank: int) -> None:
    damage(folder, Course(P, []).block(6, BLOCK, rank))
    with tiered_keeper(folder) as keeper:
        house = House(keeper)
        try:
            engine = house.engine(extra=ALWAYS, ranks=ranks)
            house.add(engine, LONGER)
            finish(house)
            assert engine.counter("hit_tokens") == 6 * BLOCK and ends(engine) == {"damaged": 1}
        finally:
            house.close()


def test_the_engine_is_reset_while_one_waits(house: House) -> None:
    engine = house.engine(extra=ALWAYS)
    name, gate = fetching(engine, house)
    assert engine.scheduler.reset_connector_cache()
    house.expect(engine, [*LONGER, *house.asked[-1][2]], variant=engine.half._tracked[name].variant)
    gate.open.set()
    finish(house)
    assert engine.counter("hit_tokens") == 0 and ends(engine) == {"called_off": 1}


def test_the_engine_is_closed_while_one_waits(house: House) -> None:
    engine = house.engine(extra=ALWAYS)
    _, gate = fetching(engine, house)
    half = engine.half
    closing = threading.Thread(target=house.end_engines)
    closing.start()
    gate.open.set()
    closing.join(PATIENCE_S)
    assert not closing.is_alive() and not len(half._fetches)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("penstock-fetch")]


def test_a_bug_costs_the_hit_only(house: House) -> None:
    engine = house.engine(extra=ALWAYS)

    def broken(*args: Any, **more: Any) -> Any:
        raise RuntimeError("a defect")

    engine.half._bringer.bring = broken  # type: ignore[method-assign]
    house.add(engine, LONGER)
    finish(house)
    assert engine.counter("fetch.bug.RuntimeError") == 1 and engine.counter("hit_tokens") == 0


@pytest.mark.parametrize(("asked", "fetched"), [("always", 10), ("never", 0)])
def test_a_request_says_for_itself(house: House, asked: str, fetched: int) -> None:
    engine = house.engine(extra={"fetch": "never" if fetched else "always"})
    house.add(engine, LONGER, extra_args={"kv_transfer_params": {"penstock": {"fetch": asked}}})
    finish(house)
    assert engine.counter("fetch.blocks") == fetched and engine.counter("hit_tokens") == fetched * BLOCK


def test_a_hit_that_would_be_too_short_is_not_fetched(house: House) -> None:
    engine = house.engine(extra={**ALWAYS, "min_hit_tokens": len(P) + 1})
    house.add(engine, LONGER)
    finish(house)
    assert ends(engine) == {"too_little_below": 1} and engine.counter("fetch.blocks") == 0


def test_a_pool_without_tiers_makes_nobody_wait(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Keeper(small_geometry()) as plain:
        house = House(plain)
        try:
            engine = house.engine(extra=ALWAYS)
            name = house.add(engine, LONGER)
            until(lambda: not engine.half._fetches._looking, "it was looked")
            engine.step()
            assert engine.half._tracked[name].fetching is None and engine.tokens[name]
            finish(house)
            assert not ends(engine)
        finally:
            house.close()


# ---- what the choice is made from


@pytest.mark.parametrize("overlap", [False, True])
def test_the_speed_of_prefill_is_measured(house: House, overlap: bool) -> None:
    engine = house.engine(overlap=overlap)
    seen: list[tuple[int, int, float]] = []
    engine.half._bringer.computed = lambda *sample: seen.append(sample)  # type: ignore[method-assign]
    house.add(engine, prompt(3, 700), 4)
    finish(house)
    assert [sample[:2] for sample in seen] == [(512, 0), (188, 512)]
    assert all(seconds > 0 for _, _, seconds in seen)


@pytest.mark.parametrize(("compute_s", "end"), [(100.0, "done"), (1e-7, "recomputed")])
def test_auto_compares(house: House, compute_s: float, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(below, "_ASK_LEAST_S", 10.0)  # the machine may be busy
    engine = house.engine()
    for _ in range(10):
        engine.half._bringer.computed(100, 0, compute_s)
    house.add(engine, LONGER)
    finish(house)
    assert ends(engine) == {end: 1}
