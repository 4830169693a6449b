"""A tier that is opened when it can be: a store that is down when the mover starts is used once it is there."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from penstock.errors import ConfigError, TierUnavailable
from penstock.tiers.base import Batch, BlockSpace, Tier, Usage
from penstock.tiers.registry import TierConfig, open_tier

__all__ = ["LateTier"]

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

    def _opened(self) -> Tier:
        try:
            return self.open()
        except ConfigError as error:  # it could be opened with these settings once; what is there has changed
            raise TierUnavailable(str(error)) from error

    def holds(self, space: BlockSpace, keys: Keys, deadline: float) -> npt.NDArray[np.bool_]:
        return self._opened().holds(space, keys, deadline)

    def write(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        return self._opened().write(batch, deadline)

    def read(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        return self._opened().read(batch, deadline)

    def remove(self, space: BlockSpace, keys: Keys, deadline: float) -> None:
        self._opened().remove(space, keys, deadline)

    def touch(self, space: BlockSpace, keys: Keys) -> None:
        if self._tier is not None:
            self._tier.touch(space, keys)

    def usage(self) -> Usage:
        return Usage(None, None, None) if self._tier is None else self._tier.usage()

    def counters(self) -> dict[str, int]:
        return {} if self._tier is None else self._tier.counters()

    def close(self) -> None:
        self._closed = True
        if self._tier is not None:
            self._tier.close()
