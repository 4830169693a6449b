"""What lies in a disk tier's directory, byte for byte: names, the rows of a slab's index, the spaces file.

Pure: arrays and bytes in, arrays and bytes out. `docs/disk-format.md` states the same, and a test compares them. Does
not cover how the files are opened, locked or written (`disk_folder.py`, `disk_slab.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.errors import ConfigError
from penstock.tiers.base import BlockSpace

__all__ = [
    "FORMAT_VERSION",
    "HEADER_BYTES",
    "LOCK_NAME",
    "MAGIC",
    "MAX_SLOTS",
    "MAX_STAMP",
    "PAGE_BYTES",
    "ROW_BYTES",
    "ROW_USED",
    "SPACES_NAME",
    "WEAR_NAME",
    "DiskFile",
    "Header",
    "SavedSpace",
    "SpacesFile",
    "check_rows",
    "data_name",
    "header_dtype",
    "pack_header",
    "parse_spaces",
    "row_dtype",
    "rows_name",
    "slab_of_name",
    "stride_of",
    "unpack_header",
]

MAGIC = "penstock-disk"
FORMAT_VERSION = 1
PAGE_BYTES = 4096
"""Strides, offsets and the header are multiples of it: what O_DIRECT asks for on every common disk."""
HEADER_BYTES = 4096
ROW_BYTES = 64
ROW_USED = 1
LOCK_NAME = "penstock.lock"
SPACES_NAME = "penstock.spaces"
WEAR_NAME = "penstock.wear"
MAX_SLOTS = 1 << 24
"""Of a slab, so that no header makes its reader take more than 1 GiB for the rows."""
MAX_STAMP = (1 << 62) - 1
_MAX_BYTES = 1 << 62
_MAX_NUMBER = (1 << 32) - 1
_SLAB_NAME = re.compile(r"slab-(\d{6})\.(data|rows)\Z")

Words = npt.NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31 = np.uint64(27), np.uint64(30), np.uint64(31)

row_dtype = np.dtype(
    [
        ("key", "<u8", 2),
        ("parent", "<u8", 2),
        ("root", "<u8"),
        ("space", "<u4"),
        ("state", "<u4"),
        ("stamp", "<u8"),
        ("check", "<u8"),
    ]
)
"""One slot's row. All zeros: free. A row whose check is wrong was torn and is free, too."""

header_dtype = np.dtype(
    [
        ("magic", "S16"),
        ("version", "<u4"),
        ("slab", "<u4"),
        ("salt", "<u8"),
        ("life", "<u8"),
        ("stride", "<u8"),
        ("n_slots", "<u8"),
        ("check", "<u8"),
    ]
)
"""The beginning of a rows file. `salt` is the spaces file's: rows of a lost spaces file fit no later one."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a rows file says of its slab."""

    slab: int
    salt: int
    life: int
    """Drawn anew whenever the slab is laid out; enters every row's check, so rows of an earlier layout fail."""
    stride: int
    n_slots: int


class DiskFile(msgspec.Struct, frozen=True):
    """What every version of the spaces file begins with."""

    magic: str
    format: int


class SavedSpace(msgspec.Struct, frozen=True):
    """A space in the spaces file; digest and root are hexadecimal."""

    number: int
    digest: str
    root: str
    block_bytes: int
    block_tokens: int
    n_segments: int
    segment_bytes: int
    label: str

    @classmethod
    def of(cls, number: int, space: BlockSpace) -> SavedSpace:
        """The same, to be saved."""
        return cls(
            number, space.digest.hex(), space.root.hex(), space.block_bytes, space.block_tokens, space.n_segments,
            space.segment_bytes, space.label,
        )  # fmt: skip

    def space(self) -> BlockSpace:
        """The same, as tiers know it."""
        return BlockSpace(
            bytes.fromhex(self.digest), bytes.fromhex(self.root), self.block_bytes, self.block_tokens, self.n_segments,
            self.segment_bytes, self.label,
        )  # fmt: skip


class SpacesFile(msgspec.Struct, frozen=True):
    """The spaces file: JSON, replaced as a whole and synced before a new number is used in a row."""

    magic: str
    format: int
    salt: int
    next_number: int
    """Numbers are never given twice: a row that was not cleared in time cannot change its space."""
    spaces: list[SavedSpace]


