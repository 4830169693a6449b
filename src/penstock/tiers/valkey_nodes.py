"""The servers behind a Valkey tier: one, or the nodes of a cluster.

Covers pools of connections, what the errors of a connection or server mean to a tier, and in a cluster who holds which
key, also while that changes (resharding, failover). Does not cover bytes on the wire (`valkey_link.py`) or what is
stored (`valkey.py`).

Slots, MOVED and ASK are as in the Valkey cluster specification, "Redirection and resharding".
"""

from __future__ import annotations

import itertools
import re
import select
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import redis
from redis.crc import key_slot

from penstock.errors import TierError, TierTimeout, TierUnavailable
from penstock.tiers.valkey_link import Address, Link, Refusal, Reply, Request
from penstock.tiers.valkey_settings import Settings

__all__ = ["Cluster", "Node", "Nodes", "Unwilling"]

_MEMORY_EVERY_S = 5.0
_MEMORY = Request((b"INFO", b"memory"))
_ASKING = Request((b"ASKING",))
_SLOTS = 16384
_REDIRECTIONS = 6
"""How often one call follows a key; a key that moves on for longer is a cluster in trouble."""

_REDIRECTION = re.compile(r"(?:MOVED|ASK) \d+ (.*):(\d{1,5})")
_USED = re.compile(rb"^used_memory:(\d+)\r?$", re.MULTILINE)
_ROOM = re.compile(rb"^maxmemory:(\d+)\r?$", re.MULTILINE)

_REMEDIES = {
    "NOAUTH": "it wants a password: set PENSTOCK_VALKEY_PASSWORD or the option credentials",
    "WRONGPASS": "it does not know this user and password: check PENSTOCK_VALKEY_USERNAME and "
    "PENSTOCK_VALKEY_PASSWORD, or the file that the option credentials names",
    "NOPERM": "this user may not do that: it needs get, getrange, strlen, set, unlink, info and cluster",
    "READONLY": "it is a replica: name its primary, or use cluster=true",
    "LOADING": "it still loads its data; it will answer when it is done",
    "CLUSTERDOWN": "a part of the cluster has no primary: see its `cluster info`, and add replicas",
    "MASTERDOWN": "its primary is gone: name the new one, or use cluster=true",
    "MISCONF": "it cannot save to its disk and takes nothing until it can: see its log",
    "MOVED": "it is part of a cluster: use cluster=true",
    "ASK": "it is part of a cluster: use cluster=true",
    "OOM": "it is full: raise its maxmemory, or set its maxmemory-policy to allkeys-lru",
}
_OLD = "it is too old, or its commands were renamed: Redis 6 or any Valkey is needed"
_CODES: dict[type[Exception], str] = {
    redis.exceptions.AuthenticationError: "NOAUTH",
    redis.exceptions.NoPermissionError: "NOPERM",
    redis.exceptions.BusyLoadingError: "LOADING",
    redis.exceptions.ReadOnlyError: "READONLY",
    redis.exceptions.ClusterDownError: "CLUSTERDOWN",
}
"""The client library names some errors by their class and takes the word away."""


class Unwilling(TierUnavailable):
    """A server answered, with an error that is about more than one block."""

    def __init__(self, where: Address | str, code: str, text: str) -> None:
        remedy = _REMEDIES.get(code, _OLD if "unknown command" in text else "see its log")
        super().__init__(f"the valkey server at {where} said {text!r}: {remedy}")


class Nodes(Protocol):
    """Whoever takes requests: one server or a cluster of them."""

    def run(self, requests: Sequence[Request], deadline: float) -> list[Reply]:
        """A reply to each request, in their order. Raises TierError where there is none for all of them."""

    def memory(self) -> tuple[int | None, int | None]:
        """Bytes that fit in and bytes in use, as last seen; None where unknown or without a limit."""

    def close(self) -> None:
        """Close all connections that nobody uses, the others when their call ends. Idempotent."""


