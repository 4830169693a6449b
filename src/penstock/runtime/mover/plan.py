"""What a mover is to do, as the keeper tells it at its start: which tiers, and how they are used."""

from __future__ import annotations

import hashlib

import msgspec

from penstock.config import parse_size
from penstock.errors import ConfigError
from penstock.tiers.registry import TierConfig, parse_tier

__all__ = ["BAD_PLAN", "MoverPlan", "plan_tiers", "tenant_number"]

BAD_PLAN = 78
"""Exit status of a mover whose plan can never be carried out (sysexits.h: EX_CONFIG); the keeper then stops, too."""


class MoverPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Addresses and settings; holds no secrets, which tiers read where docs/tiers.md says."""

    tiers: list[str]
    replicas: dict[str, int] = {}
    """Tiers that a tenant's blocks are written to; "" is everybody else."""
    tenant_caps: dict[str, float] = {}
    """Bytes a second that moves of a tenant's blocks may take."""


def plan_tiers(tiers: list[str], replicas: list[str], tenant_caps: list[str]) -> MoverPlan | None:
    """The plan behind `penstock serve`'s options; None without tiers. Raises ConfigError for what cannot be used."""
    configs = [parse_tier(address) for address in tiers]
    if not configs:
        if replicas or tenant_caps:
            raise ConfigError("--replicas and --tenant-cap are about tiers; give at least one --tier")
        return None
    _check_names(configs)
    copies = {tenant: _count(text, len(configs)) for tenant, text in map(_split, replicas)}
    caps = {tenant: float(parse_size(text)) for tenant, text in map(_split, tenant_caps)}
    if "" in caps:
        raise ConfigError(
            "--tenant-cap is TENANT=SIZE, bytes a second; a tier's own cap is the option cap= of its address"
        )
    return MoverPlan(tiers, copies, caps)


def tenant_number(name: str) -> int:
    """How slot records name a tenant: 0 for none, else 8 bytes of its name's digest, as an unsigned number."""
    if not name:
        return 0
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _check_names(configs: list[TierConfig]) -> None:
    names = [config.name for config in configs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ConfigError(f"two tiers are named {', '.join(sorted(twice))}; tell them apart with the option name=")
    if len(configs) > 63:
        raise ConfigError(f"{len(configs)} tiers; at most 63")


def _split(text: str) -> tuple[str, str]:
    tenant, equals, value = text.rpartition("=")
    return (tenant if equals else "", value)


def _count(text: str, n_tiers: int) -> int:
    if not text.isdigit() or not 1 <= int(text) <= n_tiers:
        raise ConfigError(f"--replicas {text!r}: a number from 1 to the number of tiers ({n_tiers}), or TENANT=NUMBER")
    return int(text)
