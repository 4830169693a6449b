"""The connection to a Mooncake Store, and the registered memory that blocks pass through.

Covers joining a cluster, which blocks for as long as its master is away, and bays: pieces of memory that Mooncake may
write to or read from although nobody waits for it any more. Does not cover blocks (`mooncake.py`).

Mooncake's calls cannot be interrupted, and calling a client after its `close`, or while it closes, ends the process
(seen in 0.3.13). So a client is closed only once no call of ours runs, and otherwise left to the end of the process.
Its `setup` and `close` hold the interpreter's lock, so both ask first whether the master reacts; one that stops in the
very moment after still costs every thread of this process up to 30 s.
"""

from __future__ import annotations

import mmap
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.errors import ConfigError, TierTimeout, TierUnavailable

__all__ = ["BAY_ALIGN", "Bay", "Bays", "Link", "LinkOptions", "Loan", "import_store"]

BAY_ALIGN = 64
_PROBE_S = 1.0
_RETRY_S = 1.0


def import_store() -> Any:
    """Mooncake's client class. Raises ConfigError, naming the remedy, where it is not installed or cannot be loaded."""
    try:
        from mooncake.store import MooncakeDistributedStore
    except ImportError as error:
        raise ConfigError(
            f"this tier needs Mooncake ({error}): pip install 'penstock[mooncake]', and "
            "apt-get install libibverbs1 librdmacm1 libnuma1 libcurl4"
        ) from error
    return MooncakeDistributedStore


class LinkOptions(msgspec.Struct, frozen=True):
    """How to join the cluster."""

    master_host: str
    master_port: int
    metadata: str
    protocol: str
    device: str
    host: str
    """What other clients reach this machine by; empty for the address that faces the master."""
    segment_bytes: int
    """Memory of this process that is lent to the cluster."""


@dataclass(slots=True, eq=False)
class Bay:
    """A piece of registered memory."""

    address: int
    memory: npt.NDArray[np.uint8]


class Loan:
    """One use of a bay: by a batch, and by a call that may go on after the batch was given up.

    lent -> calling -> over          the batch gives the bay back
    lent -> calling -> (batch gone)  the call's end gives it back
    lent -> over                     the call finds the loan over and does nothing
    """

    def __init__(self, bays: Bays, bay: Bay) -> None:
        self.bay = bay
        self._bays = bays
        self._lock = threading.Lock()
        self._calling = False
        self._over = False

    def begin(self) -> bool:
        """Before the call. False if the batch is gone: then the bay must not be touched."""
        with self._lock:
            self._calling = not self._over
            return self._calling

    def end(self) -> None:
        """After the call."""
        with self._lock:
            self._calling = False
            gone = self._over
        if gone:
            self._bays.give(self.bay)

    def release(self) -> None:
        """The batch needs the bay no longer."""
        with self._lock:
            if self._over:
                return
            self._over = True
            calling = self._calling
        if not calling:
            self._bays.give(self.bay)


class Bays:
    """Registered memory in equal pieces, for one batch at a time: two that share could wait for each other."""

    def __init__(self, name: str, memory: npt.NDArray[np.uint8], n: int) -> None:
        size = len(memory) // n // BAY_ALIGN * BAY_ALIGN
        self.bay_bytes = size
        self.n = n
        self._name = name
        self._turn = threading.Lock()
        self._free = deque(
            Bay(memory.ctypes.data + i * size, memory[i * size : (i + 1) * size]) for i in range(n)
        )  # appended to and taken from by several threads: both are atomic

    def enter(self, deadline: float) -> None:
        """Wait for this batch's turn. Raises TierTimeout at the deadline."""
        if not self._turn.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TierTimeout(f"{self._name}: other batches were not done by the deadline")

    def leave(self) -> None:
        """Let the next batch in."""
        self._turn.release()

    def lend(self) -> Loan:
        """A free bay. Raises TierUnavailable if calls that hang have all of them."""
        try:
            return Loan(self, self._free.popleft())
        except IndexError:
            raise TierUnavailable(f"{self._name} does not answer: calls that hang have all of its buffers") from None

    def give(self, bay: Bay) -> None:
        """Take a bay back."""
        self._free.append(bay)

    @property
    def free(self) -> int:
        """How many bays are free."""
        return len(self._free)


class Link:
    """One client of a cluster, joined when it is first asked for. `client` runs on threads that may be left behind."""

    def __init__(self, name: str, options: LinkOptions, buffer_bytes: int) -> None:
        self._name = name
        self._options = options
        self._class = import_store()
        self._map = mmap.mmap(-1, buffer_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        self.memory = np.frombuffer(self._map, np.uint8)
        self._lock = threading.Lock()
        self._client: Any = None
        self._failed: tuple[float, str] | None = None

    def client(self) -> Any:
        """The client, joining first where that is still to be done. Blocks; raises TierUnavailable."""
        with self._lock:
            if self._client is None:
                if self._failed is not None and time.monotonic() < self._failed[0] + _RETRY_S:
                    raise TierUnavailable(self._failed[1])
                try:
                    self._client = self._join()
                except TierUnavailable as error:
                    self._failed = (time.monotonic(), str(error))
                    raise
            return self._client

    def close(self) -> None:
        """Leave the cluster, if its master answers. Blocks. Only once nobody uses the client.

        Otherwise the client is left to the end of the process, and the master forgets it in time.
        """
        with self._lock, suppress(TierUnavailable):
            if self._client is not None:
                self._ask_master()
                self._client.close()

    def _join(self) -> Any:
        own, where = self._options, self._where
        facing = self._ask_master()
        client = self._class()
        code = client.setup(
            own.host or facing, own.metadata, own.segment_bytes, 0, own.protocol, own.device, where
        )  # fmt: skip
        if code != 0:
            raise TierUnavailable(f"{self._name}: joining the Mooncake cluster of {where} failed with {code}")
        code = client.register_buffer(self.memory.ctypes.data, self.memory.nbytes)
        if code != 0:
            raise TierUnavailable(f"{self._name}: Mooncake would not register memory ({code}); see ulimit -l")
        return client

    def _ask_master(self) -> str:
        """This machine's address towards the master, if that reacts. Raises TierUnavailable."""
        # `setup` and `close` hold the interpreter's lock: with a master that is stopped they would stop this whole
        # process for 30 s. A master that runs hangs up on what is no request of its protocol.
        try:
            with socket.create_connection((self._options.master_host, self._options.master_port), _PROBE_S) as probe:
                probe.sendall(bytes(64))
                probe.recv(1)
                address: str = probe.getsockname()[0]
                return address
        except OSError as error:
            why = error.strerror or error
            raise TierUnavailable(
                f"{self._name}: no Mooncake master answers at {self._where} ({why}); check that mooncake_master runs"
            ) from None

    @property
    def _where(self) -> str:
        return f"{self._options.master_host}:{self._options.master_port}"
