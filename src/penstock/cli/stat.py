"""`penstock stat`."""

from __future__ import annotations

import json as json_module
from typing import Any

from rich.console import Console
from rich.table import Table

from penstock.cli.ask import ask

__all__ = ["stat"]


def stat(name: str, json: bool) -> None:
    """Print what a pool holds, who uses it, and every counter that is not zero (all of them as JSON)."""
    report = ask(name, "stat")
    if json:
        print(json_module.dumps(report, indent=2))
        return
    console = Console(markup=False)  # names are their owners', and may look like markup
    size, touched = report["size_bytes"] >> 20, report["touched_bytes"] >> 20
    console.print(f"{name}  {size} MiB at {report['path']}  ({touched} MiB ready, keeper {report['keeper_epoch']})")
    console.print(f"{report['blocks']} blocks, {report['granted']} slots granted")
    console.print(_table("Slots", report["classes"]))
    console.print(_table("Clients", report["clients"]))
    for who, counters in report["counters"].items():
        rows = [{"counter": key, "value": value} for key, value in counters.items() if value]
        console.print(_table(f"Counted by the {who}", rows))


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in rows[0] if rows else ("(none)",):
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    return table