class Node:
    """One server, and the connections to it that wait to be used again."""

    def __init__(self, address: Address, settings: Settings, counts: Counter[str]) -> None:
        self.address = address
        self._settings = settings
        self._counts = counts
        self._idle: list[Link] = []
        self._lock = threading.Lock()
        self._closed = False
        self._memory: tuple[int | None, int | None] = (None, None)
        self._memory_due = 0.0

    def run(self, requests: Sequence[Request], deadline: float) -> list[Reply]:
        """See `Nodes.run`; what an error to one request means is the caller's to say."""
        look = self._look_due()
        with self.link(deadline) as link:
            replies = link.exchange([*requests, _MEMORY] if look else requests, deadline)
        if look:
            self._memory = _memory_of(replies.pop()) or self._memory
        return replies

    def memory(self) -> tuple[int | None, int | None]:
        return self._memory

    @contextmanager
    def link(self, deadline: float) -> Iterator[Link]:
        """A connection for one call. Whatever goes wrong on it closes it; errors come out as TierError."""
        link = self._take() or self._open(deadline)
        try:
            yield link
        except BaseException as error:
            link.close()
            self._counts["broken_connections"] += 1
            if not isinstance(error, OSError | redis.RedisError):
                raise
            raise self._told(error) from None
        self._give_back(link)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for link in idle:
            link.close()

    def _take(self) -> Link | None:
        """An idle connection that is still quiet: one with something to read was closed by the server, or is not ours
        to understand."""
        while True:
            with self._lock:
                if self._closed:
                    raise TierUnavailable("the tier is closed")
                if not self._idle:
                    return None
                link = self._idle.pop()
            if not _readable(link):
                return link
            link.close()

    def _give_back(self, link: Link) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(link)
                return
        link.close()

    def _open(self, deadline: float) -> Link:
        known = self._settings
        self._counts["connects"] += 1
        by = min(deadline, time.monotonic() + known.connect_timeout_s)
        try:
            return Link(self.address, known.secret, known.db, known.context, by)
        except (OSError, redis.RedisError) as error:
            told = self._told(error)
            if isinstance(told, TierTimeout) and by < deadline:
                told = TierUnavailable(
                    f"no connection to the valkey server at {self.address} within connect_timeout, "
                    f"{known.connect_timeout_s:g} s: is it there, and is nothing in between?"
                )
            # Without what caused it: its text may repeat a command with the password in it.
            raise told from None

    def _told(self, error: Exception) -> TierError:
        """What the tier's caller gets to see; never a secret."""
        text = self._settings.secret.scrub(str(error))
        if isinstance(error, TimeoutError | redis.TimeoutError):
            return TierTimeout(f"the valkey server at {self.address} did not answer by the deadline")
        if isinstance(error, ssl.SSLCertVerificationError):
            return TierUnavailable(
                f"the certificate of the valkey server at {self.address} is not trusted ({text}): name its CA with ca="
            )
        code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), "")
        if code or isinstance(error, redis.ResponseError):
            return Unwilling(self.address, code or text.partition(" ")[0], text)
        return TierUnavailable(
            f"the valkey server at {self.address} is not there or went away ({text}): is it running?"
        )

    def _look_due(self) -> bool:
        now = time.monotonic()
        with self._lock:
            if now < self._memory_due:
                return False
            self._memory_due = now + _MEMORY_EVERY_S
            return True


