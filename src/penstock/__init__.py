"""Penstock: one pool of memory under every inference engine.

Importing this loads nothing heavy: numba, the kernels and the engines are loaded where they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penstock.types import Drop, Eviction, FetchEnd, Intent, Miss, Urgency

if TYPE_CHECKING:
    from penstock.identity import Key, KeyChain, Rank, Space, chain_keys
    from penstock.pool.below import Below, Fetch
    from penstock.pool.client import Pool, SpaceHandle, Stored
    from penstock.pool.lease import Lease
    from penstock.pool.reservation import Reservation
    from penstock.pool.tensors import TensorMap
    from penstock.runtime.opening import open_pool as open

__all__ = [
    "Below",
    "Drop",
    "Eviction",
    "Fetch",
    "FetchEnd",
    "Intent",
    "Key",
    "KeyChain",
    "Lease",
    "Miss",
    "Pool",
    "Rank",
    "Reservation",
    "Space",
    "SpaceHandle",
    "Stored",
    "TensorMap",
    "Urgency",
    "__version__",
    "chain_keys",
    "open",
]

_WHERE = {
    "Below": "penstock.pool.below",
    "Fetch": "penstock.pool.below",
    "Key": "penstock.identity",
    "KeyChain": "penstock.identity",
    "Lease": "penstock.pool.lease",
    "Pool": "penstock.pool.client",
    "Rank": "penstock.identity",
    "Reservation": "penstock.pool.reservation",
    "Space": "penstock.identity",
    "SpaceHandle": "penstock.pool.client",
    "Stored": "penstock.pool.client",
    "TensorMap": "penstock.pool.tensors",
    "chain_keys": "penstock.identity",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "open":
        from penstock.runtime.opening import open_pool

        return open_pool
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("penstock")
        except PackageNotFoundError:  # run from a source tree that is not installed
            return "0+unknown"
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'penstock' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
