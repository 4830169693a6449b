"""The protocol holds everywhere, and each part of it is needed: a missing one is found with a trace."""

from __future__ import annotations

import pytest

from penstock.testing.model import MUTATIONS, REDUNDANT, SCENARIOS, UNSOUND, Mutation, explore


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name not in UNSOUND])
def test_protocol_holds(scenario: str) -> None:
    result = explore(scenario)
    assert result.complaint is None, str(result)
    assert result.states > 500  # a scenario in which nothing can happen holds, too


@pytest.mark.parametrize("scenario", sorted(UNSOUND))
def test_designs_that_were_turned_down_fail(scenario: str) -> None:
    assert explore(scenario).complaint


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_part_is_needed(mutation: Mutation) -> None:
    removed = [name for name in (mutation.name, mutation.behind) if name]
    result = explore(mutation.scenario, *removed)
    assert result.complaint, f"nothing happens without {removed}"
    assert len(result.trace) > 5
    if mutation.behind:
        for name in removed:
            assert explore(mutation.scenario, name).complaint is None, f"{name} alone is enough"


@pytest.mark.parametrize(
    "mutation",
    [mutation for mutation in MUTATIONS if not mutation.behind],
    ids=lambda mutation: mutation.name,
)
def test_store_buffers_are_what_shows_missing_fences(mutation: Mutation) -> None:
    """Under sequential consistency a missing fence changes nothing; all else is found there as well."""
    result = explore(mutation.scenario, mutation.name, sequential=True)
    assert (result.complaint is None) == mutation.needs_buffers, str(result)


@pytest.mark.parametrize(("name", "scenario"), REDUNDANT)
def test_what_stands_behind_something_else(name: str, scenario: str) -> None:
    assert explore(scenario, name).complaint is None


def test_a_trace_can_be_read() -> None:
    trace = explore("lease", "no keeper fence").trace
    assert any(line.startswith("keeper: decides ('evict', 0)") for line in trace)
    assert any("memory receives STATE[0] := 2" in line for line in trace)
    assert trace[-1].startswith("reader: loads DATA[0][1]")


def test_every_mutation_is_of_a_known_scenario() -> None:
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names)
    assert {mutation.scenario for mutation in MUTATIONS} <= set(SCENARIOS)