def stride_of(block_bytes: int) -> int:
    """Bytes from one slot to the next for blocks of this size."""
    return -(-block_bytes // PAGE_BYTES) * PAGE_BYTES


def data_name(slab: int) -> str:
    """The file with the slab's blocks, one every stride."""
    return f"slab-{slab:06d}.data"


def rows_name(slab: int) -> str:
    """The file with the slab's header and rows."""
    return f"slab-{slab:06d}.rows"


def slab_of_name(name: str) -> int | None:
    """The slab that a file belongs to; None for a file that is not this tier's."""
    match = _SLAB_NAME.match(name)
    return int(match[1]) if match else None


def _mix(x: Words) -> Words:
    """SplitMix64's finaliser, in place: every bit of a word depends on all of its bits."""
    x ^= x >> _30
    x *= _MIX_1
    x ^= x >> _27
    x *= _MIX_2
    x ^= x >> _31
    return x


def check_rows(words: Words, life: int, slots: npt.NDArray[np.int64]) -> Words:
    """(n,): the check of each row. `words` is (n, 8): the rows as u64, of which the last word is not read.

    check = mix(sum over i of mix(word[i] + (i + 1) * GOLDEN)), words 7 and 8 being the slab's life and the slot.
    """
    all_words = np.empty((len(words), 9), np.uint64)
    all_words[:, :7] = words[:, :7]
    all_words[:, 7] = life
    all_words[:, 8] = slots
    all_words += np.arange(1, 10, dtype=np.uint64) * _GOLDEN
    total: Words = _mix(all_words).sum(axis=1)
    return _mix(total)


def _header_check(row: npt.NDArray[np.void]) -> int:
    words = np.frombuffer(row.tobytes(), np.uint64)[:-1].copy()
    words += np.arange(1, len(words) + 1, dtype=np.uint64) * _GOLDEN
    return int(_mix(_mix(words).sum(keepdims=True))[0])


def pack_header(header: Header) -> bytes:
    """HEADER_BYTES bytes."""
    row = np.zeros(1, header_dtype)
    row["magic"], row["version"] = MAGIC.encode(), FORMAT_VERSION
    row["slab"], row["salt"], row["life"] = header.slab, header.salt, header.life
    row["stride"], row["n_slots"] = header.stride, header.n_slots
    row["check"] = _header_check(row)
    return row.tobytes().ljust(HEADER_BYTES, b"\0")


def unpack_header(data: bytes) -> Header | None:
    """The header at the beginning of `data`; None if there is none that can be trusted."""
    if len(data) < HEADER_BYTES:
        return None
    row = np.frombuffer(data[: header_dtype.itemsize], header_dtype)
    ok = row["magic"][0] == MAGIC.encode() and row["version"][0] == FORMAT_VERSION
    if not ok or int(row["check"][0]) != _header_check(row):
        return None
    slab, salt, life, stride, n_slots = (int(row[name][0]) for name in ("slab", "salt", "life", "stride", "n_slots"))
    if stride <= 0 or stride % PAGE_BYTES or not 0 < n_slots <= MAX_SLOTS or stride * n_slots > _MAX_BYTES:
        return None
    return Header(slab, salt, life, stride, n_slots)


def parse_spaces(data: bytes, where: str) -> SpacesFile | None:
    """The spaces file; None if it is damaged, and the index with it.

    Raises ConfigError if another version of the format wrote it.
    """
    try:
        kind = msgspec.json.decode(data, type=DiskFile)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    if kind.magic != MAGIC:
        return None
    if kind.format != FORMAT_VERSION:
        raise ConfigError(
            f"{where} holds a disk tier of format {kind.format}, and this version writes format {FORMAT_VERSION}; give "
            "another directory, or delete this one's penstock.* and slab-* files (what they hold is a cache)."
        )
    try:
        file = msgspec.json.decode(data, type=SpacesFile)
        return file if _can_be(file) else None
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def _can_be(file: SpacesFile) -> bool:
    """Whether what the file says fits into rows and headers. Raises ValueError for what is not hexadecimal."""
    numbers = [each.number for each in file.spaces]
    return (
        0 <= file.salt < 1 << 64
        and 1 <= file.next_number <= _MAX_NUMBER
        and len(set(numbers)) == len(numbers)
        and all(1 <= number < file.next_number for number in numbers)
        and all(_space_can_be(each.space()) for each in file.spaces)
    )


def _space_can_be(space: BlockSpace) -> bool:
    sizes = (space.block_bytes, space.block_tokens, space.n_segments, space.segment_bytes)
    return len(space.digest) == 32 and len(space.root) == 16 and all(0 < size <= _MAX_BYTES for size in sizes)
