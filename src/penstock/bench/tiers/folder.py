"""Where the tiers' benches keep their files: on a disk, not in memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["FOLDER_VARIABLE", "bench_folder"]

FOLDER_VARIABLE = "PENSTOCK_BENCH_DIR"
"""Names a directory on the disk that is to be measured; default: /var/tmp."""


@contextmanager
def bench_folder() -> Iterator[Path]:
    """A new folder, deleted at the end."""
    folder = Path(tempfile.mkdtemp(prefix="penstock-bench-", dir=os.environ.get(FOLDER_VARIABLE, "/var/tmp")))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
