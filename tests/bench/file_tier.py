"""A tier of one file a block, for tests that need a real one whose limits and faults they choose."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from penstock.errors import ConfigError, TierUnavailable
from penstock.tiers.base import Batch, BlockSpace, Found, Keys, Placed, Tier, Usage
from penstock.types import WriteRule

DEFAULT_WRITE = WriteRule.THROUGH


class FileTier(Tier):
    """`root/<space>/<key>`: eight bytes of root, then the payload."""

    kind, local, shared, durable = "probefile", False, False, False

    def __init__(self, name: str, root: Path, options: dict[str, str]) -> None:
        super().__init__(name)
        self._root = root
        self._largest = int(options.get("largest", 1 << 40))
        self._breaks_at = int(options.get("breaks_at", 1 << 40))
        self._flips = "flips" in options
        self._capacity = int(options["capacity"]) if "capacity" in options else None

    def _path(self, space: BlockSpace, key: np.ndarray) -> Path:
        return self._root / space.digest.hex() / key.tobytes().hex()

    def holds(self, space: BlockSpace, keys: Keys, deadline: float) -> np.ndarray:
        return np.array([self._path(space, key).exists() for key in keys])

    def write(self, batch: Batch, deadline: float) -> np.ndarray:
        if batch.space.block_bytes >= self._breaks_at:
            raise TierUnavailable("it broke")
        placed = np.full(len(batch), Placed.STORED, np.uint8)
        for i, payload in enumerate(batch.payloads):
            path = self._path(batch.space, batch.keys[i])
            if batch.space.block_bytes > self._largest:
                placed[i] = Placed.NO_ROOM
                continue
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(batch.roots[i].tobytes() + payload)
        return placed

    def read(self, batch: Batch, deadline: float) -> np.ndarray:
        found = np.full(len(batch), Found.HERE, np.uint8)
        for i, payload in enumerate(batch.payloads):
            try:
                stored = bytearray(self._path(batch.space, batch.keys[i]).read_bytes())
            except FileNotFoundError:
                found[i] = Found.ABSENT
                continue
            if self._flips:
                stored[-1] ^= 1
            batch.roots[i] = np.frombuffer(stored[:8], np.uint64)[0]
            payload[:] = stored[8:]
        return found

    def remove(self, space: BlockSpace, keys: Keys, deadline: float) -> None:
        for key in keys:
            self._path(space, key).unlink(missing_ok=True)

    def usage(self) -> Usage:
        return Usage(self._capacity, None, None)

    def close(self) -> None:
        (self._root / "closed").touch()


def open_tier(location: str, options: dict[str, str], name: str) -> FileTier:
    root = Path(location)
    if not root.is_dir():
        raise ConfigError(f"{root} is no folder")
    return FileTier(name, root, options)
