"""Tiers by the scheme of their address: `scheme:location?option=value&...`.

    disk:/var/cache/penstock?size=64G&write=second-use
    memory:/mnt/cxl/penstock?size=256G
    valkey://10.0.0.5:6379/0       valkey+unix:///run/valkey.sock
    s3://bucket/prefix?endpoint=https://...
    file:/mnt/nfs/penstock          mooncake://master:50051?...

Adding a tier is one file with an `open_tier` and one line in `_TIERS` (docs/adding-a-tier.md).
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec

from penstock.config import parse_size
from penstock.errors import ConfigError
from penstock.tiers.base import Tier
from penstock.tiers.wrap import Slow
from penstock.types import WriteRule

__all__ = ["TierConfig", "open_tier", "options_of", "parse_tier", "register", "schemes"]

_TIERS: dict[str, str] = {
    "az": "penstock.tiers.objects_az",
    "disk": "penstock.tiers.disk",
    "redis": "penstock.tiers.valkey",
    "valkey": "penstock.tiers.valkey",
    "valkey+unix": "penstock.tiers.valkey",
    "file": "penstock.tiers.objects_file",
    "gs": "penstock.tiers.objects_gs",
    "mooncake": "penstock.tiers.mooncake",
    "s3": "penstock.tiers.objects_s3",
    "memory": "penstock.tiers.memory",
}
"""Scheme -> module with `open_tier(location, options, name) -> Tier` and `DEFAULT_WRITE: WriteRule`."""

_COMMON = ("name", "write", "cap", "timeout", "latency", "bandwidth")
"""Options that mean the same for every tier."""

T = TypeVar("T", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class TierConfig:
    """One `--tier`, taken apart. `options` are the tier's own; the rest means the same for every tier."""

    scheme: str
    location: str
    """Everything between `scheme:` and `?`, with its slashes."""
    name: str
    write: WriteRule
    cap_bytes_s: float | None = None
    """Bytes a second that moves to and from it may take together; None for as many as it gives."""
    timeout_s: float = 1.0
    """How long a call that nobody waits for may take."""
    slow_latency_s: float = 0.0
    """For experiments: every call that reaches the device takes that much longer."""
    slow_bytes_s: float | None = None
    """For experiments: bytes a second that the device is slowed to."""
    options: dict[str, str] = field(default_factory=dict)


def register(scheme: str, module: str) -> None:
    """Make a tier known that is not part of this package. Raises ConfigError if the scheme is taken."""
    if _TIERS.setdefault(scheme, module) != module:
        raise ConfigError(f"tier scheme {scheme!r} is taken by {_TIERS[scheme]}")


def schemes() -> list[str]:
    """Every scheme that is known, sorted."""
    return sorted(_TIERS)


def parse_tier(address: str) -> TierConfig:
    """Take a tier's address apart; touches nothing. Raises ConfigError naming what is wrong, without any secret."""
    scheme, colon, rest = address.partition(":")
    if not colon or scheme not in _TIERS:
        near = difflib.get_close_matches(scheme, _TIERS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"tier scheme {scheme!r} is unknown (known: {', '.join(schemes())}){hint}")
    location, _, query = rest.partition("?")
    if "@" in location:
        raise ConfigError(f"a {scheme} tier's address must not hold credentials; see docs/tiers.md for where they go")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise ConfigError(f"the options of the {scheme} tier are not name=value&name=value") from error
    options = dict(pairs)
    if len(options) != len(pairs):
        raise ConfigError(f"an option of the {scheme} tier is given twice")
    name = options.pop("name", scheme)
    write = _write_rule(options.pop("write", None), scheme)
    cap = options.pop("cap", None)
    timeout_s = _seconds(options.pop("timeout", "1"), "timeout")
    latency, bandwidth = options.pop("latency", None), options.pop("bandwidth", None)
    return TierConfig(
        scheme, location, name, write, float(parse_size(cap)) if cap else None, timeout_s,
        _seconds(latency, "latency") if latency else 0.0, float(parse_size(bandwidth)) if bandwidth else None, options,
    )  # fmt: skip


def open_tier(config: TierConfig) -> Tier:
    """Open the tier. Raises ConfigError for options it does not have, TierError where it cannot be opened now."""
    module = _module(config.scheme)
    tier: Tier = module.open_tier(config.location, config.options, config.name)
    if config.slow_latency_s or config.slow_bytes_s:
        return Slow(tier, config.slow_latency_s, config.slow_bytes_s)
    return tier


def options_of(kind: type[T], options: Mapping[str, str], scheme: str) -> T:
    """A tier's options as its own msgspec struct (texts, numbers and booleans are converted).

    Raises ConfigError at a name it does not have, naming the nearest, and at a value of the wrong type.
    """
    known = [each.encode_name for each in msgspec.structs.fields(kind)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *_COMMON], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"the {scheme} tier has no option {name!r} (it has {', '.join(known)}){hint}")
    try:
        return msgspec.convert(dict(options), kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the {scheme} tier's options: {error}") from error


def _module(scheme: str) -> Any:
    return importlib.import_module(_TIERS[scheme])


def _write_rule(text: str | None, scheme: str) -> WriteRule:
    if text is None:
        rule: WriteRule = _module(scheme).DEFAULT_WRITE
        return rule
    try:
        return WriteRule(text)
    except ValueError as error:
        raise ConfigError(f"write={text!r}: one of {', '.join(WriteRule)}") from error


def _seconds(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise ConfigError(f"{what}={text!r}: seconds, more than 0")
    return value
