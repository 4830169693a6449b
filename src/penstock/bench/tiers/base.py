"""What is measured of the tiers, and the targets."""

from __future__ import annotations

from penstock.bench.pool.base import Group
from penstock.bench.report import Goal

__all__ = ["GROUPS", "PACKAGE"]

PACKAGE = "penstock.bench.tiers"

GROUPS = {
    "disk-64kib": Group(
        "disk",
        (Goal("disk_write_of_device_64kib", "ratio", 0.85), Goal("disk_read_of_device_64kib", "ratio", 0.85)),
        "64kib",
        300.0,
    ),
    "disk-2mib": Group(
        "disk",
        (Goal("disk_write_of_device_2mib", "ratio", 0.85), Goal("disk_read_of_device_2mib", "ratio", 0.85)),
        "2mib",
        300.0,
    ),
    "recover": Group("recover", (Goal("recover_1m_blocks_s", "s", 5, at_most=True),), "", 300.0),
    "valkey": Group("valkey", (Goal("valkey_of_bare_client", "ratio", 0.9),), "", 300.0),
    "mooncake": Group("mooncake", (Goal("mooncake_of_batch_api", "ratio", 0.9),), "", 300.0),
    "checksum": Group(
        "checksum",
        (Goal("checksum_gb_s", "GB/s", 8), Goal("checksum_share_of_fetch", "ratio", 0.1, at_most=True)),
        "",
        300.0,
    ),
    "ttft": Group("ttft", (Goal("ttft_over_best", "ratio", 1.05, at_most=True),), "", 900.0),
    "restart": Group("restart", (Goal("restart_first_hit_s", "s", 1, at_most=True),), "", 600.0),
}
