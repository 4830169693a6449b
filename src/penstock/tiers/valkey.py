"""Valkey and Redis as a tier: blocks in the memory of a server, or of a cluster, that many machines share.

    valkey://host:port/db?tls=true&ca=/etc/penstock/ca.pem      valkey+unix:///run/valkey.sock?db=0
    valkey://host:port,host:port?cluster=true                    options: `valkey_settings.py`

Covers what is stored and what answers mean. Does not cover the wire (`valkey_link.py`) or which server a key belongs to
(`valkey_nodes.py`). An object is one value: header and payload, as `docs/tier-objects.md` has it.

Nothing is connected to before the first call, and a call after an error connects anew: a server that is down when the
tier is opened, or that comes back, is used as soon as it answers.

What the server forgets (its maxmemory-policy, `ttl`, a restart) is absent. A value that is not the block it should be
has failed, and is whoever asked's to remove; `holds` sees only that its length is wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from penstock.errors import TierUnavailable
from penstock.tiers.base import Batch, BlockSpace, Found, Keys, Placed, Tier, Usage
from penstock.tiers.envelope import HEADER_BYTES, belongs, header_at, object_name, pack, unpack
from penstock.tiers.valkey_link import Refusal, Reply, Request, Sink
from penstock.tiers.valkey_nodes import Cluster, Node, Nodes, Unwilling
from penstock.tiers.valkey_settings import Settings, settings_of
from penstock.types import WriteRule

__all__ = ["DEFAULT_WRITE", "ValkeyTier", "open_tier"]

DEFAULT_WRITE = WriteRule.SECOND_USE

_LOOK_FIRST_BYTES = 64 << 10
"""From this size on, a write asks first what is there: the question costs a round trip, a block more than that. Smaller
blocks are written straight away, and replace what was there."""
_HEAD = (b"0", b"%d" % (HEADER_BYTES - 1))
_NOT_A_STRING = "WRONGTYPE"
_FULL = "OOM"


class ValkeyTier(Tier):
    """A server or a cluster of servers. See the module; `counters` has connections made and lost, and redirections."""

    kind = "valkey"
    local = False
    shared = True
    durable = False

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name)
        self._counts: Counter[str] = Counter()
        self._prefix = settings.prefix
        self._options = (b"EX", b"%d" % settings.ttl_s) if settings.ttl_s else ()
        self._where = ",".join(map(str, settings.addresses))
        self._secret = settings.secret
        self._nodes: Nodes = (
            Cluster(settings, self._counts) if settings.cluster else Node(settings.addresses[0], settings, self._counts)
        )
        self._closed = False

    def __repr__(self) -> str:
        return f"ValkeyTier({self.name!r}, {self._where})"

    def holds(self, space: BlockSpace, keys: Keys, deadline: float) -> npt.NDArray[np.bool_]:
        sizes = self._run([Request((b"STRLEN", name), name) for name in self._names(space, keys)], deadline)
        return np.array([size == HEADER_BYTES + space.block_bytes for size in sizes], np.bool_)

    def write(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        placed = np.full(len(batch), Placed.STORED, np.uint8)
        names = self._names(batch.space, batch.keys)
        if batch.space.block_bytes >= _LOOK_FIRST_BYTES:
            placed[self._there(batch, names, deadline)] = Placed.PRESENT
        todo = np.flatnonzero(placed != Placed.PRESENT).tolist()
        requests = [
            Request(
                (b"SET", names[at]),
                names[at],
                (pack(header_at(batch, at)), batch.payloads[at].cast("B")),
                self._options,
            )
            for at in todo
        ]
        for at, reply in zip(todo, self._run(requests, deadline)):
            if reply != b"OK":
                full = isinstance(reply, Refusal) and reply.code == _FULL
                placed[at] = Placed.NO_ROOM if full else Placed.FAILED
        return placed

    def read(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        requests = [
            Request((b"GET", name), name, sink=Sink(HEADER_BYTES, payload.cast("B")))
            for name, payload in zip(self._names(batch.space, batch.keys), batch.payloads)
        ]
        found = np.full(len(batch), Found.FAILED, np.uint8)
        for at, reply in enumerate(self._run(requests, deadline)):
            if reply is None:
                found[at] = Found.ABSENT
            elif isinstance(reply, bytes):
                header = unpack(reply)
                if header is not None and belongs(header, batch.space, batch.keys[at].tobytes()):
                    found[at] = Found.HERE
                    batch.roots[at] = header.root
        return found

    def remove(self, space: BlockSpace, keys: Keys, deadline: float) -> None:
        self._run([Request((b"UNLINK", name), name) for name in self._names(space, keys)], deadline)

    def usage(self) -> Usage:
        """Of the whole server, others' data included; seen every few seconds, along with other calls."""
        capacity_bytes, used_bytes = self._nodes.memory()
        return Usage(capacity_bytes, used_bytes, None)

    def close(self) -> None:
        self._closed = True
        self._nodes.close()

    def counters(self) -> dict[str, int]:
        return dict(self._counts)

    def _names(self, space: BlockSpace, keys: Keys) -> list[bytes]:
        return [self._prefix + object_name(space, key.tobytes()).encode() for key in keys]

    def _there(self, batch: Batch, names: list[bytes], deadline: float) -> npt.NDArray[np.bool_]:
        """Which blocks are there already, in full length and under a right header."""
        questions = [
            question
            for name in names
            for question in (Request((b"STRLEN", name), name), Request((b"GETRANGE", name, *_HEAD), name))
        ]
        answers = self._run(questions, deadline)
        there = np.zeros(len(batch), np.bool_)
        for at, (size, head) in enumerate(zip(answers[::2], answers[1::2])):
            header = unpack(head) if isinstance(head, bytes) else None
            if header is not None and size == HEADER_BYTES + batch.space.block_bytes:
                there[at] = belongs(header, batch.space, batch.keys[at].tobytes())
        return there

    def _run(self, requests: Sequence[Request], deadline: float) -> list[Reply]:
        """Replies, in which only errors about single blocks are left."""
        if self._closed:
            raise TierUnavailable(f"the tier {self.name!r} is closed")
        if not requests:
            return []
        replies = self._nodes.run(requests, deadline)
        for reply in replies:
            if isinstance(reply, Refusal) and reply.code not in (_NOT_A_STRING, _FULL):
                raise Unwilling(self._where, reply.code, self._secret.scrub(reply.text))
        return replies


def open_tier(location: str, options: Mapping[str, str], name: str) -> ValkeyTier:
    """The tier at an address; connects to nothing yet. Raises ConfigError for what cannot be used."""
    return ValkeyTier(name, settings_of(location, options))
