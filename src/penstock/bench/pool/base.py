"""What the benches share: their sizes, and what a group of them is."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module

from penstock.bench.report import Goal, Result
from penstock.errors import ConfigError

__all__ = ["FULL", "GROUPS", "SCALES", "TINY", "Group", "Scale", "goals", "measure", "print_group", "select"]

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured. `FULL` is what targets are set for; `TINY` only shows that the benches run."""

    name: str
    blocks: int
    """Resident blocks where lookups, commits and the brain are measured."""
    copy_pool_bytes: int
    """Grants made ahead are a sixteenth of it: room for two batches of 64 blocks of 2 MiB."""
    memcpy_bytes: int
    """The piece that `memcpy` copies; reads and writes move as much for each pair."""
    tensor_bytes: int
    """The engine's tensors."""
    pairs: int
    """Interleaved pairs (rounds) of a ratio."""
    windows: int
    """Repeated windows of a percentile or a rate."""
    calls: int
    """Calls in a window."""
    window_s: float
    held_leases: int
    """What each of eight clients holds while commits evict."""
    imports: int


FULL = Scale("full", 1_000_000, 4 * GIB + 768 * MIB, GIB, 512 * MIB, 25, 25, 8000, 0.3, 10_000, 15)
TINY = Scale("tiny", 4096, 640 * MIB, 4 * MIB, 8 * MIB, 3, 3, 40, 0.05, 256, 2)
SCALES = {scale.name: scale for scale in (FULL, TINY)}


@dataclass(frozen=True, slots=True)
class Group:
    """Measurements that share a set-up: a module with `run(group, scale)`, which yields one result per goal."""

    module: str
    goals: tuple[Goal, ...]
    option: str = ""
    timeout_s: float = 120.0

    def goal(self, name: str) -> Goal:
        return next(goal for goal in self.goals if goal.name == name)


GROUPS = {
    "matching": Group(
        "matching",
        (
            Goal("match64_us_p50", "us", 4, at_most=True),
            Goal("match64_us_p99", "us", 20, at_most=True),
            Goal("match1_us_p50", "us", 2, at_most=True),
        ),
    ),
    "copy-2mib": Group(
        "copying",
        (Goal("read_2mib_of_memcpy", "ratio", 0.90), Goal("write_2mib_of_memcpy", "ratio", 0.75)),
        "2mib",
    ),
    "copy-64kib": Group(
        "copying",
        (
            Goal("read_64kib_of_memcpy", "ratio", 0.80),
            Goal("verified_read_64kib_of_memcpy", "ratio", 0.72),
            Goal("write_64kib_of_memcpy", "ratio", 0.70),
        ),
        "64kib",
    ),
    "intake": Group(
        "intake",
        (Goal("commits_per_s", "1/s", 1_000_000), Goal("commits_per_s_full", "1/s", 300_000)),
    ),
    "visibility": Group("visibility", (Goal("commit_to_visible_us_p99", "us", 500, at_most=True),)),
    "hashing": Group("hashing", (Goal("hash_keys_per_s", "1/s", 3_000_000),)),
    "scaling": Group("scaling", (Goal("two_readers_scaling", "ratio", 0.9),)),
    "brain": Group("brain", (Goal("brain_us_per_event", "us", 1, at_most=True),)),
    "idle": Group("idle", (Goal("keeper_idle_cpu_pct", "%", 1, at_most=True), Goal("clients_idle_cpu_pct", "%"))),
    "imports": Group(
        "imports", (Goal("import_s", "s", 0.6, at_most=True), Goal("import_and_open_s", "s", at_most=True))
    ),
}


def goals(groups: Mapping[str, Group] = GROUPS) -> list[Goal]:
    """Every goal, in the order of the table."""
    return [goal for group in groups.values() for goal in group.goals]


def select(only: str | None, groups: Mapping[str, Group] = GROUPS) -> dict[str, Group]:
    """The groups to run: all, or the one that is called `only` or measures it. Raises ConfigError for neither."""
    if only is None:
        return dict(groups)
    found = {name: group for name, group in groups.items() if only in (name, *(goal.name for goal in group.goals))}
    if not found:
        raise ConfigError(f"no bench is called {only!r}; there are: {', '.join(goal.name for goal in goals(groups))}")
    return found


def measure(group: Group, scale: Scale, package: str = "penstock.bench.pool") -> Iterator[Result]:
    """Run a group in this process. Results come as they are measured."""
    run: Callable[[Group, Scale], Iterator[Result]] = import_module(f"{package}.{group.module}").run
    yield from run(group, scale)


def print_group(groups: Mapping[str, Group], package: str, name: str, scale: str) -> None:
    """One group in a process of its own: prints a line of JSON for each result."""
    # A runtime folder of its own: a bench's pools are not seen among the user's, and leave nothing behind.
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder
        for result in measure(groups[name], SCALES[scale], package):
            print(json.dumps(asdict(result)), flush=True)
