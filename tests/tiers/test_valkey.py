"""What a Valkey tier is told (address, options, credentials), what it tells (usage, errors), and what nobody sees."""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.errors import ConfigError, TierTimeout, TierUnavailable
from penstock.testing.tier_blocks import assert_right, block_keys, empty, filled, tier_space
from penstock.tiers.base import Placed, Tier
from penstock.tiers.envelope import object_name
from penstock.tiers.registry import open_tier, parse_tier
from penstock.types import WriteRule
from tests.tiers.servers import LOOPBACK, ValkeyServer, free_port, make_certificates, need_valkey

pytest.importorskip("redis", reason="the redis client library is not installed (extra `valkey`)")

SPACE = tier_space()
KEYS = block_keys(SPACE, 0, 4)
PASSWORD = "correct-horse/battery staple"
WRONG = "wrong-secret-7c1f"
USER = "penstock-user"


def soon() -> float:
    return time.monotonic() + 20.0


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PENSTOCK_VALKEY_USERNAME", "PENSTOCK_VALKEY_PASSWORD"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    need_valkey()
    with ValkeyServer(tmp_path, password=PASSWORD) as server:
        yield server


@pytest.fixture
def opened() -> Iterator[list[Tier]]:
    """Tiers that are closed at the end."""
    tiers: list[Tier] = []
    yield tiers
    for tier in tiers:
        tier.close()


def opening(opened: list[Tier], address: str) -> Tier:
    opened.append(open_tier(parse_tier(address)))
    return opened[-1]


def works(tier: Tier) -> bool:
    """Whether blocks go there and come back."""
    placed = tier.write(filled(SPACE, KEYS), soon())
    batch = empty(SPACE, KEYS)
    assert_right(batch, tier.read(batch, soon()))
    return placed.tolist() == [Placed.STORED] * len(KEYS)


# ---- the address


@pytest.mark.parametrize(
    ("address", "wrong"),
    [
        ("valkey://", "no address"),
        ("valkey://host:port", "no address"),
        ("valkey://host:6379/x", "no address"),
        ("valkey://host:99999", "no address"),
        ("valkey://one,two", "cluster=true"),
        ("valkey://host?tlss=true", "did you mean 'tls'"),
        ("valkey://host?tls=maybe", "options"),
        ("valkey://host?ttl=-1", "ttl"),
        ("valkey://host?connect_timeout=0", "connect_timeout"),
        ("valkey://host?ca=/some/file", "tls=true"),
        ("valkey://host?tls=true&ca=/does/not/exist", "not a file of certificates"),
        ("valkey://host?prefix={x}", "braces"),
        ("valkey://host/1?cluster=true", "one database"),
        ("valkey+unix:///run/x?cluster=true", "one database"),
        ("valkey+unix:///run/x?tls=true", "no TLS"),
        ("valkey://host?credentials=/does/not/exist", "cannot be read"),
        ("valkey://user:secret@host", "must not hold credentials"),
    ],
)
def test_what_cannot_work_is_refused(address: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong) as raised:
        open_tier(parse_tier(address))
    assert "secret" not in str(raised.value)


def test_schemes_and_the_write_rule() -> None:
    for scheme in ("valkey", "valkey+unix", "redis"):
        assert parse_tier(f"{scheme}:///run/x").write is WriteRule.SECOND_USE


def test_ipv6_and_the_ordinary_port() -> None:
    for address, shown in (
        ("valkey://[::1]/2", "[::1]:6379"), ("valkey://h", "h:6379"), ("valkey+unix:///a/b?db=1", "/a/b"),
        ("valkey://a:1,b:2?cluster=true", "a:1,b:2"),
    ):  # fmt: skip
        tier = open_tier(parse_tier(address))
        assert shown in repr(tier)
        tier.close()


# ---- what is stored


