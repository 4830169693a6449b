"""Files that say what cannot be, or are no files: the tier opens, and what they held is lost."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.tiers import disk_slab
from penstock.tiers.base import Found, Placed
from penstock.tiers.disk import DiskTier
from penstock.tiers.disk_format import (
    HEADER_BYTES,
    SPACES_NAME,
    WEAR_NAME,
    Header,
    check_rows,
    pack_header,
    parse_spaces,
    row_dtype,
    unpack_header,
)
from tests.tiers.disk_support import ODD, chain, consistent, error, open_disk, read, write

HERE, ABSENT = Found.HERE, Found.ABSENT
STORED, PRESENT = Placed.STORED, Placed.PRESENT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a closed tier with a chain of 20 blocks, 16 of them in slab 0."""
    tier = open_disk(tmp_path)
    assert write(tier, chain(0, 20)) == [STORED] * 20
    tier.close()
    return tmp_path


def opened(folder: Path) -> DiskTier:
    """A tier there; a start that hangs fails the test."""
    found: list[DiskTier] = []
    thread = threading.Thread(target=lambda: found.append(open_disk(folder)), daemon=True)
    thread.start()
    thread.join(60)
    assert found, "it hangs, or is refused"
    return found[0]


# ---- the spaces file and the wear


def in_space(**fields: Any) -> Callable[[Any], None]:
    return lambda file: file["spaces"][0].update(fields)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.update(salt=-1),
        lambda file: file.update(salt=1 << 64),
        lambda file: file.update(next_number=0),
        lambda file: file.update(next_number=1 << 40),
        lambda file: file.update(next_number=1),
        lambda file: file["spaces"].append(file["spaces"][0]),
        in_space(number=0),
        in_space(number=-1),
        in_space(digest="p0" * 32),
        in_space(digest="00" * 31),
        in_space(root="00" * 17),
        in_space(root="é0" * 16),
        in_space(block_bytes=0),
        in_space(block_bytes=1 << 63),
        in_space(n_segments=-1),
        in_space(segment_bytes="LONG"),
    ],
)
def test_a_spaces_file_that_cannot_be_is_a_lost_one(folder: Path, spoil: Callable[[Any], None]) -> None:
    path = folder / SPACES_NAME
    file = json.loads(path.read_text())
    spoil(file)
    path.write_text(json.dumps(file).replace('"LONG"', "1" + "0" * 5000))
    assert parse_spaces(path.read_bytes(), "here") is None
    tier = opened(folder)
    assert read(tier, chain(0, 20)) == [ABSENT] * 20
    assert write(tier, chain(1, 20)) == [STORED] * 20
    assert write(tier, chain(1, 4, ODD), ODD) == [STORED] * 4
    tier.close()
    tier = opened(folder)
    assert read(tier, chain(1, 20)) == [HERE] * 20
    tier.close()


def test_a_spaces_file_of_brackets() -> None:
    assert parse_spaces(b'{"a": ' + b"[" * 100_000, "here") is None


@pytest.mark.parametrize("text", ["9" * 5000, "-1", "9" * 25, "²", ""])
def test_wear_that_cannot_be_is_none(folder: Path, text: str) -> None:
    (folder / WEAR_NAME).write_text(text)
    tier = opened(folder)
    assert tier.counters()["lifetime_written_bytes"] == 0
    tier.close()


# ---- slabs


def other_header(folder: Path, **fields: int) -> None:
    path = folder / "slab-000000.rows"
    data = path.read_bytes()
    old = unpack_header(data)
    assert old is not None
    all_fields = {name: getattr(old, name) for name in ("slab", "salt", "life", "stride", "n_slots")}
    path.write_bytes(pack_header(Header(**(all_fields | fields))) + data[HEADER_BYTES:])


@pytest.mark.parametrize(
    "fields",
    [
        {"n_slots": 1 << 34},
        {"n_slots": 17},
        {"n_slots": (1 << 64) - 1},
        {"stride": (1 << 63) + 4096},
        {"stride": 1 << 59},
    ],
)
def test_a_header_that_cannot_be(folder: Path, fields: dict[str, int]) -> None:
    other_header(folder, **fields)
    lost_the_first_slab(opened(folder))


