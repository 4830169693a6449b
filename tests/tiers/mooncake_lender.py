"""`python mooncake_lender.py ADDRESS N`: lend memory to a Mooncake Store, put N blocks of chain 0 there, stay.

Prints `lends` once that is done. The blocks are those of `tier_space()`.
"""

from __future__ import annotations

import sys
import threading
import time

from penstock.errors import TierUnavailable
from penstock.testing.tier_blocks import block_keys, filled, tier_space
from penstock.tiers.base import Placed
from penstock.tiers.registry import open_tier, parse_tier


def main(address: str, n: int) -> None:
    tier = open_tier(parse_tier(address))
    space = tier_space()
    keys = block_keys(space, 0, max(n, 1))
    end = time.monotonic() + 30.0
    while True:
        try:
            placed = tier.write(filled(space, keys), time.monotonic() + 10.0)
        except TierUnavailable:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            break
    assert set(placed.tolist()) == {Placed.STORED}, placed
    print("lends", flush=True)
    threading.Event().wait()


main(sys.argv[1], int(sys.argv[2]))
