"""`penstock tiers`."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from penstock.bench.probe.table import shown_rate, shown_seconds
from penstock.cli.ask import ask_mover

__all__ = ["render", "tiers"]

_FILE_WIDTH = 120
_ALARMING = ("absent_after", "checksum", "corrupt", "damaged", "died", "error", "fail", "lost", "refused", "timeout",
             "torn", "unavailable", "wrong")  # fmt: skip
"""Parts of a counter's name that make it stand out: nobody should have to look for these."""
_QUEUE = {"fetch_bytes": "fetch", "prefetch_bytes": "prefetch", "write_back_bytes": "write-back"}
_NBSP = "\N{NO-BREAK SPACE}"
_FULL = 0.95


def tiers(name: str, json: bool) -> None:
    """Print what is below a pool: capacity, use, speed, queue and counters of each tier (all of it as JSON)."""
    report = ask_mover(name)
    if json:
        print(json_module.dumps(report, indent=2))
        return
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    for part in render(report):
        console.print(part, highlight=False)


def render(report: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What to print of a mover's report, at any width from 80. Counters that are zero are left out."""
    yield _mover_line(report.get("mover"), len(report["tiers"]))
    if report["tiers"]:
        yield _overview(report["tiers"])
    for tier in report["tiers"]:
        yield from _details(tier)
    for what in ("fetches", "orders"):
        counted = _counters(report.get(what) or {})
        if counted:
            yield Text(what, "bold")
            yield _indented(counted)


def _mover_line(mover: Mapping[str, Any] | None, n_tiers: int) -> Text:
    count = f"{n_tiers} tier{'' if n_tiers == 1 else 's'}"
    if not n_tiers:
        return Text("no tiers below this pool; start it with `penstock serve --tier ADDRESS`")
    if not mover or not mover.get("pid"):
        return Text.assemble(f"{count}, ", ("what moves their blocks is not running", "bold red"))
    line = Text(f"{count}, mover {mover['pid']}, running for {_duration(mover['uptime_s'])}")
    if mover["restarts"]:
        line.append(f", restarted {mover['restarts']} times", "yellow")
    return line


def _overview(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("tier", overflow="fold")
    for column in ("used", "of", "blocks", "latency", "bandwidth", "waiting"):
        table.add_column(column, justify="right", no_wrap=True)
    for tier in rows:
        state = Text(tier["name"], "bold") if tier["up"] else Text(f"DOWN {tier['name']}", "bold red")
        about = "" if tier["measured"] else "~"
        waiting = sum(tier["queue"][kind] for kind in _QUEUE)
        table.add_row(
            state, _used(tier), _bytes(tier["capacity_bytes"]), _number(tier["blocks"]),
            about + shown_seconds(tier["latency_s"]), about + shown_rate(tier["bytes_per_s"] / 1e9),
            _bytes(waiting) if waiting else "",
        )  # fmt: skip
    if not all(tier["measured"] for tier in rows):
        table.caption, table.caption_justify = "~ assumed until enough was moved to tell", "left"
    return table


def _used(tier: Mapping[str, Any]) -> Text:
    used, capacity = tier["used_bytes"], tier["capacity_bytes"]
    if used is None or not capacity:
        return Text(_bytes(used))
    share = used / capacity
    return Text(f"{_bytes(used)} {100 * share:3.0f}%", "yellow" if share >= _FULL else "")


def _details(tier: Mapping[str, Any]) -> Iterator[RenderableType]:
    where = f"{tier['scheme']}:{tier['location']}, write={tier['write']}"
    yield Text.assemble((tier["name"], "bold" if tier["up"] else "bold red"), f"  {where}")
    if not tier["up"]:
        yield _indented(Text(f"down: {tier['why'] or 'it does not say why'}", "red"))
    queue = tier["queue"]
    parts = [f"{label}{_NBSP}{_bytes(queue[kind])}" for kind, label in _QUEUE.items() if queue[kind]]
    if queue["running"]:
        parts.append(f"{queue['running']}{_NBSP}running")
    if parts:
        yield _indented(Text("queue: " + "  ".join(parts)))
    counted = _counters(tier["counters"])
    if counted:
        yield _indented(counted)


def _counters(counters: Mapping[str, int]) -> Text:
    """Those that are not zero, what went wrong first and in colour."""
    rows = sorted(((name, n) for name, n in counters.items() if n), key=lambda row: not _alarming(row[0]))
    pieces: list[tuple[str, str]] = []
    for name, n in rows:
        value = _bytes(n) if name.endswith("bytes") or "bytes_" in name else f"{n:,}"
        pieces.append((f"{name}{_NBSP}{value}", "bold red" if _alarming(name) else ""))
    return Text("  ").join(Text(piece, style) for piece, style in pieces)


def _alarming(name: str) -> bool:
    return any(part in name.lower() for part in _ALARMING)


def _indented(text: Text) -> Padding:
    return Padding(text, (0, 0, 0, 2))


def _bytes(n: int | None) -> str:
    """At most four digits: 12.3 GiB; "?" where nobody knows."""
    if n is None:
        return "?"
    value, unit = float(n), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1023.5:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f}{_NBSP}{unit}" if value >= 99.95 else f"{value:.3g}{_NBSP}{unit}"


def _number(n: int | None) -> str:
    return "?" if n is None else f"{n:,}"


def _duration(seconds: float) -> str:
    """The two largest units: 3 d 4 h, 5 min 6 s, 7 s."""
    left = int(seconds)
    parts: list[str] = []
    for unit, factor in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, factor)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])
