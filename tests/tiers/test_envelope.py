"""The header of objects in shared stores: its vector, its page, and that nothing else passes for one."""

from __future__ import annotations

import re
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.tiers.base import BlockSpace
from penstock.tiers.envelope import HEADER_BYTES, Header, belongs, object_name, pack, unpack

PAGE = (Path(__file__).parents[2] / "docs" / "tier-objects.md").read_text()
KEY = bytes(range(0x40, 0x50))
SPACE = BlockSpace(bytes(range(32)), bytes(16), 2097152, 16, 8, 262144)
HEADER = Header(SPACE.digest, KEY, bytes(range(0x60, 0x70)), 0x0123456789ABCDEF, 2097152)

headers = st.builds(
    Header, st.binary(min_size=32, max_size=32), st.binary(min_size=16, max_size=16),
    st.binary(min_size=16, max_size=16), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1),
)  # fmt: skip


def test_vector_of_the_page() -> None:
    name, first, second = re.findall(r"^\| [a-z0-9 ]+ \| `([^`]+)` \|$", PAGE.partition("## Test vector")[2], re.M)
    assert object_name(SPACE, KEY) == name
    assert pack(HEADER).hex() == first + second


def test_table_of_the_page() -> None:
    """The header, cut up as the page says, holds the fields it names."""
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ([a-z ]+) \|", PAGE, re.M)
    data, at = pack(HEADER), 0
    cut = {}
    for begin, size, field in rows:
        assert int(begin) == at
        at += int(size)
        cut[field] = data[int(begin) : at]
    assert at == HEADER_BYTES
    assert cut["space digest"] == HEADER.space_digest
    assert (cut["key"], cut["parent"]) == (HEADER.key, HEADER.parent)
    assert int.from_bytes(cut["root"], "little") == HEADER.root
    assert int.from_bytes(cut["payload bytes"], "little") == HEADER.payload_bytes
    assert cut["check"] == blake2b(data[:120], digest_size=8, person=b"penstock-object").digest()


@given(headers)
def test_comes_back(header: Header) -> None:
    assert unpack(pack(header)) == header


@given(headers, st.integers(0, HEADER_BYTES * 8 - 1))
def test_any_flipped_bit_is_found(header: Header, bit: int) -> None:
    data = bytearray(pack(header))
    data[bit // 8] ^= 1 << bit % 8
    assert unpack(data) is None


@given(st.binary(max_size=300))
def test_other_bytes_are_no_header(data: bytes) -> None:
    assert unpack(data) is None


@pytest.mark.parametrize("size", [0, 64, HEADER_BYTES - 1, HEADER_BYTES + 1])
def test_other_lengths_are_no_header(size: int) -> None:
    assert unpack((pack(HEADER) + b"x")[:size]) is None


def test_reserved_bytes_are_refused_though_the_check_is_right() -> None:
    """A later version may use them; this one does not know what they say."""
    fields = bytearray(pack(HEADER)[:120])
    fields[100] = 1
    assert unpack(fields + blake2b(fields, digest_size=8, person=b"penstock-object").digest()) is None


def test_belongs() -> None:
    assert belongs(HEADER, SPACE, KEY)
    assert not belongs(HEADER, SPACE, bytes(16))
    assert not belongs(replace(HEADER, payload_bytes=1), SPACE, KEY)
    assert not belongs(HEADER, replace(SPACE, digest=bytes(32)), KEY)
    # Digests that share the 8 bytes of the name are still told apart.
    assert not belongs(HEADER, replace(SPACE, digest=SPACE.digest[:8] + bytes(24)), KEY)


def test_fields_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        pack(replace(HEADER, key=b"short"))
