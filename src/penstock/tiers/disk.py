"""Blocks on a local disk: preallocated slab files in a directory of the user's choice.

    disk:/var/cache/penstock?size=64G&keep_free=8G&slab=64M&direct=auto

Each slab is a file of equal slots with a file of 64-byte rows beside it, one row for each slot. Fixed rows, rather than
an embedded database or a log: recovery is one vectorised pass over them, a block costs 64 bytes of index writes, and
there is nothing to compact. `docs/disk-format.md` says what is in the files.

What it promises: after `kill -9` a block is whole or gone. After a power loss the blocks that were written last may be
gone, or be found with wrong bytes that their root does not match; whoever reads a block checks its root. Space is
bounded by `size` and by `keep_free`, whichever says stop first; then the least recently used blocks leave, a chain's
tail first. Files of others in the directory are left alone.

This file has the options, opening, and what happens when the directory is lost: calls raise TierUnavailable until it is
back, and then begin with what is in it. The parts: `disk_store.py` (writing and reading), `disk_room.py` (which slabs),
`disk_index.py` and `disk_slots.py` (what is where), `disk_slab.py`, `disk_folder.py`, `disk_files.py`, `disk_format.py`
(the files), `disk_device.py` (system calls).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.config import parse_size
from penstock.errors import ConfigError, PenstockError, TierUnavailable
from penstock.tiers.base import Batch, BlockSpace, Keys, Tier, Usage
from penstock.tiers.disk_device import System
from penstock.tiers.disk_folder import Folder, Geometry
from penstock.tiers.disk_format import PAGE_BYTES, stride_of
from penstock.tiers.disk_store import Counts, Store
from penstock.tiers.registry import options_of
from penstock.types import WriteRule

__all__ = ["DEFAULT_WRITE", "Direct", "DiskOptions", "DiskTier", "open_tier"]

DEFAULT_WRITE = WriteRule.SECOND_USE
"""A disk wears: what is used once stays off it."""

_MAX_SLAB_BYTES = 64 << 20
_MIN_SLAB_BYTES = 64 << 10
_SLABS = 16
"""A small disk has at least that many slabs, so that strides can share it."""
_SIZE_SHARE = 0.5
_KEEP_FREE_SHARE = 0.05
_KEEP_FREE_BYTES = 1 << 30
_LOOK_S = 0.25
"""How often the directory is looked for: while it is used, and while it is gone."""
_CLOSE_S = 30.0
"""How long `close` waits for a device that does not answer; the files are closed whenever it does."""


class Direct(StrEnum):
    """Whether transfers go past the page cache."""

    AUTO = "auto"
    """Where the file system can."""
    YES = "yes"
    NO = "no"


class DiskOptions(msgspec.Struct, frozen=True):
    """Options of a disk tier's address. Sizes are as `parse_size` takes them; "" for the default."""

    size: str = ""
    """Bytes the tier's files may take; half of what is free when it is opened."""
    keep_free: str = ""
    """Bytes that stay free on the file system; 5% of it, at most 1 GiB. `0` for none."""
    slab: str = ""
    """Bytes of a slab file; 64 MiB, or a sixteenth of the size if that is less."""
    direct: Direct = Direct.AUTO


def open_tier(location: str, options: Mapping[str, str], name: str) -> DiskTier:
    """Open the directory `location`, made if it is not there.

    Raises ConfigError for options or a directory that cannot be used, TierUnavailable if another process uses it.
    """
    return DiskTier(Path(location), options_of(DiskOptions, options, "disk"), name)


