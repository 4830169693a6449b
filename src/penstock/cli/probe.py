"""`penstock probe`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from penstock.bench.probe.base import Plan, Subject
from penstock.bench.probe.memory import last_level_cache_bytes
from penstock.bench.probe.plot import check_plot, write_plot
from penstock.bench.probe.runner import measure, points_to_take, share_of_time
from penstock.bench.probe.table import as_tables
from penstock.bench.probe.targets import default_folders, machine_subjects, named_subjects
from penstock.config import parse_size
from penstock.errors import ConfigError
from penstock.profile import Profile, save_profile

__all__ = ["probe"]

_SIZES = tuple(4**power for power in range(3, 14))  # 64 B to 64 MiB
_QUICK_SIZES = (4 << 10, 64 << 10, 1 << 20)
_TOTAL_S = 60.0
_QUICK_S = 2.0
_LARGEST = 1 << 30
_FILE_WIDTH = 120


def probe(
    folders: Sequence[Path], tiers: Sequence[str], *, sizes: str, point_s: float | None, out: Path | None, json: bool,
    plot: Path | None, quick: bool,
) -> None:  # fmt: skip
    """Measure, write the profile, show it. Exit status 1 when something that was named could not be measured."""
    if plot is not None:
        check_plot(plot)
    named = named_subjects(folders, tiers)
    subjects = machine_subjects() + (named if folders else named_subjects(default_folders(), []) + named)
    wanted = _sizes(sizes) if sizes else _QUICK_SIZES if quick else _SIZES
    share = share_of_time(_QUICK_S if quick else _TOTAL_S, points_to_take(subjects, wanted))
    plan = Plan(wanted, share if point_s is None else point_s, last_level_cache_bytes())
    profile = _run(subjects, plan)
    _show(profile, json)  # first: what was measured is to be seen even where it cannot be written
    where = save_profile(profile, out)
    if plot is not None:
        write_plot(profile, plot)
    Console(stderr=True, soft_wrap=True).print(f"written to {where}", markup=False, highlight=False)
    missed = {each.name for each in profile.left_out} & {subject.name for subject in named}
    raise typer.Exit(1 if missed else 0)


def _show(profile: Profile, json: bool) -> None:
    if json:
        print(msgspec.json.format(msgspec.json.encode(profile), indent=2).decode())
        return
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    for part in as_tables(profile, console.width):
        console.print(part, highlight=False)


def _sizes(text: str) -> tuple[int, ...]:
    """ "64,4K,1M" in ascending order. Raises ConfigError."""
    sizes = tuple(sorted({parse_size(part) for part in text.split(",")}))
    for size in sizes:
        if size % 64 or size > _LARGEST:
            raise ConfigError(f"size {size}: multiples of 64 bytes up to {_LARGEST >> 30} GiB can be measured")
    return sizes


def _run(subjects: Sequence[Subject], plan: Plan) -> Profile:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    # Redrawn rarely: the bar must not take time from what is measured.
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=1, transient=True) as progress:
        task = progress.add_task("", total=points_to_take(subjects, plan.sizes))
        return measure(subjects, plan, lambda name, n: progress.update(task, description=name, completed=n))
