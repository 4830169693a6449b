"""Mappings that huge pages fit into, and memory that is made of them.

Each page of 4 KiB costs a copy or a lookup in a large pool a walk through the page tables, each new one a fault; pages
of 2 MiB spare nearly all of that. tmpfs gives them to nobody by itself (`shmem_enabled` is mostly `never`), but
MADV_COLLAPSE (Linux 6.1) makes them, and whoever maps them later has them too, if address and offset agree modulo
2 MiB. Where the system refuses, everything works as before, a little slower.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os

from penstock.pool.backing import alignment_of, is_device
from penstock.pool.layout import HUGE_PAGE, PAGE

__all__ = ["allocate", "map_for_huge_pages"]

_MADV_COLLAPSE = 25
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)


def map_for_huge_pages(fd: int, offset: int, size: int, *, writable: bool) -> tuple[mmap.mmap, int]:
    """Map a range of a file, shared. Returns the object that owns the mapping, and where in it the range starts.

    Python's mmap takes no address: a larger private range is reserved with it, and the file is mapped over a part of
    that. Where a file maps in large pages only, what lies around the range in those is mapped with it. Raises OSError.
    The object's buffer is writable even where the range is not.
    """
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    page = alignment_of(fd)
    first, stop = offset // page * page, -(-(offset + size) // page) * page
    step = max(HUGE_PAGE, page)
    room = mmap.mmap(-1, stop - first + step, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(room))
    skip = (first - base) % step
    if _libc.mmap(base + skip, stop - first, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, first) == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return room, skip + offset - first


def allocate(fd: int, start: int, size: int) -> None:
    """Allocate and touch a page-aligned range of a file, in huge pages where they can be had.

    Raises OSError where the file system has no room; nobody is killed by a SIGBUS. What the range holds stays. A
    device's memory is there already.
    """
    if is_device(fd):
        return
    # One page of each huge page must be there to make one of it; the rest is then never allocated one by one.
    for piece in range(start, start + size, HUGE_PAGE):
        os.posix_fallocate(fd, piece, min(PAGE, start + size - piece))
    room, at = map_for_huge_pages(fd, start, size, writable=False)
    with room:
        with contextlib.suppress(OSError):
            room.madvise(_MADV_COLLAPSE, at, size)
        os.posix_fallocate(fd, start, size)
        # A read allocates and clears a page of a shared mapping as well as a write does.
        bytes(room[at : at + size : PAGE])
