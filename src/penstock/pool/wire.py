"""The control socket's messages: length-prefixed msgpack, strictly typed, bounded. Never on the data path.

A connection is one client's: it says Hello, gets a lane, takes the lane's lock, confirms, and then may ask for spaces.
Administrative requests need no Hello.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Any

import msgspec

from penstock.errors import ConfigError, KeeperError, NoKeeper, NotOurs

__all__ = [
    "Confirm",
    "Error",
    "Forget",
    "Hello",
    "Json",
    "Names",
    "Ok",
    "Query",
    "Request",
    "SpaceIs",
    "SpaceOf",
    "Welcome",
]

PROTOCOL = 1
MAX_FRAME = 1 << 20
_LENGTH = struct.Struct("<I")
# The longest path a Unix socket can have, with its terminating zero, on Linux: 108.
_MAX_SOCKET_PATH = 107


class Hello(msgspec.Struct, frozen=True, tag="hello", forbid_unknown_fields=True):
    """A client arrives. `lane` >= 0: it has had this lane, under this epoch, since before the keeper started."""

    protocol: int
    name: str
    lane: int = -1
    epoch: int = 0
    uuid: bytes = b""


class Welcome(msgspec.Struct, frozen=True, tag="welcome", forbid_unknown_fields=True):
    """The lane. Two descriptors come with it: the keeper's bell, and the client's own."""

    path: str
    uuid: bytes
    lane: int
    epoch: int
    verify: bool


class Confirm(msgspec.Struct, frozen=True, tag="confirm", forbid_unknown_fields=True):
    """The client holds its lane's lock."""


class SpaceOf(msgspec.Struct, frozen=True, tag="space", forbid_unknown_fields=True):
    """Register a space, or find it registered."""

    digest: bytes
    root: bytes
    block_bytes: int
    block_tokens: int
    n_segments: int
    segment_bytes: int
    label: str = ""


class SpaceIs(msgspec.Struct, frozen=True, tag="space_is", forbid_unknown_fields=True):
    id: int
    slot_class: int


class Names(msgspec.Struct, frozen=True, tag="names", forbid_unknown_fields=True):
    """What session and tenant digests stand for, for people who look."""

    names: dict[int, str]


class Forget(msgspec.Struct, frozen=True, tag="forget", forbid_unknown_fields=True):
    """Evict these blocks of a space, and what continues their chains. Answered by `Json` with how many are `left`."""

    digest: bytes
    keys: bytes
    """n x 16."""


class Query(msgspec.Struct, frozen=True, tag="query", forbid_unknown_fields=True):
    """An administrative question: stat, ls, fsck, or kick with a client's lane as argument."""

    what: str
    argument: int = -1


class Ok(msgspec.Struct, frozen=True, tag="ok", forbid_unknown_fields=True):
    pass


class Json(msgspec.Struct, frozen=True, tag="json", forbid_unknown_fields=True):
    body: dict[str, Any]


class Error(msgspec.Struct, frozen=True, tag="error", forbid_unknown_fields=True):
    text: str


Request = Hello | Confirm | SpaceOf | Names | Forget | Query
Reply = Welcome | SpaceIs | Ok | Json | Error

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Request)
_replies = msgspec.msgpack.Decoder(Reply)
# Texts that are not UTF-8 and maps nested thousands deep are told in errors of their own.
_NONSENSE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def encode(message: msgspec.Struct) -> bytes:
    """A frame: u32 little-endian length, then msgpack."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise ConfigError(f"a message of {len(body)} bytes; at most {MAX_FRAME}")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into messages. Raises KeeperError at the first thing that is not one."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[Any] = _requests) -> None:
        self._buffer = bytearray()
        self._decoder = decoder

    def feed(self, data: bytes) -> list[Any]:
        """The messages that are complete now."""
        self._buffer += data
        messages = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME:
                raise KeeperError(f"a frame of {length} bytes; at most {MAX_FRAME}")
            if len(self._buffer) < _LENGTH.size + length:
                break
            body = bytes(self._buffer[_LENGTH.size : _LENGTH.size + length])
            del self._buffer[: _LENGTH.size + length]
            try:
                messages.append(self._decoder.decode(body))
            except _NONSENSE as error:
                raise KeeperError(f"not a message: {error}") from error
        return messages


def runtime_dir(*, create: bool = False) -> Path:
    """The user's folder of control sockets: short, private, gone with the login or the boot."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(base) / "penstock" if base and os.access(base, os.W_OK) else Path(f"/tmp/penstock-{os.geteuid()}")
    if create:
        path.mkdir(mode=0o700, exist_ok=True)
    if path.exists():
        status = path.lstat()
        if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o022:
            raise NotOurs(f"{path} is not a private directory of this user; remove it or set XDG_RUNTIME_DIR")
    return path


def socket_path(name: str, *, create: bool = False, ending: str = ".sock") -> Path:
    """The control socket of a pool. Raises ConfigError where the path is too long for a socket."""
    folder = runtime_dir(create=create)
    path = folder / f"{name}{ending}"
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        path = folder / (hashlib.blake2b(name.encode(), digest_size=8).hexdigest() + ending)
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        raise ConfigError(f"{path} is too long for a socket ({_MAX_SOCKET_PATH} bytes); set a shorter XDG_RUNTIME_DIR")
    return path


class Connection:
    """A client's end of the control socket: one question, one answer, in order. Not thread-safe, but for `hang_up`."""

    def __init__(self, name: str, *, timeout_s: float = 5.0) -> None:
        path = socket_path(name)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.socket.settimeout(timeout_s)
        try:
            self.socket.connect(os.fspath(path))
        except OSError as error:
            self.socket.close()
            raise NoKeeper(f"no keeper serves pool {name!r}; start one with `penstock serve --name {name}`") from error

    def ask(self, request: Request, *, n_fds: int = 0) -> tuple[Reply, list[int]]:
        """Send a request and wait for its reply and the descriptors that come with it.

        Raises KeeperError with the keeper's own words if it refuses, and NoKeeper if it is gone or too slow.
        """
        fds: list[int] = []
        try:
            self.socket.sendall(encode(request))
            data, fds, _, _ = socket.recv_fds(self.socket, _LENGTH.size, n_fds)
            data += self._receive(_LENGTH.size - len(data))
            (length,) = _LENGTH.unpack(data)
            if length > MAX_FRAME:
                raise KeeperError("the keeper's answer is not one; is something else behind its socket?")
            reply = _replies.decode(self._receive(length))
        except (OSError, *_NONSENSE) as error:
            for fd in fds:
                os.close(fd)
            # An answer that comes later would be taken for the next question's.
            self.hang_up()
            raise NoKeeper(f"the keeper did not answer: {error}") from error
        if isinstance(reply, Error):
            raise KeeperError(reply.text)
        return reply, fds

    def _receive(self, n: int) -> bytes:
        data = b""
        while len(data) < n:
            part = self.socket.recv(n - len(data))
            if not part:
                raise ConnectionResetError("connection closed")
            data += part
        return data

    def hang_up(self) -> None:
        """End the conversation: who waits for an answer gives up, and nobody asks again."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.socket.close()
