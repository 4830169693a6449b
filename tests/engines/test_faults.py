"""Faults under running servers: no keeper, dead and stopped keepers, damaged blocks, dead servers, clients that leave.

Every request must end with the right tokens. One pair of servers goes through all of it, in this order; one of them
loads before its steps, the other beside them.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from penstock.pool.layout import plan_geometry
from tests.engines.blocks import PoolView, alone, attached, forget, hit_of, unread, wait_idle, worker_stopped
from tests.engines.client import Completion, complete, complete_all, metrics, post
from tests.engines.conftest import POOL_BYTES
from tests.engines.fleet import Fleet
from tests.engines.models import prompt_tokens, tiny_llama
from tests.engines.server import ServerConfig, VllmServer, penstock_transfer
from tests.support import Keeper, until, wait_stopped

BLOCK = 32
LAYERS = 3


@dataclass
class Rig:
    """Two servers on one pool."""

    keeper: Keeper
    before: VllmServer
    """Loads before its steps."""
    beside: VllmServer
    """Loads beside its steps."""
    damaged: list[list[int]]
    """Prompts of which a block was damaged at some time."""

    @property
    def servers(self) -> list[VllmServer]:
        return [self.before, self.beside]

    def have_pool(self) -> None:
        """A keeper runs and both servers use it."""
        if self.keeper.process is None:
            self.keeper.start()
            self.keeper.wait_touched()
        until(lambda: attached(self.keeper, 4), "both halves of both servers are attached")
        for server in self.servers:  # a worker says with a step's output which pool it sees
            complete(server, prompt_tokens(10, 1), 2)

    def forget(self) -> None:
        for server in self.servers:
            forget(server)


@pytest.fixture(scope="module")
def rig(fleet: Fleet, models: Path, runtime_dir: Path) -> Iterator[Rig]:
    """Started without a keeper."""
    keeper = Keeper(plan_geometry(POOL_BYTES))
    model = tiny_llama(models / "tiny-float32")

    def config(sync_load_ms: int, *arguments: str) -> ServerConfig:
        transfer = penstock_transfer(keeper.name, sync_load_ms=sync_load_ms)
        variables = (("VLLM_SERVER_DEV_MODE", "1"),)
        return ServerConfig(model, kv_transfer=transfer, arguments=arguments, variables=variables)

    # With asynchronous scheduling nothing is ever loaded before a step.
    configs = [config(60_000, "--no-async-scheduling"), config(0)]
    with contextlib.ExitStack() as undo:
        undo.callback(keeper.__exit__)
        undo.callback(fleet.end_where, lambda one: one in configs)
        before, beside = fleet.get(*configs)
        yield Rig(keeper, before, beside, [])


@pytest.fixture
def view(rig: Rig) -> Iterator[PoolView]:
    rig.have_pool()
    with PoolView(rig.keeper, LAYERS) as opened:
        yield opened


def right(answers: Sequence[Completion], expected: Sequence[Completion]) -> None:
    """The same tokens, one by one."""
    for i, (answer, wanted) in enumerate(zip(answers, expected, strict=True)):
        assert answer.tokens == wanted.tokens, f"answer {i}"


def test_without_a_keeper_it_computes_warns_once_and_attaches_later(rig: Rig) -> None:
    prompt = prompt_tokens(1000, 2)
    assert rig.keeper.process is None
    for server in rig.servers:
        first, again = complete(server, prompt), complete(server, prompt)
        assert first.cached_tokens == 0 and again.tokens == first.tokens
        server.wait_log(r"request \S+: prompt_tokens=1000 .*miss=no_keeper")
        until(lambda server=server: counted(server, "lookups", result="no_keeper") > 0, "it is counted")
    rig.have_pool()
    with PoolView(rig.keeper, LAYERS) as view:
        rig.forget()
        stored = complete(rig.before, prompt)
        assert (stored.cached_tokens, stored.tokens) == (0, first.tokens)
        view.wait_stored(prompt)
        hit = complete(rig.beside, prompt)
        assert (hit.cached_tokens, hit.tokens) == (hit_of(prompt), first.tokens)
    for server in rig.servers:
        warnings = [line for line in server.read_log().splitlines() if "no pool" in line]
        assert len(warnings) == 2, warnings  # one of the scheduler, one of the worker
        assert all("penstock serve --name" in line for line in warnings)


def counted(server: VllmServer, what: str, **labels: str) -> float:
    """One of the connector's counters in `/metrics`."""
    return metrics(server).total(f"vllm:penstock_{what}_total", **labels)