def test_a_header_of_more_slots_than_any_slab_has_in_a_file_that_has_room(folder: Path) -> None:
    other_header(folder, n_slots=1 << 34)
    os.truncate(folder / "slab-000000.rows", 1 << 41)
    lost_the_first_slab(opened(folder))


def test_a_rows_file_that_grew(folder: Path) -> None:
    os.truncate(folder / "slab-000000.rows", 1 << 40)
    tier = opened(folder)
    assert read(tier, chain(0, 20)) == [HERE] * 20
    tier.close()


def lost_the_first_slab(tier: DiskTier) -> None:
    assert read(tier, chain(0, 20)) == [ABSENT] * 16 + [HERE] * 4
    assert write(tier, chain(0, 20)) == [STORED] * 16 + [PRESENT] * 4
    consistent(tier)
    tier.close()


def test_a_stamp_that_no_tier_reaches(folder: Path) -> None:
    path = folder / "slab-000000.rows"
    data = bytearray(path.read_bytes())
    header = unpack_header(bytes(data))
    assert header is not None
    rows = np.frombuffer(data, row_dtype, header.n_slots, HEADER_BYTES)
    rows["stamp"][0] = (1 << 64) - 1
    rows["check"][:1] = check_rows(rows.view(np.uint64).reshape(-1, 8)[:1], header.life, np.arange(1))
    path.write_bytes(data)
    tier = opened(folder)
    assert tier.counters()["torn_rows"] == 1
    assert sum(each == HERE for each in read(tier, chain(0, 20))) == 19
    assert write(tier, chain(1, 4)) == [STORED] * 4
    consistent(tier)
    tier.close()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["slab-000000.rows", "slab-000000.data", "slab-000003.rows"])
def test_no_file_under_a_slabs_name(folder: Path, make: Callable[[Path], None], name: str) -> None:
    """It is left alone, and so is the number."""
    path = folder / name
    path.unlink(missing_ok=True)
    make(path)
    tier = opened(folder)
    lost = 16 if "000000" in name else 0
    assert read(tier, chain(0, 20)) == [ABSENT] * lost + [HERE] * (20 - lost)
    assert tier.counters()["errors"] == 1
    for number in range(1, 30):
        assert write(tier, chain(number, 10)) == [STORED] * 10
    assert path.exists() and not path.is_file()
    consistent(tier)
    tier.close()


@pytest.mark.parametrize("name", [SPACES_NAME, WEAR_NAME])
def test_a_pipe_under_another_name(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    tier = opened(folder)
    assert write(tier, chain(1, 4)) == [STORED] * 4
    tier.close()


def test_rows_that_cannot_be_read_cost_their_slab(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are left as they are: a later start may read them."""
    real = disk_slab._read

    def refuse(fd: int, offset: int, most: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("slab-000000.rows"):
            raise error(errno.EIO)
        return real(fd, offset, most)

    with monkeypatch.context() as patched:
        patched.setattr(disk_slab, "_read", refuse)
        tier = opened(folder)
    assert read(tier, chain(0, 20)) == [ABSENT] * 16 + [HERE] * 4
    for number in range(1, 30):
        assert write(tier, chain(number, 10)) == [STORED] * 10
    assert sum(path.stat().st_size for path in folder.glob("slab-*")) <= 1060000, "they take room"
    consistent(tier)
    tier.close()
    tier = opened(folder)
    assert read(tier, chain(0, 16)) == [HERE] * 16
    tier.close()


def test_a_start_without_descriptors_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is not the slabs' fault, and costs no block."""

    def refuse(*_: object) -> bytes:
        raise error(errno.EMFILE)

    with monkeypatch.context() as patched, pytest.raises(Exception, match="Too many open files"):
        patched.setattr(disk_slab, "_read", refuse)
        open_disk(folder)
    tier = opened(folder)
    assert read(tier, chain(0, 20)) == [HERE] * 20
    tier.close()