class Cluster:
    """The nodes of a cluster. Finds out who holds what at the first call, and again after anything went wrong."""

    def __init__(self, settings: Settings, counts: Counter[str]) -> None:
        self._settings = settings
        self._counts = counts
        self._nodes: dict[Address, Node] = {}
        self._owners: list[Address | None] = [None] * _SLOTS
        self._known: list[Address] = []
        """Nodes that were part of it when last asked, primaries first."""
        self._stale = True
        self._closed = False
        self._lock = threading.Lock()
        self._asking = threading.Lock()

    def run(self, requests: Sequence[Request], deadline: float) -> list[Reply]:
        self._refresh(deadline)
        replies: list[Reply] = [None] * len(requests)
        pending = [(at, self._owner(each), False) for at, each in enumerate(requests)]
        for _ in range(_REDIRECTIONS):
            moved: list[tuple[int, Address, bool]] = []
            pending.sort(key=lambda each: (str(each[1]), each[2], each[0]))
            for (address, asking), part in itertools.groupby(pending, key=lambda each: each[1:]):
                places = [at for at, _, _ in part]
                for at, reply in zip(places, self._at(address, [requests[at] for at in places], asking, deadline)):
                    replies[at] = reply
                    if (target := self._redirection(reply, address)) is not None:
                        moved.append((at, *target))
            if not moved:
                return replies
            pending = moved
        raise TierUnavailable(f"{len(pending)} keys moved on {_REDIRECTIONS} times: see the cluster's `cluster info`")

    def memory(self) -> tuple[int | None, int | None]:
        with self._lock:
            owners = {owner for owner in self._owners if owner is not None}
            seen = [self._nodes[owner].memory() for owner in owners if owner in self._nodes]
        rooms = [room for room, _ in seen if room is not None]
        used = [some for _, some in seen if some is not None]
        return sum(rooms) if rooms and len(rooms) == len(owners) else None, sum(used) if used else None

    def close(self) -> None:
        with self._lock:
            self._closed = True
            nodes = list(self._nodes.values())
        for node in nodes:
            node.close()

    def _at(self, address: Address, requests: list[Request], asking: bool, deadline: float) -> list[Reply]:
        if asking:  # holds for the one command that follows it
            requests = [each for pair in zip(itertools.repeat(_ASKING), requests) for each in pair]
        try:
            replies = self._node(address).run(requests, deadline)
        except TierError:
            self._stale = True
            raise
        for reply in replies:
            if isinstance(reply, Refusal) and reply.code == "CLUSTERDOWN":
                self._stale = True
                raise Unwilling(address, reply.code, reply.text)
        return replies[1::2] if asking else replies

    def _redirection(self, reply: Reply, asked: Address) -> tuple[Address, bool] | None:
        """Where the server sent us on, and whether for this one question only."""
        if not isinstance(reply, Refusal) or reply.code not in ("MOVED", "ASK"):
            return None
        self._counts["redirections"] += 1
        self._stale = self._stale or reply.code == "MOVED"
        target = _REDIRECTION.fullmatch(reply.text)
        if target is None:
            raise TierUnavailable(f"the valkey server at {asked} sends us to no address: {reply.text!r}")
        host, port = target.groups()
        return Address(host.strip("[]") or asked.host, int(port)), reply.code == "ASK"

    def _owner(self, request: Request) -> Address:
        owner = self._owners[key_slot(request.name)]
        if owner is None:
            self._stale = True
            raise TierUnavailable(
                f"nobody in the cluster holds slot {key_slot(request.name)}: {_REMEDIES['CLUSTERDOWN']}"
            )
        return owner

    def _node(self, address: Address) -> Node:
        with self._lock:
            if self._closed:
                raise TierUnavailable("the tier is closed")
            if address not in self._nodes:
                self._nodes[address] = Node(address, self._settings, self._counts)
            return self._nodes[address]

    def _refresh(self, deadline: float) -> None:
        """Ask one node after the other who holds what, where that may have changed."""
        if not self._stale:
            return
        if not self._asking.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TierTimeout("no node of the cluster said by the deadline who holds what")
        try:
            if self._stale:
                self._ask_around(deadline)
        finally:
            self._asking.release()

    def _ask_around(self, deadline: float) -> None:
        failure: TierError | None = None
        for address in dict.fromkeys([*self._known, *self._settings.addresses]):
            # A node that stands still may not use up the time that is there for all of them.
            now = time.monotonic()
            by = min(deadline, now + self._settings.connect_timeout_s, now + (deadline - now) / 2)
            self._counts["topology_questions"] += 1
            try:
                with self._node(address).link(by) as link:
                    rows = link.ask("CLUSTER", "SLOTS", deadline=by)
            except TierError as error:
                failure = error
                continue
            self._learn(rows, address)
            return
        if isinstance(failure, TierTimeout) and time.monotonic() < deadline:
            raise TierUnavailable("no node of the cluster says who holds what: is one of those in the address running?")
        raise failure or TierUnavailable("the cluster's address names no node")

    def _learn(self, rows: object, asked: Address) -> None:
        owners: list[Address | None] = [None] * _SLOTS
        ranks: dict[int, list[Address]] = {}
        try:
            for first, last, *nodes in rows:  # type: ignore[attr-defined]
                addresses = [Address(host.decode() if host else asked.host, int(port)) for host, port, *_ in nodes]
                owners[first : last + 1] = [addresses[0]] * (last + 1 - first)
                for rank, address in enumerate(addresses):
                    ranks.setdefault(rank, []).append(address)
        except (AttributeError, LookupError, TypeError, ValueError):
            raise TierUnavailable(f"the server at {asked} does not say who holds what: is it a cluster?") from None
        with self._lock:
            self._owners = owners[:_SLOTS]
            self._known = [address for rank in sorted(ranks) for address in ranks[rank]]
            self._stale = False
            gone = [self._nodes.pop(address) for address in set(self._nodes) - set(self._known)]
        for node in gone:
            node.close()


def _memory_of(reply: Reply) -> tuple[int | None, int | None] | None:
    if not isinstance(reply, bytes):
        return None  # not allowed to ask
    room, used = _ROOM.search(reply), _USED.search(reply)
    return (int(room[1]) or None) if room else None, int(used[1]) if used else None


def _readable(link: Link) -> bool:
    poll = select.poll()
    poll.register(link.fileno(), select.POLLIN)
    return bool(poll.poll(0))
