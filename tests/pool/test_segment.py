"""Segments: creation, opening with every check, and who may map what how."""

from __future__ import annotations

import os
import re
import stat
import struct
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.errors import ConfigError, Damaged, FormatMismatch, NoPool, NoSpaceLeft, NotOurs, SegmentError
from penstock.pool import layout, segment
from penstock.testing.pool import TINY, Site


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "segment"


@pytest.fixture
def made(path: Path) -> Path:
    segment.create(path, TINY).close()
    return path


def patch(path: Path, offset: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack("<Q", value))


def test_what_was_created_is_opened(path: Path) -> None:
    created = segment.create(path, TINY)
    opened = segment.open_existing(path)
    assert opened.geometry == created.geometry == TINY
    assert opened.uuid == created.uuid and uuid.UUID(bytes=opened.uuid).version == 4
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size == TINY.total_bytes
    assert segment.exists(path)
    for each in (created, opened):
        each.close()
        each.close()


def test_tables_are_allocated_and_slabs_are_not(made: Path) -> None:
    assert made.stat().st_blocks * 512 >= TINY.data_offset
    huge = replace(TINY, n_slabs=1 << 14)
    segment.create(made, huge).close()
    assert made.stat().st_blocks * 512 < huge.total_bytes


def test_nothing_there(path: Path) -> None:
    assert not segment.exists(path)
    with pytest.raises(NoPool, match="penstock serve"):
        segment.open_existing(path)


def test_of_another_user(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment.os, "geteuid", lambda: made.stat().st_uid + 1)
    with pytest.raises(NotOurs, match="--name"):
        segment.open_existing(made)
    segment.open_existing(made, check_owner=False).close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root opens everything")
def test_without_permission(made: Path) -> None:
    made.chmod(0)
    with pytest.raises(NotOurs, match="another user"):
        segment.open_existing(made)


@pytest.mark.parametrize(
    ("offset", "value", "error", "text"),
    [
        (layout.H_MAGIC, 0, Damaged, "not a Penstock segment"),
        (layout.H_VERSION, layout.FORMAT_VERSION + 1, FormatMismatch, "penstock rm"),
        (layout.H_TOTAL_BYTES, TINY.total_bytes + 4096, Damaged, "contradicts"),
        (layout.H_N_BUCKETS, 1, Damaged, "contradicts"),
        (layout.H_UNIT_BYTES, 0, Damaged, "contradicts"),
        (layout.H_UNIT_BYTES, 1 << 63, Damaged, "contradicts"),
        (layout.H_N_SLABS, 1 << 40, Damaged, "contradicts"),
        (layout.H_RING, 33, Damaged, "contradicts"),
        (layout.H_LEASES, (1 << 64) - 1, Damaged, "contradicts"),
        (layout.H_MAX_SPACES, 0, Damaged, "contradicts"),
    ],
)
def test_header_that_cannot_be(made: Path, offset: int, value: int, error: type[SegmentError], text: str) -> None:
    patch(made, offset, value)
    with pytest.raises(error, match=text):
        segment.open_existing(made)


@pytest.mark.parametrize("size", [0, 100, layout.PAGE, TINY.data_offset, TINY.total_bytes - 1])
def test_truncated(made: Path, size: int) -> None:
    os.truncate(made, size)
    with pytest.raises(Damaged, match="penstock rm"):
        segment.open_existing(made)


def test_neither_links_nor_folders_are_followed(made: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(made)
    for bad in (link, tmp_path):
        with pytest.raises(Damaged, match="not a segment"):
            segment.open_existing(bad)


def test_more_than_the_file_system_has(path: Path) -> None:
    with pytest.raises(NoSpaceLeft, match="--size"):
        segment.create(path, replace(TINY, n_slabs=1 << 24, slab_bytes=1 << 30))
    assert not path.exists(), "nothing was written"
    with pytest.raises(ConfigError, match="--path"):
        segment.create(path / "no" / "folder", TINY)


def test_an_interrupted_creation_is_replaced(path: Path) -> None:
    segment.create(path, TINY).close()
    patch(path, layout.H_MAGIC, 0)
    assert not segment.exists(path)
    segment.create(path, TINY).close()
    assert segment.exists(path)


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "x" * 40])
def test_names(name: str) -> None:
    assert segment.default_path(name).name.endswith(name)


@pytest.mark.parametrize("name", ["", ".a", "-a", "a/b", "x" * 41, "a\n", "ä", "a b", ".."])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="letters, digits"):
        segment.check_name(name)


def test_clients_map_the_tables_read_only(site: Site) -> None:
    at = site.client()._at
    assert not at.tables.array.flags.writeable
    assert at.lane.array.flags.writeable and at.data.array.flags.writeable


def test_mappings_are_left_out_of_dumps_and_lanes_of_forks(site: Site) -> None:
    at = site.client()._at
    flags = {}
    address = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line):
            address = int(found[1], 16)
        elif line.startswith("VmFlags:"):
            flags[address] = line.split()[1:]
    for mapping in (at.tables, at.lane, at.data):
        assert "dd" in flags[mapping.address]
    assert "dc" in flags[at.lane.address]
