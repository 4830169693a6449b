"""One connection to a Valkey or Redis server, on which every wait ends with a deadline.

Covers connecting (TCP, Unix socket, TLS), the handshake, and flights of commands whose large values go from and to the
caller's buffers without a copy. Does not cover which server a key belongs to (`valkey_nodes.py`) or what the values
mean (`valkey.py`).

The client library makes the handshake and names the server's errors. Its connection runs on a `_DeadlineSocket`,
because its own timeouts bound one read each, not a whole call. Values do not pass through it: it would copy them, when
it packs a command and again when it parses an answer.

Answers carry no names: which question one belongs to is known from the order alone. So a connection on which a wait
ran out, or anything else went wrong, is closed (`Node.link` in `valkey_nodes.py` does that) and never used again: its
late answers would be taken for those to later questions.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from redis.connection import AbstractConnection

__all__ = ["Address", "Link", "Misfit", "Refusal", "Reply", "Request", "Secret", "Sink"]

_BUFFER_BYTES = 16 << 10
"""What is read ahead of a payload and copied into it: little against a block of 64 KiB, and one read for small ones."""
_SCATTERED = 512
"""Buffers in one system call; Linux takes 1024."""
_FLIGHT_BYTES = 8 << 20
"""Answers that may be outstanding at once: the server holds them in memory of its own until they are sent."""

_TEXT_BYTES = 1 << 20
"""No answer but a value is longer: what says so was damaged on its way, and is not worth the memory."""


@dataclass(frozen=True, slots=True)
class Secret:
    """Who we are to the server. Its texts are never printed."""

    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)

    def scrub(self, text: str) -> str:
        """The text without them: a server may repeat a command that it did not understand."""
        for word in (self.password, self.username):
            if word and word != "default":
                text = text.replace(word, "***")
        return text


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: `host` and `port`, or the Unix socket at `path`."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Misfit(Enum):
    """The value has another length than the sink that was to take it, and was thrown away."""

    MISFIT = "misfit"


@dataclass(frozen=True, slots=True)
class Refusal:
    """The server's error to one command."""

    code: str
    """Its first word: ERR, OOM, MOVED, ..."""
    text: str


@dataclass(frozen=True, slots=True)
class Sink:
    """Where a value goes that must be exactly `head_bytes` and the payload: the head is the reply."""

    head_bytes: int
    payload: memoryview


@dataclass(frozen=True, slots=True)
class Request:
    """One command. `name` is the key it is about, by which a cluster routes it; empty for none."""

    words: tuple[bytes, ...]
    name: bytes = b""
    value: tuple[bytes, memoryview] | None = None
    """Head and payload that together are the word in front of `tail`."""
    tail: tuple[bytes, ...] = ()
    sink: Sink | None = None

    def pieces(self) -> list[bytes | memoryview]:
        """The command as it goes over the wire, payloads uncopied."""
        count = len(self.words) + len(self.tail) + (self.value is not None)
        front = b"*%d\r\n%s" % (count, b"".join(map(_bulk, self.words)))
        if self.value is None:
            return [front + b"".join(map(_bulk, self.tail))]
        head, payload = self.value
        front += b"$%d\r\n%s" % (len(head) + len(payload), head)
        return [front, payload, b"\r\n" + b"".join(map(_bulk, self.tail))]

    @property
    def answer_bytes(self) -> int:
        """About how many bytes the answer has."""
        return 64 if self.sink is None else self.sink.head_bytes + len(self.sink.payload)


Reply = int | bytes | None | Refusal | Misfit
"""A number, a text (of a sink: the head, and the payload is filled in), nothing there, or why not."""


class _DeadlineSocket:
    """A connected socket of which every wait ends at `deadline`, with TimeoutError. What redis-py needs of a socket."""

    def __init__(self, raw: socket.socket, deadline: float) -> None:
        self.raw = raw
        self.deadline = deadline

    def armed(self) -> socket.socket:
        """The socket, for one wait."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline is over")
        self.raw.settimeout(left)
        return self.raw

    def recv(self, size: int) -> bytes:
        return self.armed().recv(size)

    def recv_into(self, *arguments: Any) -> int:
        return self.armed().recv_into(*arguments)

    def sendall(self, data: bytes | memoryview) -> None:
        self.armed().sendall(data)  # its timeout is for all of it together

    def settimeout(self, timeout: float | None) -> None:
        """The deadline rules; redis-py's own timeouts do not."""

    def shutdown(self, how: int) -> None:
        self.raw.shutdown(how)

    def close(self) -> None:
        self.raw.close()

    def fileno(self) -> int:
        return self.raw.fileno()


