"""docs/disk-format.md says what the code does, and what a real tier writes: offsets, fields, names and checks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from penstock.tiers.base import Found
from penstock.tiers.disk_format import (
    FORMAT_VERSION,
    HEADER_BYTES,
    LOCK_NAME,
    MAGIC,
    PAGE_BYTES,
    ROW_BYTES,
    ROW_USED,
    SPACES_NAME,
    WEAR_NAME,
    Header,
    SavedSpace,
    SpacesFile,
    check_rows,
    data_name,
    header_dtype,
    pack_header,
    row_dtype,
    rows_name,
    stride_of,
    unpack_header,
)
from tests.tiers.disk_support import ODD, SPACE, chain, open_disk, read, write

TEXT = (Path(__file__).parents[2] / "docs" / "disk-format.md").read_text()
MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def table(title: str) -> list[list[str]]:
    """The cells of the table below a heading, without backticks."""
    part = re.split(r"\n#+ ", TEXT.split(f"{title}\n", 1)[1])[0]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    return [row for row in rows if row[0].strip("-") and row[0] not in ("offset", "field", "words")]


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def check(words: list[int]) -> int:
    """The page's definition, in plain Python."""
    return mix(sum(mix((word + (i + 1) * GOLDEN) & MASK) for i, word in enumerate(words)) & MASK)


@pytest.mark.parametrize(("title", "dtype"), [("### Header", header_dtype), ("### Row", row_dtype)])
def test_layouts(title: str, dtype: np.dtype[np.void]) -> None:
    documented = [(int(offset), int(size), name) for offset, size, name, _ in table(title)]
    assert dtype.fields is not None
    assert documented == [(spec[1], spec[0].itemsize, name) for name, spec in dtype.fields.items()]
    assert row_dtype.itemsize == ROW_BYTES and f"rows of {ROW_BYTES} bytes" in TEXT
    assert f"{HEADER_BYTES} bytes of header" in TEXT


def test_the_spaces_file() -> None:
    names = [row[0] for row in table("## The spaces file")]
    files, spaces = (list(each.__struct_fields__) for each in (SpacesFile, SavedSpace))
    assert names == files + spaces


def test_names_and_numbers() -> None:
    assert [row[0] for row in table("# Disk files") if row[0] != "file"] == [
        LOCK_NAME, SPACES_NAME, WEAR_NAME, "slab-NNNNNN.data", "slab-NNNNNN.rows",
    ]  # fmt: skip
    assert (data_name(7), rows_name(123456)) == ("slab-000007.data", "slab-123456.rows")
    assert f"Format version {FORMAT_VERSION}," in TEXT and f"| `format` | {FORMAT_VERSION} |" in TEXT
    assert f"| `magic` | `{MAGIC}` |" in TEXT and f"| `state` | {ROW_USED} |" in TEXT
    assert [stride_of(n) for n in (1, PAGE_BYTES, PAGE_BYTES + 1)] == [4096, 4096, 8192]


def test_check_vectors() -> None:
    vectors = table("### Checks")
    assert len(vectors) == 2
    for words, expected in vectors:
        assert check([int(word) for word in words.split()]) == int(expected, 16)
    words = np.array([[1, 2, 3, 4, 5, 6, 7, 0]], np.uint64)
    assert hex(int(check_rows(words, 8, np.array([9]))[0])) == vectors[0][1]


def test_headers_go_there_and_back() -> None:
    header = Header(3, (1 << 64) - 1, 1 << 63, 8192, 100)
    data = pack_header(header)
    assert len(data) == HEADER_BYTES and unpack_header(data) == header
    words = np.frombuffer(data[: header_dtype.itemsize], np.uint64).tolist()
    assert words[-1] == check(words[:-1])
    for at in range(header_dtype.itemsize):
        assert unpack_header(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]) is None
    assert unpack_header(data[:-1]) is None


def _word(rows: npt.NDArray[np.void], i: int) -> list[int]:
    return [int(word) for word in np.frombuffer(rows[i].tobytes(), np.uint64)]


def test_what_a_tier_writes(tmp_path: Path) -> None:
    """Read by the page alone."""
    tier = open_disk(tmp_path)
    for space in (SPACE, ODD):
        write(tier, chain(0, 5, space), space)
    tier.close()
    spaces = json.loads((tmp_path / SPACES_NAME).read_text())
    assert (spaces["magic"], spaces["format"], spaces["next_number"]) == (MAGIC, FORMAT_VERSION, 3)
    assert [bytes.fromhex(each["digest"]) for each in spaces["spaces"]] == [SPACE.digest, ODD.digest]
    for slab, space in enumerate((SPACE, ODD)):
        data = (tmp_path / f"slab-{slab:06d}.rows").read_bytes()
        life, stride = (int.from_bytes(data[at : at + 8], "little") for at in (32, 40))
        rows = np.frombuffer(data, row_dtype, offset=HEADER_BYTES)
        assert rows["key"][:5].tolist() == chain(0, 5, space).tolist() and not rows["state"][5:].any()
        assert rows["parent"][0].tobytes() == space.root
        for slot in range(5):
            words = _word(rows, slot)
            assert words[7] == check([*words[:7], life, slot])
        assert stride == stride_of(space.block_bytes)


def test_a_written_directory_is_read_by_this_version(tmp_path: Path) -> None:
    """A directory made by hand, from the page."""
    tier = open_disk(tmp_path)
    keys = chain(0, 1)
    write(tier, keys)
    tier.close()
    block = (tmp_path / "slab-000000.data").read_bytes()[: SPACE.block_bytes]
    root = np.frombuffer((tmp_path / "slab-000000.rows").read_bytes(), row_dtype, 1, HEADER_BYTES)["root"][0]
    made = tmp_path / "made"
    made.mkdir()
    file = SpacesFile(MAGIC, 1, 77, 10, [SavedSpace.of(9, SPACE)])
    (made / SPACES_NAME).write_bytes(msgspec.json.encode(file))
    words = [*keys[0].tolist(), *np.frombuffer(SPACE.root, np.uint64).tolist(), int(root), 9 | 1 << 32, 5]
    row = np.array([*words, check([*words, 1234, 2])], np.uint64).tobytes()
    (made / "slab-000004.rows").write_bytes(pack_header(Header(4, 77, 1234, 4096, 3)) + bytes(128) + row)
    (made / "slab-000004.data").write_bytes(bytes(8192) + block)
    tier = open_disk(made)
    assert read(tier, keys) == [Found.HERE]
    tier.close()
