"""`mooncake://host:port`: a Mooncake Store, the memory of several machines as one store.

    mooncake://10.0.0.5:50051
    mooncake://10.0.0.5:50051?protocol=rdma&device=mlx5_0&segment=64G
    mooncake://127.0.0.1:50051?metadata=P2PHANDSHAKE&protocol=tcp&segment=1G&buffer=64M

The real client, with its batch calls. One object is one block: the header of `envelope.py`, then the payload. Blocks
pass through bays, memory of this tier that is registered with Mooncake: its calls cannot be interrupted, so a call that
hangs past its deadline may still write to its bay, and never to the caller's memory. Copies into and out of bays run
beside the next piece's transfer.

Reading straight into the caller's memory would save that copy. It would take registering the pool's whole segment, and
a promise of the pool that a slot which was being read into stays unused until Mooncake's call ends, however long after
the deadline; there is no such promise, so it is not done.

Mooncake evicts as it sees fit, loses what a client lent when that client ends, and keeps no power-proof copy. Removing
is forced: without force it refuses for as long as a lease on the object lasts, and a look-up takes one. A block that is
read while another process removes it may come back torn; the checksum finds it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.config import parse_size
from penstock.errors import ConfigError, TierUnavailable
from penstock.tiers.base import Batch, BlockSpace, Found, Keys, Placed, Tier, Usage
from penstock.tiers.crew import Crew, Ended
from penstock.tiers.envelope import HEADER_BYTES, belongs, header_at, object_name, pack, unpack
from penstock.tiers.mooncake_link import BAY_ALIGN, Bays, Link, LinkOptions, Loan
from penstock.tiers.registry import options_of
from penstock.types import WriteRule

__all__ = ["DEFAULT_WRITE", "MooncakeOptions", "MooncakeTier", "open_tier"]

DEFAULT_WRITE = WriteRule.SECOND_USE
BAYS = 3
"""Of each direction: one in transfer, one being copied, and one to spare for a call that hangs. Two transfers at once
are slower than one."""
PIECE_BYTES = 9 << 20
"""How much goes in one call: enough that the call's cost vanishes, little enough to begin copying soon."""
MAX_LEFT = 16

# Mooncake's result codes (mooncake-store, types.h), negative as it returns them.
_NO_HANDLE, _NOT_READY, _NOT_FOUND, _RPC = -200, -703, -704, frozenset({-900, -901})


class MooncakeOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a `mooncake:` address."""

    metadata: str = "P2PHANDSHAKE"
    protocol: str = "tcp"
    device: str = ""
    """RDMA devices, separated by commas."""
    host: str = ""
    """What other machines reach this one by; the address that faces the master by default."""
    segment: str = "1G"
    """Memory of this process that is lent to the store; 0 for none."""
    buffer: str = "64M"
    """Memory that blocks pass through, half of it in each direction."""
    prefix: str = ""
    """Put before every object's name."""


def open_tier(location: str, options: dict[str, str], name: str) -> Tier:
    """The tier of a cluster, which is joined in the background. Raises ConfigError."""
    chosen = options_of(MooncakeOptions, options, "mooncake")
    host, colon, port = location.removeprefix("//").rpartition(":")
    if not location.startswith("//") or not colon or not host or not port.isdigit():
        raise ConfigError("a mooncake tier's address is mooncake://host:port, of the master")
    segment_bytes = parse_size(chosen.segment) if chosen.segment != "0" else 0
    link = LinkOptions(host, int(port), chosen.metadata, chosen.protocol, chosen.device, chosen.host, segment_bytes)
    return MooncakeTier(name, link, parse_size(chosen.buffer), chosen.prefix)


