"""The profile of a machine's tiers: what one access costs, measured by `penstock probe`, and its file.

Covers the records, reading and writing. Does not cover measuring and fitting (`bench/probe/`) or what is decided by the
numbers. Light: imports the standard library and msgspec, so that every layer may ask it.
"""

from __future__ import annotations

import os
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from penstock.errors import ConfigError

__all__ = [
    "Direction",
    "LeftOut",
    "Model",
    "Point",
    "Profile",
    "TierProfile",
    "load_profile",
    "profile_path",
    "save_profile",
]

PROFILE_VERSION = 1
_REMEDY = "measure this machine with `penstock probe`"


class Direction(StrEnum):
    """What was timed."""

    READ = "read"
    WRITE = "write"
    COPY = "copy"
    """Within the tier, or from it into ordinary memory, by one thread, with the pool's copy loop."""
    COPYTO = "copyto"
    """The same by `np.copyto`, its call included."""
    HOLDS = "holds"
    """Asking whether a block is there."""
    TO_DEVICE = "to-device"
    """From pinned host memory to a GPU's."""
    FROM_DEVICE = "from-device"


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One size in one direction. Latency is of one access, alone; bandwidth of `batch` accesses in one call."""

    direction: Direction
    size_bytes: int
    latency_us_p50: float
    latency_us_p99: float
    gb_s: float | None
    """10**9 bytes a second; None where no bytes move (`holds`)."""
    samples: int
    """How many times it was timed."""
    batch: int = 1


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`latency_s + bytes / bytes_per_s`, the seconds that one call takes that moves so many bytes.

    Fitted to every size by least squares of the logarithms, so that each size counts by how wrong it is in proportion.
    """

    direction: Direction
    latency_s: float
    bytes_per_s: float | None
    """None where no bytes move."""
    typical_error: float
    """Root mean square of the error, as a factor less one: 0.1 means that 10% more or less is usual."""
    worst_error: float
    """The same of the point that fits worst."""

    def seconds(self, n_bytes: int) -> float:
        """What one call takes, in the middle."""
        return self.latency_s + (n_bytes / self.bytes_per_s if self.bytes_per_s else 0.0)


class TierProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured of one tier."""

    name: str
    """`memory:node0`, `dax:/dev/dax0.0`, `dir:/dev/shm`, `gpu:0`, or a tier's address without its options."""
    kind: str
    """The part of the name before the colon."""
    models: list[Model]
    points: list[Point]
    notes: list[str] = []
    """What a reader of the numbers must know: that the page cache was measured, that a size was left out."""

    def model(self, direction: Direction) -> Model | None:
        """The model of one direction, None if it was not measured."""
        return next((model for model in self.models if model.direction == direction), None)


class LeftOut(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tier that was not measured, and why."""

    name: str
    why: str


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A machine's tiers. `machine` is what `bench/machine.py` says of it."""

    made_at: str
    """ISO 8601, UTC."""
    machine: dict[str, Any]
    tiers: list[TierProfile]
    left_out: list[LeftOut] = []
    version: int = PROFILE_VERSION

    def tier(self, name: str) -> TierProfile | None:
        """The tier of that name, None if it was not measured."""
        return next((tier for tier in self.tiers if tier.name == name), None)


class _Header(msgspec.Struct):
    version: int


def profile_path() -> Path:
    """`profile.json` in $PENSTOCK_CACHE_DIR, else in `penstock` of $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("PENSTOCK_CACHE_DIR")
    if own:
        return Path(own) / "profile.json"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "penstock" / "profile.json"


def load_profile(path: Path | None = None) -> Profile:
    """Read a profile; None reads the user's. Raises ConfigError if there is none that this version can read."""
    where = path or profile_path()
    try:
        text = where.read_bytes()
    except OSError as error:
        raise ConfigError(f"no profile at {where} ({error.strerror}); {_REMEDY}") from error
    try:
        version = msgspec.json.decode(text, type=_Header).version
        if version != PROFILE_VERSION:
            raise ConfigError(f"{where} has version {version}, not {PROFILE_VERSION}; {_REMEDY} again")
        return msgspec.json.decode(text, type=Profile)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{where} is no profile ({error}); {_REMEDY} again") from error


def save_profile(profile: Profile, path: Path | None = None) -> Path:
    """Write a profile, whole or not at all; None writes the user's. Returns where. Raises ConfigError if it cannot."""
    where = path or profile_path()
    text = msgspec.json.format(msgspec.json.encode(profile), indent=2)
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: two that probe at once must not write into one file.
        with tempfile.NamedTemporaryFile(dir=where.parent, prefix=f".{where.name}-", delete=False) as file:
            try:
                file.write(text + b"\n")
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, where)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise ConfigError(f"the profile cannot be written to {where} ({error.strerror}); give another --out") from error
    return where