def test_names_and_lifetimes_on_the_server(
    server: ValkeyServer, opened: list[Tier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_VALKEY_PASSWORD", PASSWORD)
    assert works(opening(opened, f"valkey+unix://{server.unix}?prefix=team:"))
    names = [f"team:{object_name(SPACE, key.tobytes())}" for key in KEYS]
    assert sorted(server.names()) == sorted(names)
    assert server.ask("TTL", names[0]) == ":-1\r\n"
    server.ask("FLUSHALL")
    assert works(opening(opened, f"valkey+unix://{server.unix}?prefix=team:&ttl=500"))
    assert 490 <= int(server.ask("TTL", names[0])[1:]) <= 500


def test_databases_are_apart(server: ValkeyServer, opened: list[Tier], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_VALKEY_PASSWORD", PASSWORD)
    assert works(opening(opened, f"valkey://{LOOPBACK}:{server.port}/1"))
    assert not opening(opened, f"valkey://{LOOPBACK}:{server.port}/2").holds(SPACE, KEYS, soon()).any()
    assert opening(opened, f"valkey+unix://{server.unix}?db=1").holds(SPACE, KEYS, soon()).all()


def test_usage_is_the_servers(server: ValkeyServer, opened: list[Tier], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_VALKEY_PASSWORD", PASSWORD)
    server.ask("CONFIG", "SET", "maxmemory", "50mb")
    tier = opening(opened, f"valkey+unix://{server.unix}")
    assert tier.usage().used_bytes is None
    assert works(tier)
    usage = tier.usage()
    assert usage.capacity_bytes == 50 << 20
    assert usage.used_bytes is not None and 0 < usage.used_bytes < usage.capacity_bytes
    assert usage.blocks is None


def test_a_connection_is_used_again(server: ValkeyServer, opened: list[Tier], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_VALKEY_PASSWORD", PASSWORD)
    tier = opening(opened, f"valkey://{LOOPBACK}:{server.port}")
    for _ in range(5):
        assert works(tier)
    assert tier.counters()["connects"] == 1


# ---- credentials


def credentials(folder: Path, text: str, mode: int = 0o600) -> Path:
    file = folder / "credentials"
    file.write_text(text)
    file.chmod(mode)
    return file


@pytest.mark.parametrize("form", ["json", "lines", "json without a user", "lines without a user"])
def test_credentials_from_a_file(server: ValkeyServer, opened: list[Tier], tmp_path: Path, form: str) -> None:
    user = "" if "without" in form else USER
    server.ask("ACL", "SETUSER", USER, "on", f">{PASSWORD}", "~*", "+@all")
    named = {"username": user} if user else {}
    text = json.dumps({**named, "password": PASSWORD}) if "json" in form else f"{user}\n{PASSWORD}\n"
    file = credentials(tmp_path, text)
    assert works(opening(opened, f"valkey://{LOOPBACK}:{server.port}?credentials={file}"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_credentials_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    file = credentials(tmp_path, f"\n{PASSWORD}\n", mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        open_tier(parse_tier(f"valkey://h?credentials={file}"))


@pytest.mark.parametrize("text", ["", f"{WRONG}", f"{{{WRONG}", f'{{"password": ["{WRONG}"]}}', f"a\n{WRONG}\nc"])
def test_a_credentials_file_of_another_form_is_refused_without_repeating_it(tmp_path: Path, text: str) -> None:
    file = credentials(tmp_path, text)
    with pytest.raises(ConfigError, match="two lines") as raised:
        open_tier(parse_tier(f"valkey://h?credentials={file}"))
    assert WRONG not in "".join(traceback.format_exception(raised.value))


def test_a_user_with_just_the_rights_the_error_names(
    server: ValkeyServer, opened: list[Tier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_VALKEY_USERNAME", USER)
    monkeypatch.setenv("PENSTOCK_VALKEY_PASSWORD", PASSWORD)
    server.ask("ACL", "SETUSER", USER, "on", f">{PASSWORD}", "~*", "-@all", "+hello", "+strlen", "+info")
    tier = opening(opened, f"valkey://{LOOPBACK}:{server.port}")
    with pytest.raises(TierUnavailable, match="needs get, getrange, strlen, set, unlink, info and cluster"):
        works(tier)
    server.ask("ACL", "SETUSER", USER, *(f"+{each}" for each in ("get", "getrange", "set", "unlink")))
    assert works(tier)
    tier.remove(SPACE, KEYS, soon())
    # Who may not ask how full the server is works without knowing.
    server.ask("ACL", "SETUSER", USER, "-info")
    assert works(opening(opened, f"valkey+unix://{server.unix}"))
    assert opened[-1].usage().used_bytes is None


@pytest.mark.parametrize("way", ["wrong password", "no password", "wrong user", "an old server", "another cluster"])
def test_secrets_are_never_printed(
    tmp_path: Path, opened: list[Tier], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str], way: str,
) -> None:  # fmt: skip
    """In no text, repr, traceback or log; also where the server repeats the command with the password in it."""
    need_valkey()
    caplog.set_level(logging.DEBUG)
    if way != "no password":
        monkeypatch.setenv("PENSTOCK_VALKEY_PASSWORD", WRONG)
    if way == "wrong user":
        monkeypatch.setenv("PENSTOCK_VALKEY_USERNAME", USER)
    # A server from before RESP3 answers with what it was sent: "unknown command 'HELLO', with args beginning with: ..."
    extra = ("--rename-command", "HELLO", "") if way == "an old server" else ()
    with ValkeyServer(tmp_path, *extra, password=PASSWORD) as server:
        tier = opening(
            opened,
            f"valkey://{LOOPBACK}:{server.port}" + ("?cluster=true" if way == "another cluster" else ""),
        )
        with pytest.raises(TierUnavailable) as raised:
            works(tier)
        printed = [
            str(raised.value), repr(raised.value), repr(tier), repr(vars(tier)), str(tier.counters()),
            "".join(traceback.format_exception(raised.value)), caplog.text, *capfd.readouterr(),
        ]  # fmt: skip
        assert "valkey server at" in printed[0]
        if way in ("wrong password", "wrong user", "another cluster"):
            assert "PENSTOCK_VALKEY_PASSWORD" in printed[0]
        if way == "an old server":
            assert "too old" in printed[0]
        for text in printed:
            for secret in (PASSWORD, WRONG):
                assert secret not in text, text
        # It works once the server takes the password, without being opened again.
        if way == "wrong password":
            server.ask("CONFIG", "SET", "requirepass", WRONG)
            assert works(tier)


# ---- TLS


def test_tls_needs_a_known_authority(tmp_path: Path, opened: list[Tier]) -> None:
    need_valkey()
    (tmp_path / "own").mkdir()
    (tmp_path / "other").mkdir()
    certificates = make_certificates(tmp_path / "own")
    other = make_certificates(tmp_path / "other")[0]
    with ValkeyServer(tmp_path, tls=certificates) as server:
        where = f"valkey://{LOOPBACK}:{server.port}"
        assert works(opening(opened, f"{where}?tls=true&ca={certificates[0]}"))
        for options in ("tls=true", f"tls=true&ca={other}"):
            with pytest.raises(TierUnavailable, match="name its CA with ca="):
                works(opening(opened, f"{where}?{options}"))
        with pytest.raises(TierUnavailable):  # plain words to a server that wants TLS
            works(opening(opened, where))


def test_tls_to_a_server_without(server: ValkeyServer, opened: list[Tier]) -> None:
    tier = opening(opened, f"valkey://{LOOPBACK}:{server.port}?tls=true&connect_timeout=0.3")
    with pytest.raises(TierUnavailable):
        works(tier)


def test_tls_stopped(tmp_path: Path, opened: list[Tier]) -> None:
    """The handshake ends at the deadline, too."""
    need_valkey()
    certificates = make_certificates(tmp_path)
    with ValkeyServer(tmp_path, tls=certificates) as server:
        tier = opening(opened, f"valkey://{LOOPBACK}:{server.port}?tls=true&ca={certificates[0]}")
        server.pause()
        with pytest.raises(TierTimeout):
            tier.holds(SPACE, KEYS, time.monotonic() + 0.1)
        server.resume()
        assert works(tier)


# ---- nobody there


def test_nobody_there(tmp_path: Path, opened: list[Tier]) -> None:
    for address in (f"valkey://{LOOPBACK}:{free_port()}", f"valkey+unix://{tmp_path}/none"):
        with pytest.raises(TierUnavailable, match="is it running"):
            opening(opened, address).holds(SPACE, KEYS, soon())


def test_connecting_has_a_time_of_its_own(server: ValkeyServer, opened: list[Tier]) -> None:
    """A server that accepts and says nothing is not waited for until a deadline that is far away."""
    tier = opening(opened, f"valkey://{LOOPBACK}:{server.port}?connect_timeout=0.1")
    server.pause()
    begin = time.monotonic()
    with pytest.raises(TierUnavailable, match="connect_timeout"):
        tier.holds(SPACE, KEYS, begin + 60)
    assert time.monotonic() - begin < 20
    server.resume()


def test_something_else_listens(opened: list[Tier], tmp_path: Path) -> None:
    import socket
    import threading

    with socket.create_server((LOOPBACK, 0)) as listener:

        def answer() -> None:
            link, _ = listener.accept()
            with link:
                link.recv(4096)
                link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(TierUnavailable):
            opening(opened, f"valkey://{LOOPBACK}:{listener.getsockname()[1]}").holds(SPACE, KEYS, soon())
        thread.join(20)


def test_closing_leaves_no_connection(server: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_VALKEY_PASSWORD", PASSWORD)
    before = len(os.listdir("/proc/self/fd"))
    tier = open_tier(parse_tier(f"valkey://{LOOPBACK}:{server.port}"))
    assert works(tier)
    tier.close()
    assert len(os.listdir("/proc/self/fd")) == before
