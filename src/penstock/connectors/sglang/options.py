"""What a user may set in `--hicache-storage-backend-extra-config`, and which SGLang this works with."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from penstock.errors import ConfigError, Refused

__all__ = ["Options", "engine_version", "parse_options"]

TESTED = "0.5.23"
_OLDEST, _BEFORE = (0, 5, 23), (0, 6)

# SGLang's own keys, as far as it leaves them in.
_SGLANGS = frozenset({"backend_name", "module_path", "class_name", "interface_v1"})
_REMEDY = "in --hicache-storage-backend-extra-config"


class _Given(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys as JSON has them."""

    pool: str = "default"
    tenant: str = ""
    weights: str = ""
    kv_scales: str = ""
    save_wait_s: float = 0.25
    verify: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The extra config, checked."""

    pool: str
    """Name of the pool: `penstock serve --name`."""
    tenant: bytes
    """Salt that keeps tenants apart."""
    weights: str
    """Digest that stands for the model's weights and configuration; "" digests the files."""
    kv_scales: str
    """Scales of a quantised KV cache: "unit", "checkpoint", or a digest. SGLang does not tell a storage backend."""
    save_wait_s: float
    """How long storing a batch waits for room, in seconds, on SGLang's backup thread."""
    verify: bool
    """Whether checksums are checked when pages are read."""


def parse_options(extra: Mapping[str, Any] | None) -> Options:
    """The options in SGLang's extra config. Raises ConfigError for a key or value that is not understood."""
    given = dict(extra or {})
    if not given.get("interface_v1"):
        raise ConfigError(
            'penstock needs "interface_v1": 1 ' + _REMEDY + ": without it SGLang copies each page once more and "
            "does not say which pages come before it"
        )
    own = {key: value for key, value in given.items() if key not in _SGLANGS}
    known = _Given.__struct_fields__
    for key in own:
        if key not in known:
            near = difflib.get_close_matches(key, [*known, *_SGLANGS], 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"unknown key {key!r} {_REMEDY}: {hint}")
    try:
        parsed = msgspec.convert(own, _Given)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{error} {_REMEDY}") from error
    if not 0 <= parsed.save_wait_s <= 60:
        raise ConfigError(f"save_wait_s={parsed.save_wait_s:g} {_REMEDY}: expected 0 to 60 seconds")
    return Options(
        pool=parsed.pool,
        tenant=parsed.tenant.encode(),
        weights=parsed.weights,
        kv_scales=parsed.kv_scales,
        save_wait_s=parsed.save_wait_s,
        verify=parsed.verify,
    )


def engine_version() -> str:
    """The installed SGLang's version. Raises Refused for one whose storage interface was not tested."""
    try:
        found = version("sglang")
    except PackageNotFoundError as error:
        raise Refused(f"sglang is not installed as a package: pip install sglang=={TESTED}") from error
    numbers = tuple(map(int, re.findall(r"\d+", found)[:3]))
    if not _OLDEST <= numbers < _BEFORE:
        raise Refused(
            f"sglang {found}: this release of penstock knows the storage interface of 0.5.23 up to, not including, "
            f"0.6 (tested: {TESTED}). Install one of those, or a newer penstock"
        )
    return found
