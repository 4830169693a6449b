"""`penstock serve`: sizes, then the keeper."""

from __future__ import annotations

import logging
from pathlib import Path

from penstock.config import default_size, parse_size
from penstock.pool import segment as segments
from penstock.pool.layout import MIB, plan_geometry
from penstock.runtime.mover.plan import plan_tiers
from penstock.runtime.serve import Server

__all__ = ["serve"]


def serve(
    name: str, size: str, path: Path | None, slab: str, verbose: bool, tiers: list[str], replicas: list[str],
    tenant_caps: list[str],
) -> None:  # fmt: skip
    """Run a keeper until SIGINT or SIGTERM. Raises the errors of `Server`."""
    plan = plan_tiers(tiers, replicas, tenant_caps)
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s"
    )
    where = path or segments.default_path(name)
    geometry = None
    if not segments.exists(where):
        size_bytes = parse_size(size) if size else default_size(where.parent)
        geometry = plan_geometry(size_bytes, slab_bytes=parse_size(slab) if slab else None)
    elif size:
        logging.getLogger("penstock.keeper").warning(
            "%s exists and keeps its size; `penstock rm --name %s` first for another one", where, name
        )
    server = Server(name, where, geometry, tiers=plan)
    mib = server.segment.geometry.total_bytes // MIB
    logging.getLogger("penstock.keeper").info("pool %s: %d MiB at %s", name, mib, where)
    server.run()
