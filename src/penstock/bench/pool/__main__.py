"""One group in a process of its own: `python -m penstock.bench.pool GROUP SCALE` prints a JSON line per result."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict

from penstock.bench.pool.base import SCALES, measure


def main(group: str, scale: str) -> None:
    # A runtime folder of its own: a bench's pools are not seen among the user's, and leave nothing behind.
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder
        for result in measure(group, SCALES[scale]):
            print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
