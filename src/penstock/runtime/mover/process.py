"""The mover's main program: `python -m penstock.runtime.mover NAME FEED_FD RESTARTS`, its plan on standard input.

Started by the keeper, which holds the other end of the feed, and ends with it: the kernel kills it when the keeper
dies, and the end of the feed ends it when the keeper just stops.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.core.speed import SpeedMeter
from penstock.core.tiering import Tiering, TierRule
from penstock.errors import ConfigError, NoKeeper
from penstock.pool.client import Pool
from penstock.pool.stage import Stage
from penstock.pool.tier_wire import tier_socket
from penstock.runtime.mover.claims import Claims
from penstock.runtime.mover.feed import FeedReader
from penstock.runtime.mover.fetches import Fetcher
from penstock.runtime.mover.late import LateTier
from penstock.runtime.mover.places import Places, TierPlace
from penstock.runtime.mover.plan import BAD_PLAN, MoverPlan, tenant_number
from penstock.runtime.mover.report import report
from penstock.runtime.mover.service import Service
from penstock.runtime.mover.watch import Watch
from penstock.runtime.mover.workers import Workers
from penstock.runtime.mover.writes import Writer
from penstock.runtime.opening import open_pool
from penstock.runtime.shelf import Shelf
from penstock.tiers.registry import parse_tier

__all__ = ["CLIENT_NAME", "Mover", "main"]

log = logging.getLogger("penstock.mover")

CLIENT_NAME = "mover"
_PLACES_LOCAL, _PLACES_FAR = 3, 4
# The keeper starts its mover before it serves: how long it may take, and how often it is looked for.
_KEEPER_S, _LOOK_S = 60.0, 0.005
# Guesses until something was measured: seconds to the first byte, bytes a second.
_GUESS_LOCAL, _GUESS_FAR = (1e-4, 1e9), (1e-3, 3e8)


class Mover:
    """All parts of a mover put together over an open pool."""

    def __init__(self, name: str, stage: Stage, plan: MoverPlan, feed: FeedReader, restarts: int) -> None:
        self.started_s = time.monotonic()
        self.restarts = restarts
        configs = [parse_tier(address) for address in plan.tiers]
        self._late = [LateTier(config) for config in configs]
        for tier in self._late:
            tier.open_if_possible()
        workers = Workers(
            [_PLACES_LOCAL if tier.local else _PLACES_FAR for tier in self._late],
            caps={i: config.cap_bytes_s for i, config in enumerate(configs) if config.cap_bytes_s},
            tenant_caps={tenant_number(tenant): cap for tenant, cap in plan.tenant_caps.items()},
        )
        self.places = Places(
            [
                TierPlace(i, config, Shelf(tier), SpeedMeter(*(_GUESS_LOCAL if tier.local else _GUESS_FAR)))
                for i, (config, tier) in enumerate(zip(configs, self._late, strict=True))
            ],
            workers,
        )
        self.lock = threading.Lock()
        rules = [TierRule(config.name, config.write) for config in configs]
        self.tiering = Tiering(stage.n_units, rules, replicas=_replicas(plan))
        writer = Writer(stage, self.places, self.tiering, self.lock)
        self.watch = Watch(stage, self.places, feed, self.tiering, writer, self.lock)
        self.fetcher = Fetcher(stage, self.places, Claims(), self.watch.brings, self._lacks)
        path = tier_socket(name, create=True)
        self.service = Service(path, stage, self.places, self.fetcher, lambda: report(self))

    def _lacks(self, tier: int, keys: npt.NDArray[np.uint64]) -> None:
        with self.lock:
            self.tiering.gone(tier, keys)

    def run(self) -> None:
        """Until the keeper is gone or `stop`."""
        watching = threading.Thread(
            target=self.watch.run, args=(self.service.stop,), name="penstock-watch", daemon=True
        )
        watching.start()
        self.service.serve()
        self.places.workers.stop()
        for tier in self._late:
            tier.close()


def _replicas(plan: MoverPlan) -> dict[int, int]:
    return {0: 1} | {tenant_number(tenant): n for tenant, n in plan.replicas.items()}


def _attached(name: str) -> Pool:
    """The keeper's pool, as soon as it serves. Raises NoKeeper when it takes too long; another mover comes then."""
    deadline = time.monotonic() + _KEEPER_S
    while True:
        try:
            return open_pool(name, client=CLIENT_NAME)
        except NoKeeper:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_S)


def main(arguments: list[str]) -> int:
    """Runs a mover to its end. Exit status 0 when the keeper stopped it, BAD_PLAN for settings that cannot work."""
    name, feed_fd, restarts = arguments[0], int(arguments[1]), int(arguments[2])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    plan = msgspec.json.decode(sys.stdin.buffer.readline(), type=MoverPlan)
    feed = FeedReader(socket.socket(fileno=feed_fd))
    pool = _attached(name)
    try:
        mover = Mover(name, Stage(pool), plan, feed, restarts)
    except ConfigError as error:
        print(f"penstock: {error}", file=sys.stderr, flush=True)
        pool.close()
        return BAD_PLAN
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: mover.service.stop())
    log.info("moves blocks between pool %s and %s", name, ", ".join(tier.name for tier in mover.places.tiers))
    mover.run()
    # A thread may hang in a device's call for ever; nothing is left to put in order but what the kernel does anyway.
    pool.close()
    logging.shutdown()
    os._exit(0)
