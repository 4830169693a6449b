"""Proof of life: OFD locks on single bytes of a pool's lock file.

Such a lock belongs to an open file, not to a process: it outlives nothing, survives the keeper, holds while its owner
is stopped, works across pid namespaces, and the kernel drops it when the last descriptor goes, however the owner died.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from pathlib import Path

from penstock.errors import NotOurs

KEEPER_BYTE = 0
FIRST_LANE_BYTE = 1

# struct flock: type, whence, start, length, pid, with the compiler's padding.
_FLOCK = "hhqqi"


class ByteLock:
    """An open lock file on which single bytes can be held. Close-on-exec; a forked child must call `abandon`."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if os.fstat(self._fd).st_uid != os.geteuid():
            self.close()
            raise NotOurs(f"{path} belongs to another user; choose another --name or --path")

    def try_acquire(self, byte: int) -> bool:
        """Take the byte if nobody else holds it; never waits."""
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
        except (BlockingIOError, PermissionError):
            return False
        return True

    def held_by_other(self, byte: int) -> bool:
        """Whether some other open file holds the byte: its owner is alive (or stopped)."""
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, asked)
        return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)

    def close(self) -> None:
        """Let go of every byte held through this file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        # A client that forgot its pool without closing it would keep its lane for ever.
        with contextlib.suppress(AttributeError, TypeError):
            self.close()

    # In a forked child the descriptor shares the parent's locks; closing it there leaves them with the parent.
    abandon = close
