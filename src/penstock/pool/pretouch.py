"""Make a segment's memory real before anybody is granted a part of it: `python -m penstock.pool.pretouch PATH FROM`.

A store into a page that tmpfs cannot provide kills the process with SIGBUS, so every page is allocated first, which
fails with an error instead, and touched, because a first touch costs twenty times a warm copy. A process of its own
does it in small pieces: from a thread of the keeper it triples the readers' p99. Nothing here changes a byte, so a
pre-toucher that outlives its keeper does no harm.

Prints the offset reached after each piece; the keeper reads that and hands out what lies below.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from penstock.pool.huge import allocate
from penstock.pool.layout import HUGE_PAGE
from penstock.pool.segment import open_existing

__all__ = ["touch_range"]

# Small, as readers are disturbed by large ones; several huge pages, as asking for them waits for every processor once.
_PIECE = 4 * HUGE_PAGE


def touch_range(fd: int, start: int, size: int) -> bool:
    """Allocate and touch a page-aligned range of a file. False if the file system is full."""
    try:
        allocate(fd, start, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
            return False
        raise
    return True


def main(path: str, start: int) -> int:
    """Touch from `start` to the segment's end. Exit status 0 when all is touched, 1 when the file system is full."""
    os.nice(10)
    segment = open_existing(Path(path))
    fd, end, at = segment.fd, segment.geometry.total_bytes, start
    while at < end:
        piece = min(_PIECE, end - at)
        if not touch_range(fd, at, piece):
            return 1
        at += piece
        print(at, flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1], int(sys.argv[2])))
    except BrokenPipeError:
        os._exit(0)  # the keeper is gone; the next one starts its own