class _Connection(AbstractConnection):
    """redis-py's handshake over a socket that we opened."""

    def __init__(self, stream: _DeadlineSocket, address: Address, secret: Secret, db: int) -> None:
        self._stream = stream
        self._address = address
        self.port = address.port
        super().__init__(
            db=db, username=secret.username or None, password=secret.password or None, protocol=3, driver_info=None,
            socket_timeout=None, socket_connect_timeout=None,
        )  # fmt: skip

    @property
    def host(self) -> str:
        return self._address.host

    @host.setter
    def host(self, value: str) -> None:
        raise AttributeError("the socket is connected already")

    def _connect(self) -> _DeadlineSocket:
        return self._stream

    def _host_error(self) -> str:
        return str(self._address)

    def repr_pieces(self) -> list[tuple[str, object]]:
        return [("address", str(self._address)), ("db", self.db)]


class Link:
    """One connection, after its handshake. For one thread at a time.

    Raises what sockets raise (OSError, TimeoutError at the deadline) and redis-py's RedisError; the caller closes it
    then.
    """

    def __init__(
        self, address: Address, secret: Secret, db: int, context: ssl.SSLContext | None, deadline: float
    ) -> None:
        self._stream = _DeadlineSocket(_connected(address, context, deadline), deadline)
        self._scatters = context is None  # TLS has no sendmsg
        self._buffer = bytearray(_BUFFER_BYTES)
        self._at = self._end = 0
        try:
            self._connection = _Connection(self._stream, address, secret, db)
            with _understood():
                self._connection.connect()  # type: ignore[no-untyped-call]
        except BaseException:
            self._stream.close()
            raise

    def close(self) -> None:
        """Close it; what the server still says is lost. Idempotent."""
        self._stream.close()

    def fileno(self) -> int:
        """-1 once closed."""
        return self._stream.fileno()

    def exchange(self, requests: Sequence[Request], deadline: float) -> list[Reply]:
        """Send all, in flights that bound what the server has to hold, and take the replies, in their order."""
        self._stream.deadline = deadline
        replies: list[Reply] = []
        waiting: deque[Request] = deque()
        flying = 0
        for flight in _flights(requests):
            size = sum(each.answer_bytes for each in flight)
            while waiting and flying + size > _FLIGHT_BYTES:
                flying -= waiting[0].answer_bytes
                replies.append(self._reply(waiting.popleft().sink))
            self._send([piece for each in flight for piece in each.pieces()])
            waiting.extend(flight)
            flying += size
        replies += [self._reply(each.sink) for each in waiting]
        return replies

    def ask(self, *words: str, deadline: float) -> Any:
        """One command without large values, through the client library, which takes the answer apart."""
        self._stream.deadline = deadline
        with _understood():
            self._connection.send_command(*words)  # type: ignore[no-untyped-call]
            return self._connection.read_response(disconnect_on_error=False)

    def _send(self, pieces: list[bytes | memoryview]) -> None:
        if not self._scatters:
            for piece in pieces:
                self._stream.sendall(piece)
            return
        at = 0
        while at < len(pieces):
            sent = self._stream.armed().sendmsg(pieces[at : at + _SCATTERED])
            while at < len(pieces) and sent >= len(pieces[at]):
                sent -= len(pieces[at])
                at += 1
            if sent:
                pieces[at] = memoryview(pieces[at])[sent:]

    def _reply(self, sink: Sink | None) -> Reply:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"$":
            return self._bulk(_number(rest), sink)
        if kind == b":":
            return _number(rest)
        if kind == b"+":
            return rest
        if kind == b"_":
            return None
        if kind == b"=":  # a text with its format before it ("txt:")
            text = self._bulk(_number(rest), None)
            return text[4:] if isinstance(text, bytes) else text
        if kind == b"-":
            return _refusal(rest)
        raise ConnectionError(f"the server said {line[:40]!r}, which is no answer to what was asked")

    def _bulk(self, size: int, sink: Sink | None) -> Reply:
        if size < 0:
            return None
        if sink is None:
            if size > _TEXT_BYTES:
                raise ConnectionError(f"the server announced a text of {size} bytes, which is none that was asked for")
            value = bytearray(size)
            self._fill(memoryview(value))
            self._crlf()
            return bytes(value)
        if size != sink.head_bytes + len(sink.payload):
            self._skip(size)
            self._crlf()
            return Misfit.MISFIT
        head = bytearray(sink.head_bytes)
        self._fill(memoryview(head))
        self._fill(sink.payload)
        self._crlf()
        return bytes(head)

    def _line(self) -> bytes:
        while (stop := self._buffer.find(b"\r\n", self._at, self._end)) < 0:
            if self._at:
                self._buffer[: self._end - self._at] = self._buffer[self._at : self._end]
                self._at, self._end = 0, self._end - self._at
            if self._end == len(self._buffer):
                raise ConnectionError("the server's answer is no protocol of Valkey's or Redis's")
            self._end += self._receive(memoryview(self._buffer)[self._end :])
        line = bytes(self._buffer[self._at : stop])
        self._at = stop + 2
        return line

    def _fill(self, view: memoryview) -> None:
        """The next bytes into the view: what was read ahead, then straight from the socket."""
        ready = min(len(view), self._end - self._at)
        view[:ready] = memoryview(self._buffer)[self._at : self._at + ready]
        self._at += ready
        while ready < len(view):
            ready += self._receive(view[ready:])

    def _skip(self, size: int) -> None:
        waste = memoryview(bytearray(min(size, 1 << 20)))
        while size:
            step = min(size, len(waste))
            self._fill(waste[:step])
            size -= step

    def _crlf(self) -> None:
        end = bytearray(2)
        self._fill(memoryview(end))
        if end != b"\r\n":
            raise ConnectionError("the server's answer is longer than it said")

    def _receive(self, view: memoryview) -> int:
        got = self._stream.recv_into(view)
        if not got:
            raise ConnectionResetError("the server closed the connection")
        return got


