"""`penstock tiers`: what is printed of a mover's report."""

from __future__ import annotations

import copy
import io
import json
import re
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from penstock.cli import tiers as tiers_module
from penstock.cli.app import app
from penstock.cli.tiers import render
from penstock.errors import NoKeeper
from tests.support import unique_name

GIB = 1 << 30
IDLE = {"fetch_bytes": 0, "prefetch_bytes": 0, "write_back_bytes": 0, "running": 0}
REPORT: dict[str, Any] = {
    "tiers": [
        {
            "name": "memory", "scheme": "memory", "location": "/mnt/cxl/penstock", "write": "eviction", "up": True,
            "why": "", "capacity_bytes": 256 * GIB, "used_bytes": 250 * GIB, "blocks": 131072, "latency_s": 9e-7,
            "bytes_per_s": 21.5e9, "measured": True, "queue": IDLE,
            "counters": {"reads": 120345, "evictions": 991, "read_failed": 0},
        },
        {
            "name": "disk", "scheme": "disk", "location": "/var/cache/penstock", "write": "second-use", "up": True,
            "why": "", "capacity_bytes": 64 * GIB, "used_bytes": int(12.34 * GIB), "blocks": 6291, "latency_s": 4.8e-5,
            "bytes_per_s": 3.4e9, "measured": True,
            "queue": {"fetch_bytes": 4 << 20, "prefetch_bytes": 0, "write_back_bytes": 96 << 20, "running": 2},
            "counters": {
                "stored": 6300, "evictions": 9, "device_bytes_written": 13 * GIB, "read_failed": 2,
                "checksum_mismatch": 1, "retries": 0,
            },
        },
        {
            "name": "[bold]store", "scheme": "valkey", "location": "//10.0.0.5:6379/0", "write": "through",
            "up": False, "why": "it refused the password", "capacity_bytes": None, "used_bytes": None, "blocks": None,
            "latency_s": 2e-4, "bytes_per_s": 1.2e9, "measured": False, "queue": IDLE, "counters": {"timeouts": 17},
        },
    ],
    "fetches": {"done": 812, "absent": 40, "deadline": 3, "read_failed": 0},
    "orders": {"writes": 6309, "promotions": 12, "cancelled": 1},
    "mover": {"pid": 4711, "restarts": 0, "uptime_s": 93784.2},
}  # fmt: skip


def shown(report: dict[str, Any], width: int = 120, *, colour: bool = False) -> str:
    console = Console(
        width=width, file=io.StringIO(), force_terminal=colour, color_system="standard" if colour else None
    )
    with console.capture() as captured:
        for part in render(report):
            console.print(part, highlight=False)
    return captured.get()


@pytest.mark.parametrize("width", [80, 120])
def test_everything_is_there_and_fits(width: int) -> None:
    text = shown(REPORT, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text, "nothing is cut"
    said = " ".join(text.replace("\N{NO-BREAK SPACE}", " ").split())
    for part in (
        "3 tiers, mover 4711, running for 1 d 2 h",
        "memory 250 GiB 98% 256 GiB 131,072 900 ns 21.5 GB/s",
        "disk 12.3 GiB 19% 64 GiB 6,291 48 us 3.4 GB/s 100 MiB",
        "DOWN [bold]store ? ? ? ~200 us ~1.2 GB/s",
        "disk:/var/cache/penstock, write=second-use",
        "queue: fetch 4 MiB write-back 96 MiB 2 running",
        "device_bytes_written 13 GiB",
        "down: it refused the password",
        "valkey://10.0.0.5:6379/0, write=through",
        "done 812 absent 40 deadline 3",
        "promotions 12",
        "~ assumed",
    ):
        assert part in said, part
    assert "retries" not in said and "restarted" not in said, "zeros are left out"


def test_what_is_wrong_stands_out() -> None:
    text = shown(REPORT, colour=True).replace("\N{NO-BREAK SPACE}", " ")
    red = "\x1b[1;31m"
    for alarm in ("read_failed 2", "checksum_mismatch 1", "timeouts 17", "DOWN [bold]store"):
        assert f"{red}{alarm}" in text, alarm
    assert f"{red}stored" not in text
    assert text.index("read_failed 2") < text.index("stored 6,300"), "it comes first"
    yellow = re.findall("\x1b\\[33m *([^\x1b]*)", text)
    assert [piece.split() for piece in yellow] == [["250", "GiB", "98%"]], "nearly full"


def test_a_mover_that_is_gone_or_came_back() -> None:
    report = copy.deepcopy(REPORT)
    report["mover"]["restarts"] = 2
    assert "restarted 2 times" in shown(report)
    for gone in (None, {"pid": None, "restarts": 9, "uptime_s": 0.0}):
        assert "not running" in shown({**report, "mover": gone})


def test_without_tiers() -> None:
    text = shown({"tiers": [], "fetches": {}, "orders": {}, "mover": None})
    assert "no tiers" in text and "--tier" in text and len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("n", "text"),
    [(None, "?"), (0, "0 B"), (1023, "1023 B"), (1 << 20, "1 MiB"), (1023 << 30, "1023 GiB"), (1 << 54, "16 PiB")],
)
def test_bytes(n: int | None, text: str) -> None:
    assert tiers_module._bytes(n).replace("\N{NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (61, "1 min 1 s"), (3600, "1 h"), (7300, "2 h 1 min"), (90_000, "1 d 1 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert tiers_module._duration(seconds) == text


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CliRunner()
    assert isinstance(runner.invoke(app, ["tiers", "--name", unique_name("c")]).exception, NoKeeper)
    monkeypatch.setattr(tiers_module, "ask_mover", {"p": REPORT}.__getitem__)
    done = runner.invoke(app, ["tiers", "--name", "p"])
    assert done.exit_code == 0 and "mover 4711" in done.output
    assert json.loads(runner.invoke(app, ["tiers", "--name", "p", "--json"]).output) == REPORT
