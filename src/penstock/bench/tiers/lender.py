"""Lends memory to a Mooncake master until stdin ends: `python -m penstock.bench.tiers.lender ADDRESS`."""

from __future__ import annotations

import sys

from penstock.tiers.registry import open_tier, parse_tier

if __name__ == "__main__":
    tier = open_tier(parse_tier(sys.argv[1]))
    print("lends", flush=True)
    sys.stdin.read()
    tier.close()
