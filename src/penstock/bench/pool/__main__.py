"""One group in a process of its own: `python -m penstock.bench.pool GROUP SCALE` prints a JSON line per result."""

from __future__ import annotations

import sys

from penstock.bench.pool.base import GROUPS, print_group

if __name__ == "__main__":
    print_group(GROUPS, "penstock.bench.pool", *sys.argv[1:3])
