"""`penstock serve`: sizes, then the keeper."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
from collections.abc import Sequence
from pathlib import Path

from penstock.config import default_size, parse_size
from penstock.pool import segment as segments
from penstock.pool.layout import MIB, plan_geometry
from penstock.runtime.mover.plan import plan_tiers
from penstock.runtime.serve import Server
from penstock.tiers.numa import bind_file, binding

__all__ = ["serve"]


def serve(
    name: str,
    size: str,
    path: Path | None,
    slab: str,
    verbose: bool,
    *,
    tiers: Sequence[str] = (),
    replicas: Sequence[str] = (),
    tenant_caps: Sequence[str] = (),
    coherent: bool = True,
    numa: int | None = None,
    parent: int | None = None,
) -> None:
    """Run a keeper until SIGINT or SIGTERM, or until the process `parent`, which started this one, ends.

    With `numa` the segment's memory is taken from that node. Raises the errors of `Server`.
    """
    plan = plan_tiers(list(tiers), list(replicas), list(tenant_caps))
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s"
    )
    where = path or segments.default_path(name)
    geometry = None
    if not segments.exists(where):
        size_bytes = parse_size(size) if size else _default_bytes(where)
        geometry = plan_geometry(size_bytes, slab_bytes=parse_size(slab) if slab else None)
    elif size:
        logging.getLogger("penstock.keeper").warning(
            "%s exists and keeps its size; `penstock rm --name %s` first for another one", where, name
        )
    # The tables are allocated, and the process that touches the rest is started, in here.
    with binding(numa) if numa is not None else contextlib.nullcontext():
        server = Server(name, where, geometry, tiers=plan, coherent=coherent)
    if numa is not None:
        bind_file(server.segment.fd, server.segment.geometry.total_bytes, numa)
    if parent is not None:
        _end_with(parent, server)
    mib = server.segment.geometry.total_bytes // MIB
    logging.getLogger("penstock.keeper").info("pool %s: %d MiB at %s", name, mib, where)
    server.run()


def _default_bytes(path: Path) -> int:
    return segments.device_bytes(path) if path.is_char_device() else default_size(path.parent)


def _end_with(parent: int, server: Server) -> None:
    """Stop the server when its parent has ended, also if it ended before this was called."""
    try:
        process = os.pidfd_open(parent)
    except ProcessLookupError:
        server.stop()
        return
    if os.getppid() != parent:  # the number is another process's by now
        os.close(process)
        server.stop()
        return

    def wait() -> None:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        poll.poll()
        server.stop()

    threading.Thread(target=wait, name="penstock-parent", daemon=True).start()
