"""A disk tier's directory: who owns it, which spaces its rows speak of, how much was written, how much room is left.

Files that do not bear this tier's names are never touched. Does not cover slabs' content (`disk_slab.py`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
from pathlib import Path

import msgspec

from penstock.errors import NotOurs, TierUnavailable
from penstock.pool.locks import ByteLock
from penstock.tiers.base import BlockSpace
from penstock.tiers.disk_files import NotAFile, read_file
from penstock.tiers.disk_format import (
    FORMAT_VERSION,
    LOCK_NAME,
    MAGIC,
    SPACES_NAME,
    WEAR_NAME,
    SavedSpace,
    SpacesFile,
    parse_spaces,
    slab_of_name,
)

__all__ = ["Folder", "Geometry", "space_id"]

_SPACES_BYTES = 64 << 20
_WEAR_BYTES = 24
"""What is longer is not ours."""
SpaceId = tuple[bytes, bytes, int, int, int, int]


def space_id(space: BlockSpace) -> SpaceId:
    """All of a space but its label."""
    return (
        space.digest, space.root, space.block_bytes, space.block_tokens, space.n_segments, space.segment_bytes,
    )  # fmt: skip


class Geometry(msgspec.Struct, frozen=True):
    """How large the tier may become, in bytes."""

    size_bytes: int
    keep_free_bytes: int
    slab_bytes: int


class Folder:
    """The directory, owned until `close`.

    Raises TierUnavailable if another process owns it or it cannot be used, ConfigError if it is of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = _own(path)
        try:
            self._identity = _identity(path / LOCK_NAME)
            self.fresh, self._file = self._load()
            self.written_before = _load_wear(path / WEAR_NAME)
        except BaseException:
            self._lock.close()
            raise
        self._numbers = {space_id(each.space()): each.number for each in self._file.spaces}
        self._saving = threading.Lock()

    @property
    def salt(self) -> int:
        """What every rows file of this store bears."""
        return self._file.salt

    def spaces(self) -> dict[int, BlockSpace]:
        """Every space that has a number."""
        return {each.number: each.space() for each in self._file.spaces}

    def find(self, space: BlockSpace) -> int | None:
        """The space's number; None if no block of it was ever written here."""
        return self._numbers.get(space_id(space))

    def number(self, space: BlockSpace) -> int:
        """The space's number, given and synced now if it has none. Raises OSError."""
        known = self.find(space)
        if known is not None:
            return known
        with self._saving:
            known = self.find(space)
            if known is None:
                # Where the directory was replaced by another, that one's file is not ours.
                if not self.is_there():
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self.path))
                known = self._file.next_number
                spaces = [*self._file.spaces, SavedSpace.of(known, space)]
                self._save(SpacesFile(MAGIC, FORMAT_VERSION, self.salt, known + 1, spaces))
                self._numbers[space_id(space)] = known
        return known

    def keep_only(self, numbers: set[int]) -> None:
        """Forget the spaces that no row speaks of; their numbers are not given again. Raises OSError."""
        with self._saving:
            spaces = [each for each in self._file.spaces if each.number in numbers]
            if self.fresh or len(spaces) < len(self._file.spaces):
                self._save(SpacesFile(MAGIC, FORMAT_VERSION, self.salt, self._file.next_number, spaces))
                self.fresh = False
            self._numbers = {space_id(each.space()): each.number for each in spaces}

    def save_wear(self, written_bytes: int) -> None:
        """Remember how much was written to the device, ever. Not synced: a power loss may forget the last of it."""
        if not self.is_there():
            return
        with self._saving:
            _replace(self.path / WEAR_NAME, f"{written_bytes}\n".encode(), sync=False)

    def slabs(self) -> list[int]:
        """The slabs of which there is a file, ascending. Raises OSError."""
        numbers = {slab_of_name(name) for name in os.listdir(self.path)}
        return sorted(number for number in numbers if number is not None)

    def slab_statuses(self) -> list[os.stat_result]:
        """Of every slab's files. Raises OSError."""
        return [each.stat() for each in os.scandir(self.path) if slab_of_name(each.name) is not None]

    def free_bytes(self) -> int:
        """What the file system has left for this user. Raises OSError."""
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    def read_only(self) -> bool:
        """Whether the file system refuses writes. Raises OSError."""
        return bool(os.statvfs(self.path).f_flag & os.ST_RDONLY)

    def total_bytes(self) -> int:
        """How large the file system is. Raises OSError."""
        status = os.statvfs(self.path)
        return status.f_blocks * status.f_frsize

    def is_there(self) -> bool:
        """Whether the directory is still the one that was opened."""
        try:
            return _identity(self.path / LOCK_NAME) == self._identity
        except OSError:
            return False

    def close(self) -> None:
        """Let somebody else own it. Idempotent."""
        self._lock.close()

    def _load(self) -> tuple[bool, SpacesFile]:
        """(whether it has to be written, the spaces file). Raises OSError, ConfigError."""
        path = self.path / SPACES_NAME
        with contextlib.suppress(FileNotFoundError, NotAFile):
            found = parse_spaces(read_file(path, _SPACES_BYTES), str(self.path))
            if found is not None:
                return False, found
        return True, SpacesFile(MAGIC, FORMAT_VERSION, secrets.randbits(64), 1, [])

    def _save(self, file: SpacesFile) -> None:
        _replace(self.path / SPACES_NAME, msgspec.json.format(msgspec.json.encode(file)) + b"\n", sync=True)
        self._file = file


def _own(path: Path) -> ByteLock:
    try:
        lock = ByteLock(path / LOCK_NAME)
    except NotOurs as error:
        raise TierUnavailable(f"{path} belongs to another user; give this tier a directory of its own") from error
    except OSError as error:
        raise TierUnavailable(
            f"{path} cannot be used as a disk tier ({error.strerror}); create it, or give a directory that this user "
            "may write to"
        ) from error
    if not lock.try_acquire(0):
        lock.close()
        raise TierUnavailable(
            f"another process uses {path} as its disk tier; give each pool a directory of its own, or end the other one"
        )
    return lock


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _load_wear(path: Path) -> int:
    try:
        text = read_file(path, _WEAR_BYTES + 1).strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() and len(text) <= _WEAR_BYTES else 0


def _replace(path: Path, data: bytes, sync: bool) -> None:
    """Put `data` where `path` is, in one step; with `sync`, so that it is there after a power loss."""
    new = path.with_suffix(path.suffix + ".new")
    try:
        with open(new, "wb", opener=lambda name, flags: os.open(name, flags | os.O_CLOEXEC, 0o600)) as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(new, path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise
    if sync:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
