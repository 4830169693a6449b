"""A disk tier that does what a file says, in a mover that knows it: `harmed:/x/disk?...`, and beside it `disk.harm`.

The file is a JSON object from a method's name to what its calls do: a `FaultKind` of `penstock.tiers.wrap`, "stand"
(stand still, whatever the deadline, for as long as the file says so), or "defect" (raise what no tier may raise).
`python -m tests.faults.harmed` is the mover that `jumping` or `harming` make a keeper start.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from penstock.runtime import mover_child
from penstock.runtime import serve as serving
from penstock.runtime.mover import feed
from penstock.tiers import disk
from penstock.tiers.disk import DEFAULT_WRITE
from penstock.tiers.registry import register
from penstock.tiers.wrap import Fault, FaultKind, Faulty

__all__ = ["DEFAULT_WRITE", "SECRET", "harming", "jumping", "open_tier", "quickly", "said"]

SECRET = "hunter2-0451"
"""What a defect's text holds."""
_JUMPY = "PENSTOCK_TEST_JUMPY_CLOCK"

register("harmed", "tests.faults.harmed")


def open_tier(location: str, options: Mapping[str, str], name: str) -> Faulty:
    """The disk tier of this directory, harmed as its file says."""
    control = Path(location + ".harm")

    def plan(call: str, nth: int) -> Fault | None:
        kind = _asked(control).get(call)
        if kind == "defect":
            raise ValueError(f"the password is {SECRET}")
        while kind == "stand":
            time.sleep(0.005)
            kind = _asked(control).get(call)
        return None if kind is None else Fault(FaultKind(kind), bit=9_001)

    return Faulty(disk.open_tier(location, options, name), plan)


def _asked(control: Path) -> dict[str, str]:
    try:
        asked: dict[str, str] = json.loads(control.read_text())
    except FileNotFoundError:
        return {}
    return asked


@contextlib.contextmanager
def said(location: Path, **harm: str) -> Iterator[None]:
    """The tier in this directory does that, meanwhile."""
    control = Path(f"{location}.harm")
    written = control.with_suffix(".new")
    written.write_text(json.dumps(harm))
    written.rename(control)
    try:
        yield
    finally:
        control.unlink(missing_ok=True)


# ---- for `Keeper.start`: what a keeper's process does first


def harming() -> None:
    """Its mover knows this tier, and is told things through a socket that holds little."""
    mover_child.PROGRAM = "tests.faults.harmed"
    feed.BUFFER_BYTES = 32 << 10


def quickly() -> None:
    """It starts a mover that died again at once."""
    mover_child.FIRST_PAUSE_S = mover_child.LONGEST_PAUSE_S = 0.01
    serving.TICK_S = 0.02


def jumping() -> None:
    """The wall clock jumps by years, back and forth, at every look, here and in its mover."""
    harming()
    os.environ[_JUMPY] = "1"
    _jump()


def _jump() -> None:
    now, dice = time.time_ns(), random.Random(5)

    def time_ns() -> int:
        return max(1, now + dice.randrange(-20, 20) * 365 * 86400 * 10**9)

    time.time_ns = time_ns
    time.time = lambda: time_ns() / 1e9


if __name__ == "__main__":
    from penstock.runtime.mover.process import main

    if os.environ.get(_JUMPY):
        _jump()
    sys.exit(main(sys.argv[1:]))
