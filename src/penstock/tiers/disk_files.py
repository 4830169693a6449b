"""Opening files of a directory in which anything may bear a name that this tier uses: only regular files are opened."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

__all__ = ["NotAFile", "open_file", "read_file"]


class NotAFile(OSError):
    """There is something else under the name."""


def open_file(path: Path, flags: int) -> int:
    """As os.open, for a regular file. Raises OSError, NotAFile at once where the name is a pipe's or a device's."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise NotAFile(errno.EINVAL, "not a regular file", str(path))
        os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_file(path: Path, most: int) -> bytes:
    """A file's content, of a longer one the first `most` bytes. Raises OSError."""
    with open(open_file(path, os.O_RDONLY), "rb") as file:
        return file.read(most)
