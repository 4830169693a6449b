"""Results, and the two ways to show them: JSON and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from penstock.bench.stats import Estimate

__all__ = ["Goal", "Result", "as_json", "as_table", "failed", "result"]


@dataclass(frozen=True, slots=True)
class Goal:
    """What is measured, and what is to be reached. `target` None: shown for information, always met."""

    name: str
    unit: str
    target: float | None = None
    at_most: bool = False
    """Whether smaller is better."""


@dataclass(frozen=True, slots=True)
class Result:
    """One measured value with its 95% interval. `baseline` is what a ratio was taken against, in the note's words.

    `met` holds for the interval's worse end. `value` is None where the measurement failed; `note` then says why.
    """

    name: str
    value: float | None
    unit: str
    low: float | None
    high: float | None
    baseline: float | None
    target: float | None
    met: bool
    note: str = ""


def result(goal: Goal, measured: Estimate, *, baseline: float | None = None, note: str = "") -> Result:
    """A result of a measurement that worked."""
    met = True
    if goal.target is not None:
        met = measured.high <= goal.target if goal.at_most else measured.low >= goal.target
    return Result(
        goal.name, _rounded(measured.value), goal.unit, _rounded(measured.low), _rounded(measured.high),
        None if baseline is None else _rounded(baseline), goal.target, met, note,
    )  # fmt: skip


def failed(goal: Goal, why: str) -> Result:
    """A result of a measurement that did not come to an end: never met."""
    return Result(goal.name, None, goal.unit, None, None, None, goal.target, False, f"failed: {why}")


def as_json(machine: dict[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """The document that every bench of this project prints."""
    return {"machine": machine, "results": [asdict(row) for row in results]}


def as_table(title: str, results: Sequence[Result], goals: Sequence[Goal]) -> Table:
    """The same for people. `goals` say in which direction a target lies."""
    at_most = {goal.name: goal.at_most for goal in goals}
    table = Table(title=title, title_justify="left")
    for column in ("name", "value", "95% interval", "unit", "target", "baseline", ""):
        table.add_column(column, justify="left" if column in ("name", "unit") else "right", no_wrap=True)
    for row in results:
        sign = "≤" if at_most.get(row.name) else "≥"
        table.add_row(
            row.name,
            _shown(row.value),
            f"{_shown(row.low)} – {_shown(row.high)}",
            row.unit,
            "" if row.target is None else f"{sign} {_shown(row.target)}",
            _shown(row.baseline),
            _verdict(row),
        )
    return table


def _verdict(row: Result) -> str:
    if row.value is None:
        return "[red]failed[/]"
    if row.target is None:
        return ""
    return "[green]met[/]" if row.met else "[red]missed[/]"


def _rounded(value: float) -> float:
    """Five significant digits: more is noise."""
    return float(f"{value:.5g}")


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
