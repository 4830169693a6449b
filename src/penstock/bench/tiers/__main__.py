"""One group in a process of its own: `python -m penstock.bench.tiers GROUP SCALE` prints a JSON line per result."""

from __future__ import annotations

import sys

from penstock.bench.pool.base import print_group
from penstock.bench.tiers.base import GROUPS

if __name__ == "__main__":
    print_group(GROUPS, "penstock.bench.tiers", *sys.argv[1:3])