class DiskTier(Tier):
    """A tier in a directory that this object owns until `close`. `system` is for tests that inject faults."""

    kind = "disk"
    local = True
    shared = False
    durable = True

    def __init__(
        self, path: Path, options: DiskOptions | None = None, name: str = "disk", *, system: System | None = None
    ) -> None:
        super().__init__(name)
        if not path.is_absolute():
            raise ConfigError(
                f"a disk tier's directory is given with its full path, as in disk:/var/cache/x, not {path}"
            )
        self._path = path
        self._options = options or DiskOptions()
        self._system = system or System()
        self._counts = Counts()
        self._gate = threading.Condition()
        """Guards what follows; never held during I/O."""
        self._calls: dict[Store, int] = {}
        """Calls that run, by the store they use; a store that was lost is closed by the last of them."""
        self._closing = 0
        """Stores that are being closed."""
        self._closed = False
        self._looking = threading.Lock()
        """Held by the call that looks for the directory; without the gate, since a device may not answer."""
        self._looked_at = time.monotonic()
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise TierUnavailable(
                f"{path} cannot be made ({error.strerror}); give a directory that this user may write to"
            ) from error
        self._store: Store | None = self._open()

    # ---- the interface

    def holds(self, space: BlockSpace, keys: Keys, deadline: float) -> npt.NDArray[np.bool_]:
        """See Tier."""
        with self._use() as store:
            return store.holds(space, keys)

    def write(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        """See Tier. May be held up by the device beyond the deadline."""
        with self._use() as store:
            return store.write(batch)

    def read(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        """See Tier. May be held up by the device beyond the deadline."""
        with self._use() as store:
            return store.read(batch)

    def remove(self, space: BlockSpace, keys: Keys, deadline: float) -> None:
        """See Tier."""
        with self._use() as store:
            store.remove(space, keys)

    def touch(self, space: BlockSpace, keys: Keys) -> None:
        """See Tier. Uses are written down later, many at once."""
        with self._use() as store:
            store.touch(space, keys)

    def usage(self) -> Usage:
        """See Tier; nothing is there while the directory is gone."""
        store = self._store
        return store.usage() if store is not None else Usage(0, 0, 0)

    def counters(self) -> dict[str, int]:
        """Bytes and failures since this object was made; evictions and slabs of the directory as it was opened last."""
        store = self._store
        return self._counts.as_dict() | (store.counters() if store is not None else {})

    def close(self) -> None:
        """Stop, after the calls that run; what is stored stays. Idempotent."""
        with self._gate:
            self._closed = True
            self._leave()
            self._gate.wait_for(lambda: not self._calls and not self._closing, _CLOSE_S)

    # ---- the directory comes and goes

    @contextmanager
    def _use(self) -> Iterator[Store]:
        """The store, for one call. Raises TierUnavailable if there is none."""
        self._look()
        with self._gate:
            store = self._present()
            self._calls[store] = self._calls.get(store, 0) + 1
        try:
            yield store
        finally:
            with self._gate:
                self._calls[store] -= 1
                if not self._calls[store]:
                    del self._calls[store]
                    if store is not self._store:
                        self._end(store)
                    self._gate.notify_all()

    def _look(self) -> None:
        """Now and then, and one call at a time: whether the directory is gone, or back. Raises TierUnavailable."""
        if self._closed or time.monotonic() - self._looked_at < _LOOK_S or not self._looking.acquire(blocking=False):
            return
        try:
            self._looked_at = time.monotonic()
            store = self._store
            if store is None and self._path.is_dir():
                self._take(self._reopen())
            elif store is not None and not store.folder.is_there():
                with self._gate:
                    self._leave()
        finally:
            self._looking.release()

    def _present(self) -> Store:
        if self._closed:
            raise TierUnavailable(f"the disk tier {self.name} is closed")
        if self._store is None:
            raise TierUnavailable(
                f"{self._path} is gone; the disk tier {self.name} begins anew when the directory is back"
            )
        return self._store

    def _take(self, store: Store) -> None:
        with self._gate:
            self._store = store
            if self._closed:
                self._leave()

    def _leave(self) -> None:
        """Use the store no longer; it is closed once no call uses it. The gate is held."""
        store, self._store = self._store, None
        if store is not None and store not in self._calls:
            self._end(store)

    def _end(self, store: Store) -> None:
        """Close a store that no call uses, in a thread of its own: the device may not answer. The gate is held."""
        self._closing += 1
        try:
            threading.Thread(target=self._close_store, args=(store,), name="penstock-disk-close", daemon=True).start()
        except RuntimeError:
            # The interpreter is ending, or there are too many threads.
            self._close_store(store)

    def _close_store(self, store: Store) -> None:
        try:
            store.close()
        finally:
            with self._gate:
                self._closing -= 1
                self._gate.notify_all()

    def _reopen(self) -> Store:
        try:
            store = self._open()
        except ConfigError as error:
            raise TierUnavailable(str(error)) from error
        self._counts.reopened += 1
        return store

    def _open(self) -> Store:
        try:
            folder = Folder(self._path)
        except OSError as error:
            raise TierUnavailable(f"{self._path} cannot be read: {error.strerror}") from error
        try:
            direct = _direct(self._options.direct, self._path)
            return Store(folder, _geometry(self._options, folder), direct, self._system, self._counts)
        except OSError as error:
            folder.close()
            raise TierUnavailable(f"{self._path} cannot be used as a disk tier: {error.strerror}") from error
        except PenstockError:
            folder.close()
            raise


def _geometry(options: DiskOptions, folder: Folder) -> Geometry:
    """Raises ConfigError for sizes that cannot be, OSError."""
    if options.size:
        size = parse_size(options.size)
    else:
        size = int((folder.free_bytes() + _taken_bytes(folder)) * _SIZE_SHARE)
    if options.keep_free:
        keep_free = 0 if options.keep_free == "0" else parse_size(options.keep_free)
    else:
        keep_free = min(int(folder.total_bytes() * _KEEP_FREE_SHARE), _KEEP_FREE_BYTES)
    if options.slab:
        slab = stride_of(parse_size(options.slab))
    else:
        slab = max(_MIN_SLAB_BYTES, min(_MAX_SLAB_BYTES, 1 << max(0, (size // _SLABS).bit_length() - 1)))
    if size < slab + 2 * PAGE_BYTES:
        raise ConfigError(
            f"a disk tier of {size} bytes in {folder.path} cannot hold a slab of {slab}; give a larger size= or a "
            "smaller slab="
        )
    return Geometry(size, keep_free, slab)


def _taken_bytes(folder: Folder) -> int:
    """What the slabs that are there take: it counts as free when the default size is chosen again."""
    return sum(status.st_blocks * 512 for status in folder.slab_statuses())


def _direct(wish: Direct, path: Path) -> bool:
    """Whether to use O_DIRECT. Raises ConfigError where it is asked for and the file system cannot."""
    if wish is Direct.NO:
        return False
    probe = path / f"penstock.probe-{os.getpid()}"
    try:
        fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if wish is Direct.YES:
            raise ConfigError(
                f"{path} is on a file system without O_DIRECT ({error.strerror}); use direct=auto, or a directory on "
                "another file system"
            ) from error
        return False
    finally:
        probe.unlink(missing_ok=True)
    os.close(fd)
    return True
