"""The machine itself: litmus tests of x86-TSO, deaths, and the explorer's merging of histories."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest

from penstock.testing.model import SCENARIOS, Explorer, clients, keeper, sleep
from penstock.testing.model.explorer import SearchTooLarge
from penstock.testing.model.machine import (
    Model,
    Op,
    Option,
    Process,
    Program,
    check,
    choose,
    fence,
    kernel,
    load,
    own,
    sfence,
    store,
    store_nt,
)

Litmus = Callable[[Model, tuple[int, ...], int], Program]


def outcomes(programs: list[Litmus], *, sequential: bool = False) -> set[tuple[int, ...]]:
    """Every result tuple that the programs, over cells x and y, can leave behind."""
    model = Model()
    cells = (model.cell("x"), model.cell("y"))
    results = [model.cell(f"result {i}", -1) for i in range(len(programs))]
    for i, program in enumerate(programs):
        model.processes.append(Process(f"p{i}", partial(program, model, cells, results[i])))
    seen: set[tuple[int, ...]] = set()

    def at_rest(memory: tuple[int, ...], _status: tuple[str, ...]) -> None:
        seen.add(tuple(memory[cell] for cell in results))

    model.at_rest = at_rest
    assert Explorer(model, sequential=sequential).run().complaint is None
    return seen


def store_then_load(mine: int, other: int, barrier: Op | None) -> Litmus:
    def program(_model: Model, cells: tuple[int, ...], result: int) -> Program:
        yield store(cells[mine], 1)
        if barrier is not None:
            yield barrier
        value = yield load(cells[other])
        yield store(result, value)

    return program


def test_store_buffering_is_seen_without_fences_and_not_with_them() -> None:
    assert (0, 0) in outcomes([store_then_load(0, 1, None), store_then_load(1, 0, None)])
    assert (0, 0) in outcomes([store_then_load(0, 1, fence), store_then_load(1, 0, None)])
    assert (0, 0) not in outcomes([store_then_load(0, 1, fence), store_then_load(1, 0, fence)])
    # An sfence does not wait for ordinary stores to leave the buffer.
    assert (0, 0) in outcomes([store_then_load(0, 1, sfence), store_then_load(1, 0, sfence)])


def test_sequential_consistency_has_no_store_buffering() -> None:
    programs = [store_then_load(0, 1, None), store_then_load(1, 0, None)]
    assert outcomes(programs, sequential=True) == {(0, 1), (1, 0), (1, 1)}


def two_stores(write_first: Callable[[int, int], Op], barrier: Op | None) -> Litmus:
    def program(_model: Model, cells: tuple[int, ...], result: int) -> Program:
        yield write_first(cells[0], 1)
        if barrier is not None:
            yield barrier
        yield store(cells[1], 1)
        yield store(result, 0)

    return program


def two_loads(_model: Model, cells: tuple[int, ...], result: int) -> Program:
    second = yield load(cells[1])
    first = yield load(cells[0])
    yield store(result, 10 * first + second)


def test_ordinary_stores_are_seen_in_order_and_streaming_ones_only_behind_an_sfence() -> None:
    stale = (0, 1)  # the second store was seen and the first was not
    assert stale not in outcomes([two_stores(store, None), two_loads])
    assert stale in outcomes([two_stores(store_nt, None), two_loads])
    assert stale not in outcomes([two_stores(store_nt, sfence), two_loads])
    assert stale not in outcomes([two_stores(store_nt, fence), two_loads])


def test_a_process_reads_its_own_stores_early() -> None:
    def program(_model: Model, cells: tuple[int, ...], result: int) -> Program:
        yield store(cells[0], 7)
        yield store_nt(cells[1], 8)
        first = yield own(cells[0])
        second = yield load(cells[1])
        yield store(result, 10 * first + second)

    assert outcomes([program]) == {(78,)}


def test_a_death_leaves_a_prefix_of_the_stores() -> None:
    model = Model()
    cells = tuple(model.cell(name) for name in "abc")

    def program() -> Program:
        for cell in cells:
            yield store(cell, 1)

    seen = set()

    def at_rest(memory: tuple[int, ...], _status: tuple[str, ...]) -> None:
        seen.add(memory)

    model.at_rest = at_rest
    model.processes = [Process("p", program, deaths=1)]
    Explorer(model).run()
    assert seen == {(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)}


def test_a_restarted_process_begins_anew_and_its_locks_were_freed() -> None:
    model = Model()
    lock, starts = model.cell("lock"), model.cell("starts")

    def program() -> Program:
        yield kernel(lock, lambda held: None if held else 1)
        before = yield own(starts)
        yield store(starts, before + 1)
        yield fence

    most = []

    def at_rest(memory: tuple[int, ...], status: tuple[str, ...]) -> None:
        most.append((memory[starts], status))

    model.at_rest = at_rest
    model.processes = [Process("p", program, deaths=2, restart=True, on_death=((lock, 0),))]
    assert Explorer(model).run().complaint is None
    assert max(most) == (3, ("done",))


def test_checks_and_choices_are_reported_with_the_way_there() -> None:
    model = Model()

    def program() -> Program:
        picked = yield choose(Option(1), Option(2), Option(3))
        yield check(picked != 2, "two was picked")

    model.processes = [Process("p", program)]
    result = Explorer(model).run()
    assert result.complaint == "two was picked"
    assert result.trace == ["p: decides 2"]


def test_a_search_that_is_cut_off_says_so() -> None:
    with pytest.raises(SearchTooLarge):
        Explorer(SCENARIOS["lease"](frozenset()), limit=100).run()


@pytest.mark.parametrize("mutations", [(), ("no reader fence",), ("no lease scan",), ("state read before generation",)])
def test_merging_histories_changes_no_verdict(mutations: tuple[str, ...]) -> None:
    """With every history a state of its own nothing can be merged wrongly; this scenario is small enough."""
    merged = Explorer(SCENARIOS["lease"](frozenset(mutations))).run()
    apart = Explorer(SCENARIOS["lease"](frozenset(mutations)), merge=False).run()
    assert apart.complaint == merged.complaint
    assert apart.states >= merged.states


def yields_that_hide_something(module: ModuleType) -> list[int]:
    """Lines on which a `yield` is neither a statement nor all that is assigned or returned."""
    tree = ast.parse(inspect.getsource(module))
    open_places: set[ast.expr] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr | ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Return) and node.value:
            open_places.add(node.value)
            if isinstance(node.value, ast.IfExp):  # its test is done when a branch is evaluated
                open_places |= {node.value.body, node.value.orelse}
    yields = [node for node in ast.walk(tree) if isinstance(node, ast.Yield | ast.YieldFrom)]
    return [node.lineno for node in yields if node not in open_places]


@pytest.mark.parametrize("module", [clients, keeper, sleep], ids=lambda module: module.__name__)
def test_no_program_keeps_state_where_the_merging_does_not_look(module: ModuleType) -> None:
    assert not yields_that_hide_something(module)
