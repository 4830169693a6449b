"""A real Mooncake master on loopback, and a process that lends it memory; a skip where Mooncake is not installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.tiers.servers import LOOPBACK, Daemon, free_port, listens, program


def need_mooncake() -> str:
    """The master's program; skips the test where Mooncake is not installed or cannot be loaded."""
    pytest.importorskip(
        "mooncake.store",
        reason="Mooncake is not installed (extra `mooncake`, and libibverbs1 librdmacm1 libnuma1 libcurl4)",
        exc_type=ImportError,
    )
    found = program("mooncake_master")
    assert found is not None, "Mooncake is installed without its master"
    return found


class MooncakeMaster(Daemon):
    """A master whose leases last long enough for any test. Knows nothing any more after a restart."""

    name = "mooncake_master"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.move()

    def move(self) -> None:
        self.port, self.metrics_port = free_port(), free_port()

    @property
    def address(self) -> str:
        return f"mooncake://{LOOPBACK}:{self.port}"

    def command(self) -> Sequence[str]:
        return [
            need_mooncake(), f"--rpc_address={LOOPBACK}", f"--rpc_port={self.port}",
            f"--metrics_port={self.metrics_port}", f"--metrics_host={LOOPBACK}", "--default_kv_lease_ttl=10s",
        ]  # fmt: skip

    def ready(self) -> bool:
        return listens(self.port)


class Lender(Daemon):
    """Another client, in a process of its own, in whose memory blocks lie. Stores `blocks` of a chain of its own."""

    name = "lender"

    def __init__(self, folder: Path, master: MooncakeMaster, segment: str, blocks: int = 0) -> None:
        super().__init__(folder)
        self.arguments = (f"{master.address}?segment={segment}&buffer=32M&prefix=lender/", str(blocks))

    def command(self) -> Sequence[str]:
        return [sys.executable, str(Path(__file__).with_name("mooncake_lender.py")), *self.arguments]

    def ready(self) -> bool:
        return "lends\n" in self.log
