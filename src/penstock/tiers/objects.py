"""Blocks as objects in a store that many machines share: S3 and what speaks its protocol, GCS, Azure, a directory.

One object is one block: the header of `envelope.py`, then the payload. Objects are written whole or not at all (S3's
PUT, a rename in a directory), so a reader never sees half of one; one that is shorter or longer than its block, has no
header or the header of another block is FAILED and never HERE. Requests run on a crew's threads (`crew.py`) with up to
`parallel` at once, and never touch the caller's memory: the calling thread copies.

Covers every store that `obstore` speaks to. Does not cover where a store is and how to log in (`objects_s3.py` and its
neighbours), what its errors mean (`objects_errors.py`), or making room: nobody here deletes what is old; give the
bucket an expiry rule.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from penstock.errors import ConfigError, TierUnavailable
from penstock.tiers.base import Batch, BlockSpace, Found, Keys, Placed, Tier, Usage
from penstock.tiers.crew import Crew, Ended
from penstock.tiers.envelope import HEADER_BYTES, belongs, header_at, object_name, pack, unpack
from penstock.tiers.objects_errors import Judge, Verdict

__all__ = ["MAX_LEFT_BATCHES", "ObjectTier", "Place", "import_obstore"]

MAX_LEFT_BATCHES = 4
"""How many batches' worth of requests may hang before the tier refuses at once."""

T = TypeVar("T")


def import_obstore() -> Any:
    """The `obstore` package. Raises ConfigError, naming the extra, where it is not installed."""
    try:
        import obstore
    except ImportError as error:
        raise ConfigError("this tier needs obstore: pip install 'penstock[objects]'") from error
    return obstore


@dataclass(frozen=True, slots=True)
class Place:
    """A store that was opened: what is the same for every request."""

    kind: str
    """The scheme of its addresses."""
    store: Any
    """obstore's `ObjectStore`, with the prefix of its objects."""
    judge: Judge
    check: Callable[[], None] = lambda: None
    """Called before every write, on the thread that writes; raises TierUnavailable where writing would do harm."""


