"""A profile for people: one table per tier, one row per size."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from penstock.profile import Direction, Model, Point, Profile, TierProfile

__all__ = ["as_tables", "shown_rate", "shown_seconds", "shown_size"]

# What a column of sizes, and the three of a direction, take at most.
_SIZE_WIDTH, _DIRECTION_WIDTH = 11, 34


def as_tables(profile: Profile, width: int) -> Iterator[Table | Text]:
    """What to print, at most `width` (80 or more) wide: tables with the models below each, then what was left out."""
    for tier in profile.tiers:
        yield Text(tier.name, style="bold")
        abreast = max(1, (width - _SIZE_WIDTH) // _DIRECTION_WIDTH)
        for first in range(0, len(tier.models), abreast):
            yield _table(tier, [model.direction for model in tier.models[first : first + abreast]])
        yield Text("\n".join([*(f"  {_said(model)}" for model in tier.models), *(f"  {n}" for n in tier.notes)]) + "\n")
    for each in profile.left_out:
        yield Text(f"{each.name}: left out. {each.why}", style="yellow")


def shown_size(n_bytes: int) -> str:
    """64 B, 4 KiB, 64 MiB."""
    for unit, factor in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.4g} {unit}"
    return f"{n_bytes} B"


def shown_seconds(seconds: float) -> str:
    """Three digits with the unit that suits: 81 ns, 12.5 us, 4.2 ms, 1.3 s."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= factor:
            return f"{_digits(seconds / factor)} {unit}"
    return f"{_digits(seconds * 1e9)} ns"


def shown_rate(gb_s: float) -> str:
    """Three digits in GB/s, MB/s or kB/s."""
    for unit, factor in (("GB/s", 1.0), ("MB/s", 1e-3)):
        if gb_s >= factor:
            return f"{_digits(gb_s / factor)} {unit}"
    return f"{_digits(gb_s * 1e6)} kB/s"


def _table(tier: TierProfile, directions: list[Direction]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("size", justify="right", no_wrap=True)
    for direction in directions:
        for column in ("median", "p99", *([] if direction is Direction.HOLDS else ["rate"])):
            table.add_column(f"{direction}\n{column}", justify="right", no_wrap=True)
    cells = {(point.size_bytes, point.direction): point for point in tier.points}
    for size in sorted({point.size_bytes for point in tier.points}):
        row = [shown_size(size)]
        for direction in directions:
            row += _cells(direction, cells.get((size, direction)))
        table.add_row(*row)
    return table


def _cells(direction: Direction, point: Point | None) -> list[str]:
    if point is None:
        return ["", ""] if direction is Direction.HOLDS else ["", "", ""]
    times = [shown_seconds(point.latency_us_p50 / 1e6), shown_seconds(point.latency_us_p99 / 1e6)]
    return times if direction is Direction.HOLDS else [*times, shown_rate(point.gb_s or 0.0)]


def _said(model: Model) -> str:
    rate = f" + bytes / {shown_rate(model.bytes_per_s / 1e9)}" if model.bytes_per_s else ""
    off = f"±{100 * model.typical_error:.0f}%, at worst {100 * model.worst_error:.0f}%"
    return f"{model.direction}: {shown_seconds(model.latency_s)}{rate}  ({off})"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
