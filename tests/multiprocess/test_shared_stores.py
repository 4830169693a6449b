"""Two pools, as on two hosts, that share blocks through one store: keepers, movers and the store's server are real.

Where root allows, each pool's keeper and mover live in a network namespace of their own; the server is in the first
one, the second reaches it over a pair of virtual Ethernet devices.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import penstock
from penstock import KeyChain, SpaceHandle
from penstock.types import FetchEnd
from tests.faults.tier_load import GRACE_S, check, fetch, must_store
from tests.support import MIB, SPACE, Keeper, chain, small_geometry, until
from tests.tiers.mooncake_servers import Lender, MooncakeMaster, need_mooncake
from tests.tiers.objects_servers import BUCKET, KEY_ID, WeedServer, need_weed
from tests.tiers.objects_servers import SECRET as S3_SECRET
from tests.tiers.servers import LOOPBACK, ValkeyServer, need_valkey

N_BLOCKS = 48
WORD = "correct-horse-77"
"""Valkey's password."""
WRONG = "wrong-staple-13"
SLOW_S = 0.2
"""What every call of the second host to the shared directory takes longer."""


# ---- two hosts


@dataclass(frozen=True)
class Hosts:
    """Two network namespaces, "" for this process's own; `address` is how both reach the first."""

    first: str
    second: str
    address: str


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Two namespaces with a cable between them; where that is not allowed, both are this one."""
    first, second = f"ps{os.getpid()}a", f"ps{os.getpid()}b"
    address, other = "10.213.77.1", "10.213.77.2"
    steps = [
        f"netns add {first}", f"netns add {second}",
        f"-n {first} link add cable type veth peer name cable netns {second}",
        f"-n {first} addr add {address}/30 dev cable", f"-n {second} addr add {other}/30 dev cable",
        *(f"-n {name} link set {device} up" for name in (first, second) for device in ("lo", "cable")),
    ]  # fmt: skip
    try:
        if all(_ip(step) for step in steps):
            yield Hosts(first, second, address)
        else:
            yield Hosts("", "", LOOPBACK)
    finally:
        for name in (first, second):
            _ip(f"netns del {name}")


def _ip(words: str) -> bool:
    try:
        return subprocess.run(["ip", *words.split()], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def enter(namespace: str, environment: dict[str, str]) -> None:
    """In a keeper's process, before it starts: be on that host, with these variables."""
    os.environ.update(environment)
    if namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        fd = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
        assert libc.setns(fd, 0x40000000) == 0, os.strerror(ctypes.get_errno())  # CLONE_NEWNET
        os.close(fd)


# ---- the stores


def on_host(hosts: Hosts, command: Sequence[str]) -> list[str]:
    """A server's command, on the first host and listening to both."""
    moved = [word.replace(LOOPBACK, hosts.address) for word in command]
    return ["ip", "netns", "exec", hosts.first, *moved] if hosts.first else moved


class Valkey(ValkeyServer):
    def __init__(self, folder: Path, hosts: Hosts) -> None:
        super().__init__(folder, "--protected-mode", "no", password=WORD)
        self.hosts = hosts

    def command(self) -> Sequence[str]:
        return on_host(self.hosts, super().command())

    def address(self) -> str:
        return f"valkey://{self.hosts.address}:{self.port}/0?write=through&timeout=0.5"

    def environment(self) -> dict[str, str]:
        return {"PENSTOCK_VALKEY_PASSWORD": WORD}

    def clear(self) -> None:
        self.ask("FLUSHALL")

    def damage(self, chosen: Callable[[bytes], bytes]) -> None:
        for name in self.names():
            self.set(name, chosen(self._value(name)))

    def swap(self) -> None:
        names = self.names()
        values = [self._value(name) for name in names]
        for name, value in zip(names, values[1:] + values[:1], strict=True):
            self.set(name, value)

    def _value(self, name: str) -> bytes:
        import redis

        with redis.Redis(unix_socket_path=str(self.unix), password=WORD) as link:
            value = link.get(name)
        assert isinstance(value, bytes)
        return value


