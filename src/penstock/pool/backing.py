"""What a segment's file is: an ordinary one, one on hugetlbfs, or a DAX device; and what can be done with each.

hugetlbfs and DAX devices map in large pages only, at offsets that are multiples of them, and take no `write`; a device
has a size of its own and needs no allocation. Covers sizes, alignments, and reading and writing a file's start. The
mappings themselves are `huge.py`.
"""

from __future__ import annotations

import ctypes
import os
import stat
from pathlib import Path

from penstock.errors import ConfigError
from penstock.pool.layout import PAGE

__all__ = ["alignment_of", "free_bytes", "is_device", "size_of"]

_HUGETLBFS_MAGIC = 0x958458F6
_HUGE_PAGES = Path("/sys/kernel/mm/hugepages")
_DEVICES = Path("/sys/dev/char")

_libc = ctypes.CDLL(None, use_errno=True)


def is_device(fd: int) -> bool:
    """Whether this is a character device (the only ones that can be used are DAX devices)."""
    return stat.S_ISCHR(os.fstat(fd).st_mode)


def size_of(fd: int) -> int:
    """Bytes of a file or a DAX device. Raises ConfigError for other devices."""
    return _attribute(fd, "size") if is_device(fd) else os.fstat(fd).st_size


def alignment_of(fd: int) -> int:
    """What offsets and sizes of mappings must be multiples of. Raises ConfigError for devices other than DAX."""
    if is_device(fd):
        return _attribute(fd, "align")
    return _huge_page_bytes(fd) or PAGE


def free_bytes(folder: Path) -> int:
    """Bytes that the file system of a folder can still take."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        page = _huge_page_bytes(fd)
        status = os.fstatvfs(fd)
    finally:
        os.close(fd)
    if not page:
        return status.f_bavail * status.f_frsize
    # A mount without a limit of its own says nothing: what it can have is what the system has left.
    free = int((_HUGE_PAGES / f"hugepages-{page >> 10}kB" / "free_hugepages").read_text()) * page
    return min(free, status.f_bavail * page) if status.f_blocks else free


def _huge_page_bytes(fd: int) -> int:
    """The page size of a hugetlbfs file or folder; 0 for every other file system."""
    status = (ctypes.c_long * 32)()  # struct statfs: f_type and f_bsize are the first two
    if _libc.fstatfs(fd, status):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(status[1]) if status[0] == _HUGETLBFS_MAGIC else 0


def _attribute(fd: int, name: str) -> int:
    number = os.fstat(fd).st_rdev
    folder = _DEVICES / f"{os.major(number)}:{os.minor(number)}"
    if (folder / "subsystem").resolve().name != "dax":
        raise ConfigError("this device is not a DAX device; give a file, a path on hugetlbfs, or a /dev/dax*")
    return int((folder / name).read_text())
