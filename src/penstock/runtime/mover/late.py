"""A tier that is opened when it can be: a store that is down when the mover starts is used once it is there.

It is also where errors of a tier's code end that are no tier's errors: whatever a library raises, the mover goes on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from penstock.errors import ConfigError, TierError, TierUnavailable
from penstock.tiers.base import Batch, BlockSpace, Tier, Usage
from penstock.tiers.registry import TierConfig, open_tier

__all__ = ["LateTier"]

log = logging.getLogger("penstock.mover")

Keys = npt.NDArray[np.uint64]


class LateTier(Tier):
    """Opens the tier at the first call that it can be opened at; until then every call raises TierUnavailable."""

    shared = True
    durable = False

    def __init__(self, config: TierConfig) -> None:
        super().__init__(config.name)
        self.kind = config.scheme
        self._config = config
        self._opening = threading.Lock()
        self._tier: Tier | None = None
        self._closed = False
        self._defects = 0

    @property
    def local(self) -> bool:  # type: ignore[override]
        """As the tier itself says; unknown, and so False, until it is open."""
        return self._tier is not None and self._tier.local

    def open(self) -> Tier:
        """The tier. Raises ConfigError for settings that can never be used, TierError while it cannot be opened."""
        if self._tier is None:
            if not self._opening.acquire(blocking=False):
                raise TierUnavailable(f"{self.name} is being opened")
            try:
                if self._closed:
                    raise TierUnavailable(f"{self.name} is closed")
                self._tier = open_tier(self._config)
            finally:
                self._opening.release()
        return self._tier

    def open_if_possible(self) -> None:
        """Open it, or leave that for later. Raises ConfigError for settings that can never be used."""
        try:
            self.open()
        except ConfigError:
            raise
        except TierError as error:
            log.warning("tier %s is not there yet: %s", self.name, error)
        except Exception as error:  # the boundary to code that may be anybody's
            log.debug("where", exc_info=True)
            log.warning("tier %s is not there yet: %s", self.name, self._defect(error))

    def _defect(self, error: Exception) -> TierUnavailable:
        """What a tier may not raise. The text of it may hold secrets."""
        self._defects += 1
        log.error("tier %s failed with %s, which no tier may raise", self.name, type(error).__name__)
        return TierUnavailable(f"{self.name} failed with {type(error).__name__}, which no tier may raise")

    @contextmanager
    def _opened(self) -> Iterator[Tier]:
        try:
            yield self.open()
        except TierError:
            raise
        except ConfigError as error:  # it could be opened with these settings once; what is there has changed
            raise TierUnavailable(str(error)) from error
        except Exception as error:
            log.debug("where", exc_info=True)
            raise self._defect(error) from None

    def holds(self, space: BlockSpace, keys: Keys, deadline: float) -> npt.NDArray[np.bool_]:
        with self._opened() as tier:
            return tier.holds(space, keys, deadline)

    def write(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        with self._opened() as tier:
            return tier.write(batch, deadline)

    def read(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        with self._opened() as tier:
            return tier.read(batch, deadline)

    def remove(self, space: BlockSpace, keys: Keys, deadline: float) -> None:
        with self._opened() as tier:
            tier.remove(space, keys, deadline)

    def touch(self, space: BlockSpace, keys: Keys) -> None:
        if self._tier is not None:
            with self._opened() as tier:
                tier.touch(space, keys)

    def usage(self) -> Usage:
        return Usage(None, None, None) if self._tier is None else self._tier.usage()

    def counters(self) -> dict[str, int]:
        """The tier's own, and `defects`: calls that ended with an error that no tier may raise."""
        return {"defects": self._defects} | ({} if self._tier is None else self._tier.counters())

    def close(self) -> None:
        self._closed = True
        if self._tier is not None:
            self._tier.close()