class Weed(WeedServer):
    def __init__(self, folder: Path, hosts: Hosts) -> None:
        self.hosts = hosts
        super().__init__(folder)

    def command(self) -> Sequence[str]:
        return on_host(self.hosts, super().command())

    def ready(self) -> bool:
        """Asked from where it is: this process is on neither host."""
        if not self.hosts.first:
            return super().ready()
        probe = f"import socket; socket.create_connection(({self.hosts.address!r}, {self.port}), 1).close()"
        done = subprocess.run(["ip", "netns", "exec", self.hosts.first, "python3", "-c", probe], capture_output=True)
        return done.returncode == 0

    def address(self) -> str:
        endpoint = f"http://{self.hosts.address}:{self.port}"
        return f"s3://{BUCKET}/shared?endpoint={endpoint}&insecure=true&write=through&timeout=2"

    def environment(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": S3_SECRET}


class Folder:
    """A directory, as one that is mounted on both hosts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "shared"
        self.folder.mkdir()

    def address(self) -> str:
        return f"file:{self.folder}?write=through&timeout=0.5"

    def environment(self) -> dict[str, str]:
        return {}

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file() and path.stat().st_size > 4096)

    def clear(self) -> None:
        for path in self.files():
            path.unlink()

    def damage(self, chosen: Callable[[bytes], bytes]) -> None:
        for path in self.files():
            path.write_bytes(chosen(path.read_bytes()))

    def swap(self) -> None:
        files = self.files()
        values = [path.read_bytes() for path in files]
        for path, value in zip(files, values[1:] + values[:1], strict=True):
            path.write_bytes(value)


@dataclass
class Two:
    """Two pools over one store; each test has chains of its own."""

    store: Valkey | Weed | Folder | MooncakeMaster
    keepers: list[Keeper]
    pools: list[penstock.Pool]
    handles: list[SpaceHandle]
    number: int = 0

    def shared(self) -> KeyChain:
        """A new chain that the first pool stored and the store has."""
        self.number += 1
        keys = chain(30, self.number, blocks=N_BLOCKS)
        before = self.counters(0)["stored"]
        must_store(self.pools[0], self.handles[0], keys)
        until(lambda: self.counters(0)["stored"] >= before + N_BLOCKS, "the store has it")
        return keys

    def counters(self, host: int) -> dict[str, int]:
        [row] = self.keepers[host].tier_report()["tiers"]
        counted: dict[str, int] = row["counters"]
        return counted

    def fetch(self, host: int, keys: KeyChain, seconds: float = 20.0) -> FetchEnd:
        return fetch(self.pools[host], self.handles[host], keys, seconds)

    def recovers(self, keys: KeyChain) -> None:
        until(lambda: self.fetch(1, keys) is FetchEnd.DONE, "the second host has it")
        assert check(self.pools[1], self.handles[1], keys) == len(keys)
        self.keepers[1].fsck()


@contextlib.contextmanager
def two_pools(
    store: Valkey | Weed | Folder | MooncakeMaster, hosts: Hosts, *addresses: str, **more: str
) -> Iterator[Two]:
    address, environment = store.address, getattr(store, "environment", dict)() | more
    of = address() if callable(address) else f"{address}?write=through"
    with contextlib.ExitStack() as stack:
        keepers = [Keeper(small_geometry(8 * MIB, lanes=8), tiers=[each]) for each in addresses or (of, of)]
        for keeper, name in zip(keepers, (hosts.first, hosts.second), strict=True):
            stack.callback(keeper.__exit__)
            keeper.launch(enter, name, environment)
        for keeper in keepers:
            assert keeper.wait_ready()
            keeper.wait_touched()
            keeper.tier_report()
        pools = [stack.enter_context(keeper.open()) for keeper in keepers]
        yield Two(store, keepers, pools, [pool.space(SPACE) for pool in pools])


@pytest.fixture(scope="module")
def valkey(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    need_valkey()
    with Valkey(tmp_path_factory.mktemp("v"), hosts) as server, two_pools(server, hosts) as both:
        yield both


@pytest.fixture(scope="module")
def folder(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    pytest.importorskip("obstore")
    store = Folder(tmp_path_factory.mktemp("f"))
    with two_pools(store, hosts, store.address(), store.address() + f"&latency={SLOW_S}") as both:
        yield both


# ---- what one stored the other hits


def hits(both: Two) -> None:
    before = both.counters(1)
    keys = both.shared()
    both.recovers(keys)
    more = chain(31, both.number, blocks=4)
    assert both.fetch(1, more) is FetchEnd.ABSENT, "absent, and nothing else"
    after = both.counters(1)
    assert after["good"] == before["good"] + N_BLOCKS and after["damaged"] == before["damaged"]


def test_hosts_share_through_valkey(valkey: Two) -> None:
    hits(valkey)


def test_hosts_share_through_a_directory(folder: Two) -> None:
    hits(folder)


def test_hosts_share_through_s3(hosts: Hosts, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    need_weed()
    with Weed(tmp_path, hosts) as server, two_pools(server, hosts) as both:
        assert isinstance(server, Weed)
        hits(both)
        keys = both.shared()
        server.pause()
        assert both.fetch(1, keys, 0.5) in (FetchEnd.DEADLINE, FetchEnd.READ_FAILED)
        server.resume()
        both.recovers(keys)
        no_secret(both, S3_SECRET)


def test_hosts_share_through_mooncake(tmp_path: Path) -> None:
    """On loopback: its clients choose their ports and addresses by themselves."""
    need_mooncake()
    with MooncakeMaster(tmp_path) as master:
        assert isinstance(master, MooncakeMaster)
        address = f"{master.address}?segment=0&buffer=20M&write=through"
        lender = Lender(tmp_path, master, "256M", 1)
        with lender, two_pools(master, Hosts("", "", LOOPBACK), address, address) as both:
            hits(both)


# ---- a store that is killed, stopped, slow, emptied


def test_a_store_that_is_stopped_is_a_miss_in_time(valkey: Two) -> None:
    keys, server = valkey.shared(), valkey.store
    assert isinstance(server, Valkey)
    server.pause()
    try:
        for seconds in (0.05, 0.3, 1.5):
            assert valkey.fetch(1, keys, seconds) in (FetchEnd.DEADLINE, FetchEnd.READ_FAILED)
        started = time.monotonic()
        assert valkey.pools[1].locate(valkey.handles[1], keys, wait_s=0.1).n_blocks == 0
        assert time.monotonic() - started < 0.1 + GRACE_S
        must_store(valkey.pools[1], valkey.handles[1], chain(32, blocks=20))
        assert valkey.counters(1)["timeouts"] + valkey.counters(1)["unavailable"] > 0
    finally:
        server.resume()
    valkey.recovers(keys)


def test_a_store_stopped_in_the_middle_of_fetches_changes_no_slot_later(valkey: Two) -> None:
    """What a call that timed out still brings must not land in memory that has another owner by then."""
    chains = [valkey.shared() for _ in range(4)]
    server, pool, handle = valkey.store, valkey.pools[1], valkey.handles[1]
    assert isinstance(server, Valkey)
    for pause_s in (0.0, 0.002, 0.01):
        running = [pool.fetch(handle, keys, 0.3) for keys in chains]
        time.sleep(pause_s)  # another moment each time
        server.pause()
        for each in running:
            each.wait()
        must_store(pool, handle, chain(33, int(1000 * pause_s), blocks=60))
        server.resume()
        valkey.keepers[1].fsck()
    for keys in chains:
        valkey.recovers(keys)


def test_a_store_that_is_killed_and_comes_back_empty(valkey: Two) -> None:
    keys, server = valkey.shared(), valkey.store
    assert isinstance(server, Valkey)
    server.kill()
    assert valkey.fetch(1, keys, 5.0) is FetchEnd.READ_FAILED, "down is not absent"
    assert not valkey.keepers[1].tier_report()["tiers"][0]["up"] or valkey.counters(1)["unavailable"] > 0
    assert check(valkey.pools[0], valkey.handles[0], keys) == N_BLOCKS
    server.start()
    until(lambda: valkey.fetch(1, keys) is FetchEnd.ABSENT, "it is back, and has nothing")
    hits(valkey)


def test_a_slow_store_costs_its_time_or_the_deadline(folder: Two) -> None:
    keys = folder.shared()
    for _ in range(3):
        assert folder.fetch(1, keys, SLOW_S / 2) in (FetchEnd.DEADLINE, FetchEnd.READ_FAILED)
    started = time.monotonic()
    until(lambda: folder.fetch(1, keys) is FetchEnd.DONE, "it takes its time")
    assert time.monotonic() - started >= SLOW_S
    folder.recovers(keys)


# ---- a store that holds what it should not


def flipped(value: bytes) -> bytes:
    return value[:-100] + bytes([value[-100] ^ 16]) + value[-99:]


@pytest.mark.parametrize("which", ["valkey", "folder"])
@pytest.mark.parametrize("how", ["flipped", "cut", "grown", "header", "swapped"])
def test_a_damaged_store_gives_no_wrong_byte(which: str, how: str, request: pytest.FixtureRequest) -> None:
    both: Two = request.getfixturevalue(which)
    store = both.store
    assert isinstance(store, Valkey | Folder)
    store.clear()
    keys = both.shared()
    if how == "swapped":
        store.swap()
    else:
        harm: dict[str, Callable[[bytes], bytes]] = {
            "flipped": flipped, "cut": lambda value: value[: len(value) // 2], "grown": lambda value: value + b"x",
            "header": lambda value: bytes([value[0] ^ 1]) + value[1:],
        }  # fmt: skip
        store.damage(harm[how])
    before = both.counters(1)
    # What is no block, by its length alone, is not there: whoever stores it next replaces it.
    ends = {FetchEnd.ABSENT} if how in ("cut", "grown") else {FetchEnd.DAMAGED, FetchEnd.READ_FAILED}
    assert both.fetch(1, keys) in ends
    assert check(both.pools[1], both.handles[1], keys) == 0
    after = both.counters(1)
    assert how in ("cut", "grown") or after["damaged"] + after["failed"] > before["damaged"] + before["failed"]
    hits(both)


# ---- secrets


def test_a_wrong_password_is_counted_and_never_shown(
    hosts: Hosts, valkey: Two, capfd: pytest.CaptureFixture[str]
) -> None:
    server = valkey.store
    assert isinstance(server, Valkey)
    with two_pools(server, hosts, PENSTOCK_VALKEY_PASSWORD=WRONG) as both:
        assert both.fetch(1, chain(34, blocks=3)) is FetchEnd.READ_FAILED
        must_store(both.pools[1], both.handles[1], chain(35, blocks=8))
        until(lambda: both.counters(1)["unavailable"] > 0, "it is counted")
        row = both.keepers[1].tier_report()["tiers"][0]
        assert not row["up"] or row["why"]
        no_secret(both, WRONG)
    no_secret(valkey, WORD)
    said = capfd.readouterr()
    for secret in (WRONG, WORD):
        assert secret not in said.out + said.err


def no_secret(both: Two, secret: str) -> None:
    """In no report, statistic or command line."""
    for keeper in both.keepers:
        assert secret not in repr(keeper.tier_report()) + repr(keeper.stat())
        pid = keeper.tier_report()["mover"]["pid"]
        for process in (pid, keeper.pid):
            assert secret.encode() not in Path(f"/proc/{process}/cmdline").read_bytes()
