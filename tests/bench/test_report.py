"""What a result says, and the documents made of results."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from penstock.bench.machine import describe_machine
from penstock.bench.report import Goal, Result, as_json, as_table, failed, result
from penstock.bench.stats import Estimate

FAST = Goal("fast", "us", 4, at_most=True)
MANY = Goal("many", "1/s", 100)
SHOWN = Goal("shown", "s")


@pytest.mark.parametrize(
    ("goal", "measured", "met"),
    [
        (FAST, Estimate(3, 2, 4), True),
        (FAST, Estimate(3, 2, 4.1), False),
        (MANY, Estimate(150, 100, 200), True),
        (MANY, Estimate(150, 99, 200), False),
        (SHOWN, Estimate(1, 1, 1), True),
    ],
)
def test_met_is_about_the_worse_end(goal: Goal, measured: Estimate, met: bool) -> None:
    assert result(goal, measured).met is met


def test_a_failure_is_never_met() -> None:
    for goal in (FAST, SHOWN):
        row = failed(goal, "no memory")
        assert not row.met
        assert row.value is None
        assert "no memory" in row.note


def test_the_document() -> None:
    row = result(MANY, Estimate(123456.789, 100, 200), baseline=1.23456789, note="eight clients")
    document = json.loads(json.dumps(as_json({"cpu": "one"}, [row])))
    assert document == {
        "machine": {"cpu": "one"},
        "results": [
            {
                "name": "many", "value": 123460.0, "unit": "1/s", "low": 100.0, "high": 200.0, "baseline": 1.2346,
                "target": 100, "met": True, "note": "eight clients",
            }
        ],
    }  # fmt: skip
    assert Result(**document["results"][0]) == row


def test_the_table() -> None:
    rows = [result(FAST, Estimate(5, 4, 6)), result(MANY, Estimate(5000, 4000, 6000)), failed(SHOWN, "x")]
    console = Console(width=120, file=io.StringIO())
    with console.capture() as captured:
        console.print(as_table("here", rows, [FAST, MANY, SHOWN]))
    text = captured.get()
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "≤ 4" in lines["fast"] and "missed" in lines["fast"]
    assert "≥ 100" in lines["many"] and "met" in lines["many"] and "5,000" in lines["many"]
    assert "failed" in lines["shown"]


def test_the_machine_is_described_without_naming_it() -> None:
    machine = describe_machine()
    assert machine["cores"] >= 1
    assert machine["versions"]["numpy"]
    assert not {"host", "hostname", "user", "path"} & set(machine)
    json.dumps(machine)