def _flights(requests: Sequence[Request]) -> Iterable[list[Request]]:
    """Runs of requests whose answers are small enough to be sent for at once."""
    flight: list[Request] = []
    size = 0
    for each in requests:
        if flight and (size + each.answer_bytes > _FLIGHT_BYTES // 4 or len(flight) == _SCATTERED):
            yield flight
            flight, size = [], 0
        flight.append(each)
        size += each.answer_bytes
    if flight:
        yield flight


@contextmanager
def _understood() -> Iterator[None]:
    """What the client library stumbles over in an answer that is not the protocol's, as an error of the connection."""
    try:
        yield
    except (AttributeError, LookupError, MemoryError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise ConnectionError(f"the server's answer makes no sense ({type(error).__name__})") from error


def _number(text: bytes) -> int:
    if not text.lstrip(b"-").isdigit() or len(text) > 20:
        raise ConnectionError(f"the server said {text[:40]!r} where a number belongs")
    return int(text)


def _bulk(word: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(word), word)


def _refusal(line: bytes) -> Refusal:
    text = line.decode(errors="replace")
    return Refusal(text.partition(" ")[0], text)


def _connected(address: Address, context: ssl.SSLContext | None, deadline: float) -> socket.socket:
    """A connected socket, through TLS where there is a context. Raises OSError, TimeoutError past the deadline."""
    if address.path:
        raw = socket.socket(socket.AF_UNIX)
        return _opened(raw, address.path, None, "", deadline)
    failure: OSError = OSError(f"{address.host} has no address")
    for family, kind, number, _, where in socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM):
        raw = socket.socket(family, kind, number)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            return _opened(raw, where, context, address.host, deadline)
        except OSError as error:
            failure = error
    raise failure


def _opened(
    raw: socket.socket, where: Any, context: ssl.SSLContext | None, host: str, deadline: float
) -> socket.socket:
    stream = _DeadlineSocket(raw, deadline)
    try:
        stream.armed().connect(where)
        if context is None:
            return raw
        shaken = context.wrap_socket(raw, server_hostname=host, do_handshake_on_connect=False)
        stream.raw = shaken
        stream.armed()
        shaken.do_handshake()  # the timeout is for the whole handshake
        return shaken
    except BaseException:
        stream.close()
        raise