def mixed(number: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts to be stored, and others that are new; some of them begin alike."""
    known = [prompt_tokens(200 + 130 * i, number, i) for i in range(5)]
    new = [[*known[i], *prompt_tokens(150, number, 10 + i)] for i in range(3)]
    return known, [*new, prompt_tokens(700, number, 20), prompt_tokens(90, number, 21)]


def wait_storing(server: VllmServer, view: PoolView, prompt: list[int]) -> None:
    """Wait until the server stores this prompt: after a fault, saves are dropped for some seconds more."""

    def stored() -> bool:
        forget(server)
        complete(server, prompt, 2)
        return view.n_resident(view.places()[0], prompt) == len(prompt) // BLOCK

    until(stored, "saves work again")


def test_a_keeper_killed_under_load(rig: Rig, view: PoolView) -> None:
    known, new = mixed(3)
    expected = [alone(rig.before, prompt, 24) for prompt in [*known, *new]]
    complete_all(rig.before, known, 2)
    for prompt in known:
        view.wait_stored(prompt)
    rig.forget()
    prompts = [*known, *new] * 2
    with ThreadPoolExecutor(8) as threads:
        futures = [threads.submit(complete, rig.servers[i % 2], p, 24) for i, p in enumerate(prompts)]
        next(iter(as_completed(futures)))
        rig.keeper.kill()
        right([future.result() for future in futures], expected * 2)

    # Reading needs no keeper, and what cannot be stored holds nobody up.
    rig.forget()
    unseen = prompt_tokens(500, 3, 30)
    for server in rig.servers:
        again = complete(server, known[4], 24)
        assert (again.cached_tokens, again.tokens) == (hit_of(known[4]), expected[4].tokens)
        assert complete(server, unseen, 24).cached_tokens == 0

    rig.have_pool()
    rig.keeper.wait_back(view.pool)
    rig.forget()
    later = prompt_tokens(640, 3, 31)
    for i, server in enumerate(rig.servers):
        wait_storing(server, view, prompt_tokens(640, 3, 40 + i))
    wanted = complete(rig.beside, later)
    view.wait_stored(later)
    hit = complete(rig.before, later)
    assert (hit.cached_tokens, hit.tokens) == (hit_of(later), wanted.tokens)
    right(complete_all(rig.servers, [*known, *new], 24), expected)
    view.wait_quiet()
    rig.keeper.fsck()


def test_a_stopped_keeper_holds_no_request_up(rig: Rig, view: PoolView) -> None:
    known, new = mixed(4)
    expected = [alone(rig.beside, prompt, 8) for prompt in [*known, *new]]
    complete_all(rig.beside, known, 2)
    for prompt in known:
        view.wait_stored(prompt)
    rig.forget()
    os.kill(rig.keeper.pid, signal.SIGSTOP)
    try:
        wait_stopped(rig.keeper.pid)
        # All of these end while the keeper stands, so that none can have waited for it.
        answers = complete_all(rig.servers, [*known, *new], 8)
        right(answers, expected)
        assert [answer.cached_tokens for answer in answers[:5]] == [hit_of(prompt) for prompt in known]
    finally:
        os.kill(rig.keeper.pid, signal.SIGCONT)
    for i, server in enumerate(rig.servers):
        wait_storing(server, view, prompt_tokens(640, 4, 31 + i))
    view.wait_quiet()
    rig.keeper.fsck()


@pytest.mark.parametrize("which", ["before", "beside"])
@pytest.mark.parametrize("block", [0, 7])
def test_damaged_blocks_are_computed_again_and_nothing_wrong_is_stored(
    rig: Rig, view: PoolView, which: str, block: int
) -> None:
    server = rig.before if which == "before" else rig.beside
    other = rig.beside if which == "before" else rig.before
    base = prompt_tokens(40 * BLOCK, 5, block, which == "before")
    # What continues the damaged chain is computed in the step in which the load fails.
    longer = [[*base, *prompt_tokens(10 * BLOCK, 5, i)] for i in range(3)]
    prompts = [*longer, base, base[: 20 * BLOCK + 5]]
    expected = [alone(server, prompt, 40) for prompt in prompts]
    complete(other, base, 2)
    view.wait_stored(base)
    view.wait_quiet()
    rig.forget()
    seen, damaged = view.client_counter("miss.checksum"), rig.keeper.counters()["damaged"]
    view.damage(base, block)
    failed = counted(server, "load_failures", reason="checksum")
    right(complete_all(server, prompts, 40), expected)
    assert view.client_counter("miss.checksum") > seen
    until(lambda: counted(server, "load_failures", reason="checksum") > failed, "it is counted")
    until(lambda: rig.keeper.counters()["damaged"] > damaged, "the damaged block is dropped")
    server.wait_log(rf"request \S+: prompt_tokens={len(longer[0])} .* hit_tokens={block * BLOCK} miss=checksum")
    view.wait_quiet()
    rig.keeper.fsck()
    # What it stores of these chains from now on, the other server reads.
    rig.forget()
    right(complete_all(server, prompts, 40), expected)
    for prompt in prompts:
        view.wait_stored(prompt)
    forget(other)
    answers = complete_all(other, prompts, 40)
    right(answers, expected)
    assert [answer.cached_tokens for answer in answers] == [hit_of(prompt) for prompt in prompts]
    rig.damaged.extend(prompts)


def holds_soon(view: PoolView) -> bool:
    """Whether somebody takes leases within a moment."""
    try:
        until(lambda: view.leases() > 0, timeout_s=2.0)
    except AssertionError:
        return False
    return True


@contextlib.contextmanager
def caught_loading(server: VllmServer, view: PoolView, prompts: Sequence[Sequence[int]]) -> Iterator[None]:
    """Requests for prompts that the pool has, held with their leases: the worker stands. At the end it goes on, and
    the clients hang up."""
    for _ in range(20):
        with worker_stopped(server), unread(server, prompts):
            if holds_soon(view):
                yield
                return
        # The worker was stopped within a step, if only an empty one, after which nothing is scheduled.
        wait_idle(server)
        forget(server)
    raise AssertionError("the worker was never caught between two steps")


@pytest.mark.parametrize("which", ["beside", "before"])
def test_clients_that_hang_up_leave_no_leases(rig: Rig, view: PoolView, which: str) -> None:
    server = rig.before if which == "before" else rig.beside
    prompts = [prompt_tokens(2000 + 32 * i, 6, i) for i in range(6)]
    expected = complete_all(rig.before, prompts, 8)
    for prompt in prompts:
        view.wait_stored(prompt)
    view.wait_quiet()
    rig.forget()
    with caught_loading(server, view, prompts):
        pass
    wait_idle(server)
    view.wait_quiet()
    for _ in range(3):
        with unread(server, prompts):
            pass
    wait_idle(server)
    view.wait_quiet()
    rig.forget()
    answers = complete_all(server, prompts, 8)
    right(answers, expected)
    assert [answer.cached_tokens for answer in answers] == [hit_of(prompt) for prompt in prompts]


def test_after_a_reset_nothing_of_before_is_used(rig: Rig, view: PoolView) -> None:
    """And the pool's blocks, of chains that were damaged too, are what this computes anew."""
    prompts = rig.damaged or [prompt_tokens(900, 7)]
    expected = [alone(rig.before, prompt) for prompt in prompts]
    complete_all(rig.before, prompts, 2)
    for prompt in prompts:
        view.wait_stored(prompt)
    wait_idle(rig.before)
    until(lambda: post(rig.before, "/reset_prefix_cache?reset_external=true")["success"], "the reset succeeds")
    [old] = view.places()
    first = complete(rig.before, prompts[0])
    assert (first.cached_tokens, first.tokens) == (0, expected[0].tokens)
    right(complete_all(rig.before, prompts), expected)
    [_, new] = until(lambda: len(places := view.places()) == 2 and places, "the new space is registered")
    forget(rig.before)
    right([complete(rig.before, prompt) for prompt in prompts], expected)
    for prompt in prompts:
        view.wait_stored(prompt, place=new)
        np.testing.assert_allclose(view.contents(old, prompt), view.contents(new, prompt), rtol=1e-3, atol=1e-4)
    forget(rig.before)
    hit = complete(rig.before, prompts[0])
    assert (hit.cached_tokens, hit.tokens) == (hit_of(prompts[0]), expected[0].tokens), "its own blocks are used"
    forget(rig.beside)
    assert complete(rig.beside, prompts[0]).cached_tokens == hit_of(prompts[0]), "others go on with theirs"


def test_a_killed_server_leaves_a_sound_pool(rig: Rig, view: PoolView) -> None:
    known, new = mixed(8)
    expected = [alone(rig.before, prompt) for prompt in [*known, *new]]
    complete_all(rig.beside, known, 2)
    place = view.places()[0]
    for prompt in known:
        view.wait_stored(prompt, place=place)
    view.wait_quiet()
    rig.forget()
    # With saves under way, too: slots are granted for those, and some are written to.
    complete_all(rig.beside, new, 1)
    with caught_loading(rig.beside, view, known):
        rig.beside.kill()
    until(lambda: attached(rig.keeper, 2), "the dead server's clients are gone")
    view.wait_quiet()
    rig.keeper.fsck()
    right(complete_all(rig.before, [*known, *new]), expected)
    wait_idle(rig.before)
    view.wait_quiet()
    rig.keeper.fsck()
