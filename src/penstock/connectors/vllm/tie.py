"""The tie to the pool of one half of the connector: attaching and registering spaces happen on a thread of its own.

The engine's thread never waits for the keeper: what is not there yet is a miss. Covers attaching, also to a keeper
that comes later, and the handles of spaces. Does not cover what a keeper's restart means for an attached client
(`penstock.pool.attaching` comes back by itself).
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable

import penstock
from penstock import Pool, Space, SpaceHandle
from penstock.identity import warm

__all__ = ["Tie"]

_log = logging.getLogger("vllm.penstock")

RETRY_S = 1.0
# How often an attached tie looks whether its pool was closed behind its back.
_CHECK_S = 5.0
# Spaces of one engine: adapters times epochs. More are let go, oldest first, and asked for again.
_MAX_HANDLES = 64


class Tie:
    """A pool by name, once there is one. Thread-safe."""

    def __init__(
        self,
        name: str,
        client: str,
        label: str,
        *,
        open_pool: Callable[..., Pool] = penstock.open,
        retry_s: float = RETRY_S,
    ) -> None:
        self._name, self._client, self._label = name, client, label
        self._open = open_pool
        self._retry_s = retry_s
        self._pool: Pool | None = None
        self._handles: dict[bytes, SpaceHandle] = {}
        self._wanted: dict[bytes, Space] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._asked = False
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._look_after, name=f"penstock-tie-{client}", daemon=True)

    def start(self, *spaces: Space) -> None:
        """Try to attach and to register `spaces` now, for start-up; then go on trying on the thread."""
        with self._changed:
            self._wanted.update({space.digest(): space for space in spaces})
        self._step()
        self._thread.start()

    @property
    def pool(self) -> Pool | None:
        """The pool, if attached."""
        return self._pool

    @property
    def uuid(self) -> bytes:
        """Which segment it is attached to; empty if none."""
        pool = self._pool
        return b"" if pool is None or pool.closed else pool.uuid

    def handle(self, space: Space) -> SpaceHandle | None:
        """The handle of `space`, or None while there is none; asks for it. Does not wait."""
        digest = space.digest()
        handle = self._handles.get(digest)
        if handle is None:
            with self._changed:
                if digest not in self._wanted:
                    self._wanted[digest] = space
                    self._asked = True
                    self._changed.notify_all()
        return handle

    def wait_handle(self, space: Space, timeout_s: float) -> SpaceHandle | None:
        """As `handle`, waiting for it; for threads that may wait."""
        if (handle := self.handle(space)) is not None:
            return handle
        with self._changed:
            self._changed.wait_for(lambda: space.digest() in self._handles or self._closed, timeout_s)
        return self._handles.get(space.digest())

    def close(self) -> None:
        """Leave the pool; idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            pool, self._pool = self._pool, None
            self._handles.clear()
        if pool is not None:
            pool.close()

    def _look_after(self) -> None:
        while not self._closed:
            with self._changed:
                settled = self._pool is not None and not self._wanted
                self._changed.wait_for(lambda: self._closed or self._asked, _CHECK_S if settled else self._retry_s)
                self._asked = False
            self._step()

    def _step(self) -> None:
        if self._pool is not None and self._pool.closed:
            with self._changed:
                self._pool = None
                self._handles.clear()
        if self._pool is None and not self._closed:
            self._attach()
        pool = self._pool
        for digest, space in list(self._wanted.items()):
            if pool is None:
                return
            try:
                handle = pool.space(space, self._label)
            except Exception as error:  # noqa: BLE001 - the border to the pool: it may cost a hit, never a request
                self._warn(f"space {self._label!r}", error)
                continue
            with self._changed:
                self._wanted.pop(digest, None)
                while len(self._handles) >= _MAX_HANDLES:
                    self._handles.pop(next(iter(self._handles)))
                self._handles[digest] = handle
                self._changed.notify_all()

    def _attach(self) -> None:
        try:
            _load_kernels()
            pool = self._open(self._name, client=self._client)
        except Exception as error:  # noqa: BLE001 - the border to the pool, as below
            self._warn(
                f"no pool {self._name!r}",
                error,
                f"computing everything until there is one. Start it with: penstock serve --name {self._name}",
            )
            return
        with self._changed:
            if self._closed:
                pool.close()
                return
            self._pool = pool
            self._changed.notify_all()
        _log.info("attached to pool %r as %s", self._name, self._client)

    def _warn(self, what: str, error: Exception, then: str = "computing instead") -> None:
        """Says each thing once."""
        level = logging.DEBUG if what in self._warned else logging.WARNING
        self._warned.add(what)
        _log.log(level, "%s (%s): %s", what, error, then)


def _load_kernels() -> None:
    """Load or compile what requests will use, so that none of them waits for it (once about 20 s, then 0.5)."""
    for module in ("penstock.pool.copies", "penstock.pool.slots"):
        importlib.import_module(module)
    warm()
