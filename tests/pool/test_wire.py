"""The control socket's framing: what is cut, refused and bounded."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
import threading
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError, KeeperError, NoKeeper, NotOurs
from penstock.pool import wire
from penstock.pool.wire import (
    MAX_FRAME,
    PROTOCOL,
    Confirm,
    Connection,
    Error,
    FrameReader,
    Hello,
    Names,
    Ok,
    Query,
    Request,
    SpaceOf,
    encode,
)

texts = st.text(max_size=20)
requests: st.SearchStrategy[Request] = st.one_of(
    st.builds(Hello, st.integers(0, 9), texts, st.integers(-1, 99), st.integers(0, 1 << 60), st.binary(max_size=16)),
    st.just(Confirm()),
    st.builds(SpaceOf, st.binary(max_size=32), st.binary(max_size=16), *[st.integers(0, 1 << 40)] * 4, texts),
    st.builds(Names, st.dictionaries(st.integers(-(1 << 63), (1 << 63) - 1), texts, max_size=3)),
    st.builds(Query, texts, st.integers(-1, 99)),
)


@given(sent=st.lists(requests, max_size=5), cuts=st.lists(st.integers(1, 30), max_size=60))
def test_any_cutting_gives_the_same_requests(sent: list[Request], cuts: list[int]) -> None:
    reader, got, data = FrameReader(), [], b"".join(encode(request) for request in sent)
    for cut in cuts:
        got += reader.feed(data[:cut])
        data = data[cut:]
    assert got + reader.feed(data) == sent


@given(st.lists(st.binary(max_size=200), max_size=8))
def test_garbage_is_refused_or_waited_for(pieces: list[bytes]) -> None:
    reader = FrameReader()
    try:
        for piece in pieces:
            reader.feed(piece)
    except KeeperError:
        pass


@given(st.binary(max_size=100))
def test_a_framed_body_is_a_request_or_refused(body: bytes) -> None:
    try:
        (request,) = FrameReader().feed(struct.pack("<I", len(body)) + body)
    except KeeperError:
        return
    assert isinstance(request, Request)


@pytest.mark.parametrize(
    "body",
    [
        {"type": "hello", "protocol": 1},  # a field is missing
        {"type": "hello", "protocol": 1, "name": "x", "more": 1},  # one too many
        {"type": "hello", "protocol": "1", "name": "x"},  # of another type
        {"type": "welcome", "path": "", "uuid": b"", "lane": 0, "epoch": 0, "verify": True},  # a reply
        {"type": "nonsense"},
        [],
        None,
    ],
)
def test_only_exact_requests_pass(body: object) -> None:
    data = msgspec.msgpack.encode(body)
    with pytest.raises(KeeperError, match="not a message"):
        FrameReader().feed(struct.pack("<I", len(data)) + data)


def test_frames_are_bounded() -> None:
    with pytest.raises(KeeperError, match="at most"):
        FrameReader().feed(struct.pack("<I", MAX_FRAME + 1))
    with pytest.raises(ConfigError, match="at most"):
        encode(Query("x" * (MAX_FRAME + 1)))


def test_paths_fit_into_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as base:
        for length, fits in ((30, True), (70, True), (100, False)):
            folder = Path(base) / ("d" * (length - len(base) - 1))
            folder.mkdir()
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
            if fits:
                one, other = wire.socket_path("a" * 40, create=True), wire.socket_path("b" * 40)
                assert len(os.fsencode(one)) <= 107 and one != other
            else:
                with pytest.raises(ConfigError, match="shorter XDG_RUNTIME_DIR"):
                    wire.socket_path("a" * 40, create=True)


def test_the_runtime_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = wire.runtime_dir(create=True)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o722)
    with pytest.raises(NotOurs, match="XDG_RUNTIME_DIR"):
        wire.runtime_dir()
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotOurs, match="XDG_RUNTIME_DIR"):
        wire.runtime_dir()


class Server:
    """A listener that gives one connection the bytes it was made with."""

    def __init__(self, name: str, answer: bytes) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path = wire.socket_path(name, create=True)
        path.unlink(missing_ok=True)
        self.listener.bind(os.fspath(path))
        self.listener.listen(1)
        self.thread = threading.Thread(target=self._serve, args=(answer,))
        self.thread.start()

    def _serve(self, answer: bytes) -> None:
        connection, _ = self.listener.accept()
        connection.recv(1 << 16)
        connection.sendall(answer)
        connection.close()

    def close(self) -> None:
        self.thread.join()
        self.listener.close()


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (b"", NoKeeper, "closed"),
        (b"\1", NoKeeper, "closed"),
        (struct.pack("<I", 10) + b"abc", NoKeeper, "closed"),
        (struct.pack("<I", 3) + b"\xff\xff\xff", NoKeeper, "did not answer"),
        (struct.pack("<I", MAX_FRAME + 1), KeeperError, "behind its socket"),
        (encode(Error("no, because of reasons")), KeeperError, "no, because of reasons"),
    ],
)
def test_whatever_answers(
    answer: bytes, error: type[KeeperError], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    server = Server("x", answer)
    connection = Connection("x")
    try:
        with pytest.raises(error, match=text):
            connection.ask(Hello(PROTOCOL, "me"))
    finally:
        connection.close()
        server.close()


def test_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    server = Server("x", encode(Ok()))
    connection = Connection("x")
    assert connection.ask(Confirm()) == (Ok(), [])
    connection.close()
    server.close()
    with pytest.raises(NoKeeper, match="penstock serve --name y"):
        Connection("y")
