"""`file:/mnt/nfs/penstock`: a directory of objects that machines share, on NFS or another network file system.

For a disk of one machine use `disk:`, which is far quicker and bounded. A write is a temporary file (`#` and a number
behind its name) and a rename; one that a killed process left behind is never read and may be deleted. Nobody deletes
what is old.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec

from penstock.errors import ConfigError, TierUnavailable
from penstock.tiers.base import Tier
from penstock.tiers.objects import ObjectTier, Place, import_obstore
from penstock.tiers.objects_errors import Judge
from penstock.tiers.objects_options import check_parallel
from penstock.tiers.registry import options_of
from penstock.types import WriteRule

__all__ = ["DEFAULT_WRITE", "FileOptions", "open_tier"]

DEFAULT_WRITE = WriteRule.SECOND_USE


class FileOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a `file:` address."""

    parallel: int = 8
    """Requests at once."""


def open_tier(location: str, options: dict[str, str], name: str) -> Tier:
    """The tier of a directory, which has to exist. Raises ConfigError."""
    chosen = options_of(FileOptions, options, "file")
    parallel = check_parallel(chosen.parallel, "file")
    if not os.path.isabs(location) or not os.path.isdir(location):
        raise ConfigError(f"file tier: {location!r} is not the absolute path of a directory: create or mount it")
    import_obstore()
    from obstore.store import LocalStore

    judge = Judge(location, False, {"access": f"let this user write to {location}"})
    place = Place("file", LocalStore(location), judge, _same_directory(location))
    return ObjectTier(name, place, parallel)


def _same_directory(location: str) -> Callable[[], None]:
    # A network file system that was unmounted leaves an empty directory of the local disk, which must not fill up.
    opened = _identity(location)

    def check() -> None:
        if _identity(location) != opened:
            raise TierUnavailable(f"{location} is no longer the directory that was opened: mount it, then restart")

    return check


def _identity(location: str) -> tuple[int, int] | None:
    try:
        status = os.stat(location)
    except OSError:
        return None
    return status.st_dev, status.st_ino