class ObjectTier(Tier):
    """Blocks as objects of one store. Opening it asks nothing of the store, so it may come up later."""

    local = False
    shared = True
    durable = True

    def __init__(self, name: str, place: Place, parallel: int) -> None:
        super().__init__(name)
        self.kind = place.kind
        self._api = import_obstore()
        self._place = place
        self._crew = Crew(name, parallel, MAX_LEFT_BATCHES * parallel)
        self._counts = {"requests": 0, "requests_failed": 0, "bytes_read": 0, "bytes_written": 0}
        self._lock = threading.Lock()

    def holds(self, space: BlockSpace, keys: Keys, deadline: float) -> npt.NDArray[np.bool_]:
        """(n,): which objects are there in their blocks' length; asked in parallel."""
        held = np.zeros(len(keys), np.bool_)
        size = HEADER_BYTES + space.block_bytes

        def take(ended: Ended[int]) -> None:
            held[ended.index] = self._value(ended) == size

        self._run((self._sized(name) for name in _names(space, keys)), deadline, take)
        return held

    def write(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        """(n,) of `Placed`. An object that is there in its block's length is PRESENT; any other is replaced."""
        placed = np.full(len(batch), Placed.FAILED, np.uint8)

        def take(ended: Ended[Placed]) -> None:
            value = self._value(ended)
            if isinstance(value, Placed):
                placed[ended.index] = value
                self._count("bytes_written", batch.space.block_bytes if value == Placed.STORED else 0)
            elif value is Verdict.FULL:
                placed[ended.index] = Placed.NO_ROOM

        # Each body is a copy, made here as a place becomes free: a request that outlives this call reads only that.
        bodies = (b"".join((pack(header_at(batch, i)), payload)) for i, payload in enumerate(batch.payloads))
        names = _names(batch.space, batch.keys)
        self._run((self._put(name, body) for name, body in zip(names, bodies, strict=True)), deadline, take)
        return placed

    def read(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        """(n,) of `Found`. What has not exactly its block's length and header is FAILED."""
        found = np.full(len(batch), Found.FAILED, np.uint8)
        size = HEADER_BYTES + batch.space.block_bytes

        def take(ended: Ended[Any]) -> None:
            value = self._value(ended)
            if value is Verdict.ABSENT:
                found[ended.index] = Found.ABSENT
            elif (
                not isinstance(value, Verdict) and value is not None and _unload(memoryview(value), batch, ended.index)
            ):
                found[ended.index] = Found.HERE
                self._count("bytes_read", batch.space.block_bytes)

        self._run((self._get(name, size) for name in _names(batch.space, batch.keys)), deadline, take)
        return found

    def remove(self, space: BlockSpace, keys: Keys, deadline: float) -> None:
        """Delete the objects. Raises TierUnavailable if one may still be there."""
        kept: list[str] = []

        def take(ended: Ended[None]) -> None:
            if self._value(ended) not in (None, Verdict.ABSENT):
                kept.append(str(ended.error))

        self._run((self._delete(name) for name in _names(space, keys)), deadline, take)
        if kept:
            raise TierUnavailable(f"{self.name}: {len(kept)} of {len(keys)} objects could not be removed")

    def usage(self) -> Usage:
        """Unknown: others fill it, too."""
        return Usage(None, None, None)

    def close(self) -> None:
        self._crew.close()

    def counters(self) -> dict[str, int]:
        with self._lock:
            return {**self._counts, "requests_left": self._crew.left_total}

    # ---- the requests; each runs on a thread of the crew

    def _sized(self, name: str) -> Callable[[], int]:
        return lambda: int(self._api.head(self._place.store, name)["size"])

    def _put(self, name: str, body: bytes) -> Callable[[], Placed]:
        def call() -> Placed:
            self._place.check()
            with suppress(FileNotFoundError):
                if self._sized(name)() == len(body):
                    return Placed.PRESENT
            self._api.put(self._place.store, name, body, use_multipart=False)
            return Placed.STORED

        return call

    def _get(self, name: str, size: int) -> Callable[[], Any]:
        def call() -> Any:
            result = self._api.get(self._place.store, name)
            if result.meta["size"] != size:
                return None
            try:
                return result.bytes()
            except self._api.exceptions.BaseError:
                return None

        return call

    def _delete(self, name: str) -> Callable[[], None]:
        def call() -> None:
            self._api.delete(self._place.store, name)

        return call

    # ---- what became of them; in the calling thread

    def _run(self, calls: Iterator[Callable[[], T]], deadline: float, take: Callable[[Ended[T]], None]) -> None:
        self._crew.run(calls, deadline, take)

    def _value(self, ended: Ended[T]) -> T | Verdict | None:
        self._count("requests", 1)
        if ended.error is None:
            return ended.value
        verdict = self._place.judge.of(ended.error)
        if verdict is not Verdict.ABSENT:
            self._count("requests_failed", 1)
        if verdict is Verdict.PLACE:
            # The library's own text may quote what was signed and with which key, so it is not chained.
            raise self._place.judge.unavailable(self.name, ended.error) from None
        return verdict

    def _count(self, name: str, n: int) -> None:
        with self._lock:
            self._counts[name] += n


def _names(space: BlockSpace, keys: Keys) -> list[str]:
    return [object_name(space, key.tobytes()) for key in keys]


def _unload(body: memoryview, batch: Batch, index: int) -> bool:
    header = unpack(body[:HEADER_BYTES])
    if header is None or len(body) != HEADER_BYTES + batch.space.block_bytes:
        return False
    if not belongs(header, batch.space, batch.keys[index].tobytes()):
        return False
    np.copyto(np.frombuffer(batch.payloads[index], np.uint8), np.frombuffer(body, np.uint8, offset=HEADER_BYTES))
    batch.roots[index] = header.root
    return True
