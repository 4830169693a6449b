"""The profile as tables and as a picture."""

from __future__ import annotations

import io
import itertools
import struct
import sys
from pathlib import Path

import pytest
from rich.console import Console

from penstock.bench.probe.plot import check_plot, spread, write_plot
from penstock.bench.probe.table import as_tables, shown_rate, shown_seconds, shown_size
from penstock.errors import ConfigError
from penstock.profile import Direction, LeftOut, Model, Point, Profile, TierProfile

SIZES = [64, 4096, 65536, 1 << 20, 64 << 20]


def tier(name: str, latency_us: float, gb_s: float, directions: tuple[Direction, ...]) -> TierProfile:
    points, models = [], []
    for n, direction in enumerate(directions):
        moves = direction is not Direction.HOLDS
        models.append(Model(direction, latency_us / 1e6, gb_s * 1e9 if moves else None, 0.05, 0.31))
        for size in SIZES:
            took = (1 + 0.2 * n) * (latency_us + (size / gb_s / 1e3 if moves else 0))
            points.append(Point(direction, size, took, 2 * took, size / took / 1e3 if moves else None, 100))
    return TierProfile(name, name.partition(":")[0], models, points, ["noted"])


ALL = (Direction.READ, Direction.WRITE, Direction.HOLDS)
PROFILE = Profile(
    "2025-01-01T00:00:00+00:00",
    {"cpu": "A processor"},
    [tier("memory", 0.1, 12, (Direction.READ, Direction.COPY)), tier("dir:/[red]x", 50, 3, ALL)],
    [LeftOut("dax:/dev/dax0.0", "no [bold] permission")],
)


def shown(profile: Profile, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as captured:
        for part in as_tables(profile, width):
            console.print(part, highlight=False)
    return captured.get()


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables(width: int) -> None:
    text = shown(PROFILE, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "dir:/[red]x" in text and "dax:/dev/dax0.0: left out. no [bold] permission" in text
    assert "read: 50 us + bytes / 3 GB/s  (±5%, at worst 31%)" in text
    assert "holds: 50 us  (±5%, at worst 31%)" in text
    assert "64 MiB" in text and "22.4 ms" in text and "noted" in text
    assert "…" not in text, "nothing is cut"


def test_a_point_that_is_missing_is_an_empty_cell() -> None:
    whole = PROFILE.tiers[1]
    points = [point for point in whole.points if point.size_bytes != 64 or point.direction is Direction.HOLDS]
    partial = Profile(PROFILE.made_at, {}, [TierProfile("dir:/x", "dir", whole.models, points)])
    row = next(line for line in shown(partial, 120).splitlines() if "64 B" in line)
    assert row.split() == ["64", "B", "70", "us", "140", "us"]


@pytest.mark.parametrize(
    ("value", "text"), [(3e-9, "3 ns"), (999e-9, "999 ns"), (1.25e-5, "12.5 us"), (0.0042, "4.2 ms"), (1.5, "1.5 s")]
)
def test_seconds(value: float, text: str) -> None:
    assert shown_seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(3.456, "3.46 GB/s"), (0.25, "250 MB/s"), (2e-5, "20 kB/s")])
def test_rates(value: float, text: str) -> None:
    assert shown_rate(value) == text


@pytest.mark.parametrize(("value", "text"), [(64, "64 B"), (4096, "4 KiB"), (1536, "1.5 KiB"), (64 << 20, "64 MiB")])
def test_sizes(value: int, text: str) -> None:
    assert shown_size(value) == text


# ---- the picture


def size_of(png: Path) -> tuple[int, int]:
    content = png.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_the_picture(tmp_path: Path) -> None:
    write_plot(PROFILE, tmp_path / "p.png")
    assert size_of(tmp_path / "p.png") == (1950, 900)


def test_a_picture_of_many_tiers_is_higher(tmp_path: Path) -> None:
    many = [tier(f"valkey://10.0.0.{n}:6379/a/long/name/of/a/place", 10 + n, 1 + n / 9, ALL) for n in range(12)]
    write_plot(Profile(PROFILE.made_at, {}, many), tmp_path / "p.png")
    width, height = size_of(tmp_path / "p.png")
    assert width == 1950 and height > 900


def test_a_picture_of_nothing(tmp_path: Path) -> None:
    write_plot(Profile(PROFILE.made_at, {}, []), tmp_path / "p.png")
    assert size_of(tmp_path / "p.png") == (1950, 900)


def test_what_cannot_be_drawn_is_said_before_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_plot(tmp_path / "p.png")
    with pytest.raises(ConfigError, match=r"ends in \.png"):
        check_plot(tmp_path / "p.pdf")
    with pytest.raises(ConfigError, match="make it first"):
        check_plot(tmp_path / "none" / "p.png")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_plot(PROFILE, tmp_path / "none" / "p.png")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    sys.path_importer_cache.clear()
    with pytest.raises(ConfigError, match=r"pip install 'penstock\[plot\]'"):
        check_plot(tmp_path / "p.png")


@pytest.mark.parametrize(
    "wanted", [[], [0.5], [0.5, 0.5, 0.5], [0.99, 1.0, 1.2], [0.0, 0.01, -0.3], [0.1, 0.9, 0.12, 0.5, 0.88]]
)
def test_labels_are_apart_inside_and_in_order(wanted: list[float]) -> None:
    places = spread(wanted, 0.05)
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    sorted_places = [places[i] for i in order]
    for low, high in itertools.pairwise(sorted_places):
        assert high - low >= 0.05 - 1e-9
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)


def test_labels_with_room_stay_where_they_are() -> None:
    assert spread([0.2, 0.8, 0.5], 0.05) == [0.2, 0.8, 0.5]
