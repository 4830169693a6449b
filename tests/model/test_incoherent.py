"""Memory without coherence between hosts: the order of write-backs and invalidations holds, and each is needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from penstock.testing.model import Explorer, caches, incoherent
from penstock.testing.model.caches import add_line, invalidate, put, see, write_back
from penstock.testing.model.incoherent import MUTATIONS, REDUNDANT, SCENARIOS, Loss, explore
from penstock.testing.model.machine import Model, Process, Program, kernel, load, store
from tests.model.test_machine import yields_that_hide_something


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_order_holds(scenario: str) -> None:
    result = explore(scenario)
    assert result.complaint is None, str(result)
    assert result.states > 200  # a scenario in which nothing can happen holds, too


@pytest.mark.parametrize("loss", MUTATIONS, ids=lambda loss: loss.name)
def test_each_part_is_needed(loss: Loss) -> None:
    result = explore(loss.scenario, loss.name)
    assert result.complaint, f"nothing happens without {loss.name!r}"
    assert len(result.trace) > 5


@pytest.mark.parametrize(("name", "scenario"), REDUNDANT)
def test_what_only_makes_a_reader_miss(name: str, scenario: str) -> None:
    assert explore(scenario, name).complaint is None


def test_every_mutation_is_of_a_known_scenario_and_removes_something() -> None:
    assert {loss.scenario for loss in MUTATIONS} <= set(SCENARIOS)
    assert len({loss.name for loss in MUTATIONS}) == len(MUTATIONS)
    with pytest.raises(KeyError):
        explore("no such scenario")


def test_no_program_keeps_state_where_the_merging_does_not_look() -> None:
    assert not yields_that_hide_something(incoherent)
    assert not yields_that_hide_something(caches)


# ---- the caches themselves


def outcomes(publish: Callable[[int, int], Program], look: Callable[[int, int, int], Program]) -> set[tuple[int, int]]:
    """What a reader of two lines can see of a publisher that stores 1 into both; a bell tells when it has."""
    model = Model()
    first, second = add_line(model, "first", 0), add_line(model, "second", 0)
    bell, result = model.cell("bell"), model.cell("result", (-1, -1))

    def publisher() -> Program:
        yield from publish(first, second)
        yield kernel(bell, _rung)

    def reader() -> Program:
        yield load(bell, unless=0)
        saw = yield from look(first, second, result)
        yield store(result, saw)

    model.processes += [Process("publisher", publisher), Process("reader", reader)]
    seen: set[tuple[int, int]] = set()

    def at_rest(memory: tuple[object, ...], _status: tuple[str, ...]) -> None:
        seen.add(memory[result])  # type: ignore[arg-type]

    model.at_rest = at_rest
    assert Explorer(model).run().complaint is None
    return seen


def _rung(_old: object) -> int:
    return 1


def stores(first: int, second: int, *, back: bool) -> Program:
    for line in (first, second):
        yield put(line, 0, 1)
        if back:
            yield write_back(line)


def looks(first: int, second: int, _result: int, *, fresh: bool) -> Program:
    found: tuple[int, ...] = ()
    for line in (first, second):
        if fresh:
            yield invalidate(line)
        answer = yield see(line)
        found += answer.copy
        del answer
    return found


EVERYTHING = {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize("back", [True, False])
@pytest.mark.parametrize("fresh", [True, False])
def test_what_was_stored_is_seen_for_sure_only_if_both_sides_do_their_part(back: bool, fresh: bool) -> None:
    """Each line by itself, in no order: also a bell that rings through other wires does not help."""
    seen = outcomes(partial(stores, back=back), partial(looks, fresh=fresh))
    assert seen == ({(1, 1)} if back and fresh else EVERYTHING)
