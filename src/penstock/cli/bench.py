"""`penstock bench pool` and `penstock bench tiers`."""

from __future__ import annotations

import json as json_module
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from penstock.bench.machine import describe_machine
from penstock.bench.pool.base import GROUPS as POOL
from penstock.bench.pool.base import SCALES, Group, goals, select
from penstock.bench.pool.runner import run_groups
from penstock.bench.report import Result, as_json, as_table
from penstock.bench.tiers.base import GROUPS as TIERS

__all__ = ["bench"]

_GROUPS = {"pool": POOL, "tiers": TIERS}
# What the table needs where no terminal says how wide it may be.
_FILE_WIDTH = 120


def bench(suite: str, json: bool, out: Path | None, only: str | None, scale: str) -> None:
    """Run the benches of `suite`, "pool" or "tiers". Exit status 1 when a target was missed or a bench failed."""
    machine = describe_machine()
    groups = _GROUPS[suite]
    results = _run(suite, select(only, groups), scale)
    document = json_module.dumps(as_json(machine, results), indent=2)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(document + "\n")
    if json:
        print(document)
    else:
        console = Console()
        if not console.is_terminal:
            console.width = _FILE_WIDTH
        console.print(as_table(f"{machine['cpu']}, {machine['cores']} cores", results, goals(groups)))
        for row in results:
            if row.value is None:
                Console(stderr=True).print(f"{row.name}: {row.note}", markup=False)
    raise typer.Exit(0 if all(row.met for row in results) else 1)


def _run(suite: str, groups: dict[str, Group], scale: str) -> list[Result]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Redrawn rarely: the bar must not take time from what is measured.
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=1, transient=True) as progress:
        task = progress.add_task("", total=len(groups))

        def began(name: str) -> None:
            progress.update(task, description=name, completed=list(groups).index(name))

        results = run_groups(groups, SCALES[scale], began, f"penstock.bench.{suite}")
        progress.update(task, completed=len(groups))
    return results
