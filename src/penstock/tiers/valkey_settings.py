"""What a Valkey tier is told: its address, its options, and who it is to the server.

Covers taking these apart and refusing what cannot work, before anything is connected to. Does not cover the options
that all tiers have (`registry.py`).

Credentials come from PENSTOCK_VALKEY_USERNAME and PENSTOCK_VALKEY_PASSWORD, or from the file that the option
`credentials` names; never from the address, which is printed in logs and process lists.
"""

from __future__ import annotations

import json
import os
import ssl
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from penstock.errors import ConfigError
from penstock.tiers.registry import options_of
from penstock.tiers.valkey_link import Address, Secret

__all__ = ["Settings", "settings_of"]

_PORT = 6379
_FORM = "valkey://host:port/db, valkey+unix:///path?db=0, or with cluster=true valkey://host:port,host:port"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The options in a Valkey tier's address."""

    tls: bool = False
    ca: str = ""
    """A file of CA certificates; the system's where empty."""
    cluster: bool = False
    ttl: int = 0
    """Seconds after which the server forgets a block; 0 for never."""
    prefix: str = ""
    """Put in front of every name, so that a server can be shared with others."""
    connect_timeout: float = 1.0
    """Seconds that connecting may take, where the deadline is further away."""
    credentials: str = ""
    db: int = 0


@dataclass(frozen=True, slots=True)
class Settings:
    """All that a tier needs to know."""

    addresses: tuple[Address, ...]
    """The server; of a cluster, some of its nodes."""
    db: int
    secret: Secret
    context: ssl.SSLContext | None
    """None without TLS."""
    cluster: bool
    ttl_s: int
    prefix: bytes
    connect_timeout_s: float


def settings_of(location: str, options: Mapping[str, str]) -> Settings:
    """Take a tier's address and options apart; reads files and the environment, connects to nothing.

    Raises ConfigError for what cannot be used, such as a credentials file that others can read; no text names a secret.
    """
    chosen = options_of(Options, options, "valkey")
    addresses, db = _addresses(location, chosen)
    if chosen.ttl < 0 or chosen.connect_timeout <= 0 or db < 0:
        raise ConfigError("a valkey tier's ttl and db must not be negative, and connect_timeout must be more than 0")
    if not chosen.prefix.isprintable() or set(chosen.prefix) & set("{} "):
        raise ConfigError(
            "a valkey tier's prefix must be printable and without braces (they choose the cluster's slot)"
        )
    if chosen.cluster and (db or addresses[0].path):
        raise ConfigError("a cluster has one database, 0, and is reached over TCP: valkey://host:port?cluster=true")
    if chosen.ca and not chosen.tls:
        raise ConfigError("ca names who may sign the server's certificate, which needs tls=true")
    if chosen.tls and addresses[0].path:
        raise ConfigError("a Unix socket has no TLS: leave tls out, or name a host and a port")
    return Settings(
        addresses, db, _secret(chosen.credentials), _context(chosen.ca) if chosen.tls else None, chosen.cluster,
        chosen.ttl, chosen.prefix.encode(), chosen.connect_timeout,
    )  # fmt: skip


def _addresses(location: str, options: Options) -> tuple[tuple[Address, ...], int]:
    path = location.removeprefix("//")
    if path.startswith("/"):
        return (Address(path=path),), options.db
    hosts, _, number = path.partition("/")
    names = hosts.split(",")
    if len(names) > 1 and not options.cluster:
        raise ConfigError("several hosts are for cluster=true")
    try:
        db = int(number) if number else options.db
        return tuple(map(_address, names)), db
    except ValueError as error:
        raise ConfigError(f"{location!r} is no address of a valkey tier: {_FORM}") from error


def _address(text: str) -> Address:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError(text)
    return Address(parts.hostname, _PORT if parts.port is None else parts.port)


def _secret(file: str) -> Secret:
    if not file:
        return Secret(os.environ.get("PENSTOCK_VALKEY_USERNAME", ""), os.environ.get("PENSTOCK_VALKEY_PASSWORD", ""))
    try:
        with Path(file).open(encoding="utf-8") as source:
            mode = stat.S_IMODE(os.fstat(source.fileno()).st_mode)
            if mode & 0o077:
                raise ConfigError(f"credentials file {file} can be read by others (mode {mode:o}): chmod 600 {file}")
            text = source.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"credentials file {file} cannot be read: {type(error).__name__}") from None
    return _secret_in(text, file)


def _secret_in(text: str, file: str) -> Secret:
    if text.lstrip().startswith("{"):
        try:
            return msgspec.convert(json.loads(text), Secret)
        except ValueError:
            pass
    elif len(lines := text.splitlines()) == 2 and lines[1]:
        return Secret(*lines)
    # `from None`, and no word of the text: a parser's error repeats what it read.
    raise ConfigError(
        f'credentials file {file} holds neither {{"username": ..., "password": ...}} nor two lines, user and password'
    ) from None


def _context(ca: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca or None)
    except OSError as error:
        raise ConfigError(f"ca={ca}: not a file of certificates in PEM ({error})") from error
