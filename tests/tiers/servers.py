"""Real servers for the tests of shared stores: started on loopback on free ports, waited for, ended by their pid.

`Daemon` is any server that is a process of ours; `ValkeyServer` is valkey-server or redis-server, whichever is there
(`make test` installs one where it may). A test that needs one takes `need_valkey()` first, which skips where none is.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support import PATIENCE_S, until, wait_stopped

LOOPBACK = "127.0.0.1"


def free_port() -> int:
    """A TCP port on loopback that nobody listens on. Somebody else may take it: `Daemon.start` tries anew."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def program(*names: str) -> str | None:
    """Where the first of these programs is: beside this Python, where `make` puts some, or on PATH."""
    where = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/bin"]
    )
    return next(filter(None, (shutil.which(name, path=where) for name in names)), None)


def listens(port: int) -> bool:
    """Whether somebody accepts connections there."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((LOOPBACK, port)) == 0


class Daemon:
    """A server in the foreground of a process of its own; what it prints goes to `folder`/`name`.log.

    Subclasses say what runs (`command`, asked at every start) and when it is `ready`.
    """

    name = "server"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.settled = False
        """Whether it ever was ready: from then on its address stays."""

    def move(self) -> None:
        """Choose other ports: it ended at its first start, so somebody may have taken them meanwhile."""

    def command(self) -> Sequence[str]:
        raise NotImplementedError

    def ready(self) -> bool:
        """Whether it answers; asked again and again. Errors of the connection are the subclass's to catch."""
        raise NotImplementedError

    @property
    def log(self) -> str:
        return (self.folder / f"{self.name}.log").read_text(errors="replace")

    @property
    def pid(self) -> int:
        assert self.process is not None, f"{self.name} does not run"
        return self.process.pid

    def start(self, *, tries: int = 3) -> None:
        """Start it and wait until it is ready. One that ends instead (its port was taken) is started anew."""
        assert self.process is None
        for left in reversed(range(tries)):
            self.launch()
            try:
                until(lambda: self._gone() or self.ready(), f"{self.name} is ready")
            except BaseException:
                self.kill()
                raise
            if not self._gone():
                self.settled = True
                return
            self.kill()
            assert left, f"{self.name} ended at once:\n{self.log[-2000:]}"
            if not self.settled:
                self.move()

    def launch(self) -> None:
        """Start it without waiting for it."""
        with (self.folder / f"{self.name}.log").open("ab") as sink:
            self.process = subprocess.Popen(
                self.command(), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT
            )

    def stop(self) -> None:
        """SIGTERM: the orderly end, in which it saves what it saves."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, also where it is stopped or gone; nothing of it is left afterwards."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP, and wait until it stands: the kernel still accepts connections for it, nobody answers."""
        os.kill(self.pid, signal.SIGSTOP)
        wait_stopped(self.pid)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> Daemon:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _gone(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None

    def _end(self, number: int) -> None:
        if self.process is None:
            return
        self.process.send_signal(number)  # does nothing where it is gone
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(PATIENCE_S)
            raise
        finally:
            self.process = None


# ---- Valkey and Redis


def valkey_program() -> str | None:
    """valkey-server, or else redis-server; None where neither is."""
    return program("valkey-server", "redis-server")


def need_valkey() -> str:
    """The server's path; skips the test where there is none, saying what to install."""
    pytest.importorskip("redis", reason="the redis client library is not installed (extra `valkey`)")
    found = valkey_program()
    if found is None:
        pytest.skip("no valkey-server or redis-server: apt-get install redis-server, or `make test` as root")
    return found


class ValkeyServer(Daemon):
    """One server: on loopback at `port`, on the Unix socket `unix`, and with TLS at `port` instead where asked to.

    Keeps nothing on disk unless `save()` is called. `password` is the default user's. `options` are further settings,
    name and value in turn, as on its command line (`"--maxmemory", "16mb"`).
    """

    name = "valkey"

    def __init__(
        self, folder: Path, *options: str, password: str = "", tls: tuple[Path, Path, Path] | None = None
    ) -> None:
        super().__init__(folder)
        self.options = options
        self.password = password
        self.tls = tls
        """Files of the CA's certificate, the server's and its key; None for plain TCP."""
        self.port = free_port()
        self.unix = folder / "s"

    def move(self) -> None:
        self.port = free_port()

    def command(self) -> Sequence[str]:
        where = ["--port", str(self.port)]
        if self.tls is not None:
            authority, certificate, key = map(str, self.tls)
            where = [
                "--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no",
                "--tls-ca-cert-file", authority, "--tls-cert-file", certificate, "--tls-key-file", key,
            ]  # fmt: skip
        secret = ["--requirepass", self.password] if self.password else []
        return [
            need_valkey(), *where, "--bind", LOOPBACK, "--unixsocket", str(self.unix), "--dir", str(self.folder),
            "--save", "", "--appendonly", "no", *secret, *self.options,
        ]  # fmt: skip

    def ready(self) -> bool:
        try:
            return self._over_unix("PING") == b"+PONG\r\n"
        except OSError:
            return False

    def listening(self) -> bool:
        """Whether it answers anything at all, be it that it is not ready."""
        try:
            return bool(self._over_unix("PING"))
        except OSError:
            return False

    def save(self) -> None:
        """Write everything to `folder`/dump.rdb, which the next start loads."""
        assert self._over_unix("SAVE") == b"+OK\r\n"

    def set(self, name: str, value: bytes) -> None:
        """Put a value there behind every client's back."""
        assert self._over_unix("SET", name, value) == b"+OK\r\n"

    def names(self) -> list[str]:
        """The names of all it holds."""
        return self._over_unix("KEYS", "*").decode().split("\r\n")[2::2]

    def ask(self, *words: str | bytes) -> str:
        """What it answers to one command, in short; fails where that is an error."""
        answer = self._over_unix(*words).decode(errors="replace")
        assert not answer.startswith("-"), (words, answer)
        return answer

    def _over_unix(self, *words: str | bytes) -> bytes:
        """One command and the first of its answer, without a client library between."""
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(5.0)
            link.connect(str(self.unix))
            if self.password:
                link.sendall(_encode("AUTH", self.password))
                link.recv(4096)
            link.sendall(_encode(*words))
            return link.recv(1 << 16)


class ValkeyCluster:
    """Three primaries with a third of the slots each, and a replica of the first one."""

    NODE_TIMEOUT_MS = 1000

    def __init__(self, folder: Path) -> None:
        self.servers = [self._member(folder / str(number)) for number in range(4)]

    @property
    def replica(self) -> ClusterMember:
        return self.servers[3]

    @property
    def location(self) -> str:
        """As in a tier's address, of the two that no test kills and one that some do."""
        return "//" + ",".join(f"{LOOPBACK}:{each.port}" for each in self.servers[:3])

    def start(self) -> None:
        """Start all, and wait until every one of them sees the whole cluster."""
        for each in self.servers:
            each.start()
        first = self.servers[0]
        for number, each in enumerate(self.servers[:3]):
            each.ask("CLUSTER", "ADDSLOTSRANGE", *map(str, ((16384 * number) // 3, 16384 * (number + 1) // 3 - 1)))
            # Without epochs of their own, two that meet would have to settle whose is higher.
            each.ask("CLUSTER", "SET-CONFIG-EPOCH", str(number + 1))
        for each in self.servers[1:]:
            each.ask("CLUSTER", "MEET", LOOPBACK, str(first.port), str(first.bus))
        until(lambda: all("cluster_known_nodes:4" in self.info(each) for each in self.servers), "they know each other")
        self.replica.ask("CLUSTER", "REPLICATE", self.node_id(first))
        until(self.whole, "the cluster is whole")

    def whole(self) -> bool:
        """Whether every node that runs sees all slots served, and the replica follows."""
        running = [each for each in self.servers if each.process is not None]
        states = all("cluster_state:ok" in self.info(each) for each in running)
        return states and all(
            "master_link_status:up" in each.ask("INFO", "replication")
            for each in running
            if "role:slave" in each.ask("INFO", "replication")
        )

    def info(self, server: ValkeyServer) -> str:
        return server.ask("CLUSTER", "INFO")

    def node_id(self, server: ValkeyServer) -> str:
        return server.ask("CLUSTER", "MYID").split("\r\n")[1]

    def kill(self) -> None:
        for each in self.servers:
            each.kill()

    def __enter__(self) -> ValkeyCluster:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _member(self, folder: Path) -> ClusterMember:
        folder.mkdir()
        return ClusterMember(
            folder, "--cluster-enabled", "yes", "--cluster-node-timeout", str(self.NODE_TIMEOUT_MS),
            "--repl-diskless-sync-delay", "0", "--maxmemory", "256mb",
        )  # fmt: skip


class ClusterMember(ValkeyServer):
    """A server with a second port, on which the cluster's nodes talk to each other."""

    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__(folder, *options)
        self.bus = free_port()

    def move(self) -> None:
        super().move()
        self.bus = free_port()

    def command(self) -> Sequence[str]:
        return [*super().command(), "--cluster-port", str(self.bus)]


def make_certificates(folder: Path) -> tuple[Path, Path, Path]:
    """Files of a CA's certificate, and of a certificate that it signed for loopback, with its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl program: apt-get install openssl")
    authority, certificate, key = folder / "ca.pem", folder / "server.pem", folder / "server.key"
    request, names, secret = folder / "server.csr", folder / "names", folder / "ca.key"
    names.write_text(f"subjectAltName=IP:{LOOPBACK},DNS:localhost\n")
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    for words in (
        ("req", "-x509", *new_key, "-keyout", secret, "-out", authority, "-days", "2", "-subj", "/CN=test CA"),
        ("req", *new_key, "-keyout", key, "-out", request, "-subj", "/CN=test server"),
        ("x509", "-req", "-in", request, "-CA", authority, "-CAkey", secret, "-CAcreateserial", "-out", certificate,
         "-days", "2", "-extfile", names),
    ):  # fmt: skip
        subprocess.run([openssl, *map(str, words)], check=True, capture_output=True, timeout=PATIENCE_S)
    return authority, certificate, key


def _encode(*words: str | bytes) -> bytes:
    encoded = [word if isinstance(word, bytes) else word.encode() for word in words]
    return b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)