class MooncakeTier(Tier):
    """Blocks in a Mooncake Store."""

    kind = "mooncake"
    local = False
    shared = True
    durable = False

    def __init__(self, name: str, options: LinkOptions, buffer_bytes: int, prefix: str = "") -> None:
        super().__init__(name)
        self._prefix = prefix
        self._link = Link(name, options, buffer_bytes)
        self._crew = Crew(name, 2 * BAYS, MAX_LEFT)
        half = len(self._link.memory) // 2
        self._in = Bays(name, self._link.memory[:half], BAYS)
        self._out = Bays(name, self._link.memory[half:], BAYS)
        self._counts = {"calls": 0, "bytes_read": 0, "bytes_written": 0}
        self._lock = threading.Lock()
        self._closed = False
        # So that what this process lends is there before the first block is asked for.
        threading.Thread(target=self._join, name=f"penstock-{name}-join", daemon=True).start()

    def holds(self, space: BlockSpace, keys: Keys, deadline: float) -> npt.NDArray[np.bool_]:
        held = np.zeros(len(keys), np.bool_)
        if len(keys):
            held[:] = self._exist(self._names(space, keys), deadline) == 1
        return held

    def write(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        """(n,) of `Placed`. An object that is there in its block's length is PRESENT; any other is replaced."""
        placed = np.full(len(batch), Placed.FAILED, np.uint8)
        if not len(batch):
            return placed
        present = self._sound(batch, deadline)
        placed[present] = Placed.PRESENT
        missing = np.flatnonzero(~present)
        pieces = self._pieces(batch.space, missing, self._out)

        def put(indices: npt.NDArray[np.intp], loan: Loan) -> Callable[[], list[int]]:
            for place, i in enumerate(indices):
                _load(batch, int(i), _room(loan, place, batch.space))
            return self._transfer("batch_put_from", batch, indices, loan)

        def take(indices: npt.NDArray[np.intp], loan: Loan, codes: list[int]) -> None:
            for i, code in zip(indices, codes, strict=True):
                placed[i] = Placed.STORED if code == 0 else Placed.NO_ROOM if code == _NO_HANDLE else Placed.FAILED
            self._count("bytes_written", codes.count(0) * batch.space.block_bytes)

        self._move(pieces, self._out, put, take, deadline)
        return placed

    def read(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        """(n,) of `Found`. What has not exactly its block's length and header is FAILED."""
        found = np.full(len(batch), Found.FAILED, np.uint8)
        size = HEADER_BYTES + batch.space.block_bytes
        pieces = self._pieces(batch.space, np.arange(len(batch)), self._in)

        def get(indices: npt.NDArray[np.intp], loan: Loan) -> Callable[[], list[int]]:
            return self._transfer("batch_get_into", batch, indices, loan)

        def take(indices: npt.NDArray[np.intp], loan: Loan, codes: list[int]) -> None:
            for place, (i, code) in enumerate(zip(indices, codes, strict=True)):
                if code == _NOT_FOUND:
                    found[i] = Found.ABSENT
                elif code == size and _unload(_room(loan, place, batch.space), batch, int(i)):
                    found[i] = Found.HERE
                    self._count("bytes_read", batch.space.block_bytes)

        self._move(pieces, self._in, get, take, deadline)
        return found

    def remove(self, space: BlockSpace, keys: Keys, deadline: float) -> None:
        """Remove the objects, leased or not. Raises TierUnavailable if one may still be there."""
        if not len(keys):
            return
        names = self._names(space, keys)
        codes = self._ask(lambda client: client.batch_remove(names, True), deadline)
        # One that is being written counts as written after this.
        kept = [code for code in codes if code not in (0, _NOT_FOUND, _NOT_READY)]
        if kept:
            raise TierUnavailable(f"{self.name}: {len(kept)} of {len(keys)} blocks could not be removed ({kept[0]})")

    def usage(self) -> Usage:
        """Unknown: others fill it, too."""
        return Usage(None, None, None)

    def close(self) -> None:
        """Leave the cluster, and take what this process lent along; not at once where calls still hang."""
        with self._lock:
            closed, self._closed = self._closed, True
        if closed:
            return
        if self._crew.close():
            leaving = threading.Thread(target=self._link.close, name=f"penstock-{self.name}-leave", daemon=True)
            leaving.start()
            leaving.join(5.0)

    def counters(self) -> dict[str, int]:
        with self._lock:
            return {**self._counts, "calls_left": self._crew.left_total}

    # ---- single calls

    def _join(self) -> None:
        with suppress(TierUnavailable):
            self._link.client()

    def _ask(self, call: Callable[[Any], Any], deadline: float) -> npt.NDArray[np.int64]:
        """One call of the client on a thread of the crew. Raises TierTimeout, TierUnavailable."""
        codes: list[int] = []

        def take(ended: Ended[list[int]]) -> None:
            codes.extend(self._codes(ended))

        self._crew.run(iter([lambda: list(call(self._link.client()))]), deadline, take)
        return np.array(codes, np.int64)

    def _codes(self, ended: Ended[list[int]]) -> list[int]:
        self._count("calls", 1)
        if ended.error is not None:
            raise ended.error
        codes = ended.value or []
        if any(code in _RPC for code in codes):
            raise TierUnavailable(f"{self.name}: the Mooncake master does not answer; check that mooncake_master runs")
        return codes

    def _exist(self, names: list[str], deadline: float) -> npt.NDArray[np.int64]:
        return self._ask(lambda client: client.batch_is_exist(names), deadline)

    def _sound(self, batch: Batch, deadline: float) -> npt.NDArray[np.bool_]:
        """(n,): which blocks are there in their length. Those of another length are removed."""
        names = self._names(batch.space, batch.keys)
        there: npt.NDArray[np.bool_] = self._exist(names, deadline) == 1
        if not there.any():
            return there
        size = HEADER_BYTES + batch.space.block_bytes
        asked = [name for name, yes in zip(names, there, strict=True) if yes]
        sizes = self._ask(lambda client: _sizes(client.batch_get_replica_desc(asked), asked), deadline)
        wrong = there.copy()
        wrong[there] = sizes != size
        if wrong.any():
            self.remove(batch.space, batch.keys[wrong], deadline)
        there[wrong] = False
        return there

    # ---- batches of blocks

    def _pieces(self, space: BlockSpace, indices: npt.NDArray[np.intp], bays: Bays) -> list[npt.NDArray[np.intp]]:
        """The blocks in groups that fit into a bay."""
        each = max(1, PIECE_BYTES // _stride(space))
        if bays.bay_bytes < each * _stride(space):
            each = bays.bay_bytes // _stride(space)
        if not each:
            least = 2 * BAYS * _stride(space)
            raise TierUnavailable(f"{self.name}: blocks of {space.block_bytes} bytes need buffer={least} or more")
        return [indices[at : at + each] for at in range(0, len(indices), each)]

    def _transfer(
        self, method: str, batch: Batch, indices: npt.NDArray[np.intp], loan: Loan
    ) -> Callable[[], list[int]]:
        names = self._names(batch.space, batch.keys[indices])
        size = HEADER_BYTES + batch.space.block_bytes
        addresses = [loan.bay.address + place * _stride(batch.space) for place in range(len(indices))]

        def call() -> list[int]:
            client = self._link.client()
            if not loan.begin():
                return []
            try:
                return list(getattr(client, method)(names, addresses, [size] * len(names)))
            finally:
                loan.end()

        return call

    def _move(
        self,
        pieces: list[npt.NDArray[np.intp]],
        bays: Bays,
        prepare: Callable[[npt.NDArray[np.intp], Loan], Callable[[], list[int]]],
        take: Callable[[npt.NDArray[np.intp], Loan, list[int]], None],
        deadline: float,
    ) -> None:
        """Run a call for each piece, one at a time; `prepare` and `take` run in this thread, beside the calls."""
        loans: dict[int, Loan] = {}

        def calls() -> Iterator[Callable[[], list[int]]]:
            for number, indices in enumerate(pieces):
                loans[number] = bays.lend()
                yield prepare(indices, loans[number])

        def took(ended: Ended[list[int]]) -> None:
            codes = self._codes(ended)
            loan = loans.pop(ended.index)
            try:
                take(pieces[ended.index], loan, codes)
            finally:
                loan.release()

        if not pieces:
            return
        bays.enter(deadline)
        try:
            self._crew.run(calls(), deadline, took, window=1)
        finally:
            for loan in loans.values():
                loan.release()
            bays.leave()

    def _names(self, space: BlockSpace, keys: Keys) -> list[str]:
        return [self._prefix + object_name(space, key.tobytes()) for key in keys]

    def _count(self, name: str, n: int) -> None:
        with self._lock:
            self._counts[name] += n


def _stride(space: BlockSpace) -> int:
    """Bytes from one object to the next in a bay."""
    return -(-(HEADER_BYTES + space.block_bytes) // BAY_ALIGN) * BAY_ALIGN


def _room(loan: Loan, place: int, space: BlockSpace) -> npt.NDArray[np.uint8]:
    at = place * _stride(space)
    return loan.bay.memory[at : at + HEADER_BYTES + space.block_bytes]


def _load(batch: Batch, index: int, room: npt.NDArray[np.uint8]) -> None:
    room[:HEADER_BYTES] = np.frombuffer(pack(header_at(batch, index)), np.uint8)
    np.copyto(room[HEADER_BYTES:], np.frombuffer(batch.payloads[index], np.uint8))


def _unload(room: npt.NDArray[np.uint8], batch: Batch, index: int) -> bool:
    header = unpack(room[:HEADER_BYTES].tobytes())
    if header is None or not belongs(header, batch.space, batch.keys[index].tobytes()):
        return False
    np.copyto(np.frombuffer(batch.payloads[index], np.uint8), room[HEADER_BYTES:])
    batch.roots[index] = header.root
    return True


def _sizes(described: dict[str, list[Any]], names: list[str]) -> list[int]:
    """The length of each object; 0 for one that went meanwhile."""
    return [_size(described.get(name, [])) for name in names]


def _size(replicas: list[Any]) -> int:
    in_memory = [each for each in replicas if each.is_memory_replica()]
    return int(in_memory[0].get_memory_descriptor().buffer_descriptor.size) if in_memory else 0
