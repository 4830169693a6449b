"""Spaces: canonical, strict, and refusing what would let different bytes pass for one block."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.identity import INLINE_SCALES, UNIT_SCALES, Rank, Space
from penstock.identity import space as space_module

DIGEST = "files-blake2b-256:" + "ab" * 32
OTHER = "files-blake2b-256:" + "cd" * 32
BASE: dict[str, Any] = {
    "weights": DIGEST,
    "config": DIGEST,
    "engine": "transformers/1",
    "layout": "layer;kv,head,token,dim",
    "dtype": "bfloat16",
    "block_tokens": 16,
    "n_segments": 4,
    "segment_bytes": 4096,
}
CHANGES: dict[str, Any] = {
    "kind": "weights",
    "weights": OTHER,
    "config": OTHER,
    "engine": "transformers/2",
    "layout": "other",
    "dtype": "float16",
    "kv_scales": UNIT_SCALES,
    "block_tokens": 32,
    "n_segments": 5,
    "segment_bytes": 8192,
    "tensor_rank": Rank(0, 2),
    "pipeline_rank": Rank(0, 2),
    "context_rank": Rank(0, 2),
    "adapter": OTHER,
    "tenant": b"a",
    "epoch": 1,
}

digests = st.builds(
    "{}:{}".format, st.sampled_from(["sha-256", "b"]), st.binary(min_size=16, max_size=64).map(bytes.hex)
)
names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)
ranks = st.integers(1, 2**32 - 1).flatmap(lambda size: st.builds(Rank, st.integers(0, size - 1), st.just(size)))
quantised = st.fixed_dictionaries(
    {"dtype": st.just("float8_e4m3fn"), "kv_scales": st.sampled_from([UNIT_SCALES, INLINE_SCALES]) | digests}
)
plain = st.fixed_dictionaries({"dtype": st.sampled_from(["bfloat16", "float32"]), "kv_scales": st.just("")})
rest = st.fixed_dictionaries(
    {
        "weights": digests,
        "config": digests,
        "engine": names,
        "layout": names,
        "block_tokens": st.integers(1, 2**32 - 1),
        "n_segments": st.integers(1, 2**32 - 1),
        "segment_bytes": st.integers(1, 2**64 - 1),
        "tensor_rank": ranks,
        "pipeline_rank": ranks,
        "context_rank": ranks,
        "adapter": st.just("") | digests,
        "tenant": st.binary(max_size=255),
        "epoch": st.integers(0, 2**64 - 1),
    }
)
spaces = st.builds(lambda some, more: Space(**some, **more), rest, quantised | plain)


@given(spaces)
def test_decode_undoes_encode(space: Space) -> None:
    data = space.encode()
    assert Space.decode(data) == space
    assert Space.decode(data).encode() == data
    assert len(data) <= 4096


@given(spaces, spaces)
def test_equal_exactly_if_the_encodings_are(one: Space, other: Space) -> None:
    assert (one == other) == (one.encode() == other.encode()) == (one.differences(other) == ())


@given(spaces, st.data())
def test_decode_is_strict(space: Space, data: st.DataObject) -> None:
    """Of changed bytes: refused, or another space with exactly this encoding. Never the same space."""
    encoded = bytearray(space.encode())
    encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = Space.decode(bytes(encoded))
    except ConfigError:
        return
    assert found.encode() == encoded
    assert found != space


@given(spaces, st.data())
def test_every_truncation_is_refused(space: Space, data: st.DataObject) -> None:
    encoded = space.encode()
    with pytest.raises(ConfigError):
        Space.decode(encoded[: data.draw(st.integers(0, len(encoded) - 1))])


@given(st.binary(max_size=400))
def test_garbage_is_refused(data: bytes) -> None:
    for prefix in (b"", space_module.MAGIC + struct.pack("<HH", 1, 16)):
        with pytest.raises(ConfigError):
            Space.decode(prefix + data)


def test_what_decode_says() -> None:
    encoded = Space(**BASE).encode()
    with pytest.raises(ConfigError, match="1 bytes follow the last field"):
        Space.decode(encoded + b"\0")
    with pytest.raises(ConfigError, match="version 2, this release reads version 1"):
        Space.decode(encoded[:8] + b"\2" + encoded[9:])
    with pytest.raises(ConfigError, match="16 fields, not 17"):
        Space.decode(encoded[:10] + b"\x11" + encoded[11:])
    with pytest.raises(ConfigError, match="tag 9 where field kind"):
        Space.decode(encoded[:12] + b"\x09" + encoded[13:])
    with pytest.raises(ConfigError, match="ends inside field epoch"):
        Space.decode(encoded[:-1])
    with pytest.raises(ConfigError, match="field epoch of the space has 7 bytes instead of 8"):
        Space.decode(encoded[:-10] + b"\7\0" + bytes(7))
    with pytest.raises(ConfigError, match="does not start with"):
        Space.decode(b"")


def test_every_field_is_part_of_the_identity() -> None:
    fields = {field.name for field in dataclasses.fields(Space) if field.init}
    assert set(CHANGES) == fields == {name for _, name, _ in space_module._FIELDS}
    seen = {Space(**BASE).digest()}
    for name, value in CHANGES.items():
        more = {"dtype": "int8"} if name == "kv_scales" else {}
        changed = Space(**BASE | {name: value} | more)
        assert name in changed.differences(Space(**BASE))
        seen.add(changed.digest())
    assert len(seen) == 1 + len(CHANGES)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weights": ""}, "expected a digest"),
        ({"weights": "files-blake2b-256:" + "AB" * 32}, "expected a digest"),
        ({"config": "{}"}, "expected a digest"),
        ({"adapter": "my-lora"}, "expected a digest"),
        ({"engine": ""}, "printable ASCII"),
        ({"layout": " x"}, "printable ASCII"),
        ({"layout": "x\n"}, "printable ASCII"),
        ({"layout": "é"}, "printable ASCII"),
        ({"layout": "x" * 513}, "at most 512"),
        ({"dtype": "torch.bfloat16"}, "dtype name"),
        ({"dtype": 3}, "must be a str, not int"),
        ({"block_tokens": 0}, "expected 1 to"),
        ({"block_tokens": True}, "must be an int, not bool"),
        ({"segment_bytes": 2**64}, "expected 1 to"),
        ({"epoch": -1}, "expected 0 to"),
        ({"tensor_rank": Rank(2, 2)}, "0 <= rank < size"),
        ({"tensor_rank": (0, 1)}, "must be a Rank"),
        ({"tenant": "a"}, "must be bytes"),
        ({"tenant": bytes(256)}, "pass a digest"),
        ({"kv_scales": UNIT_SCALES}, "leave kv_scales empty"),
        ({"dtype": "float8_e4m3fn"}, "is quantised but kv_scales is empty"),
        ({"dtype": "float8_e4m3fn", "kv_scales": "runtime"}, "calculate_kv_scales=False"),
    ],
)
def test_what_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Space(**BASE | change)


def test_decoding_refuses_what_building_refuses() -> None:
    """A space with run-time scales cannot be smuggled in as bytes."""
    encoded = Space(**BASE, kv_scales="").encode()
    spoilt = encoded.replace(b"\x06\0\x08\0bfloat16", b"\x06\0\x08\0floatxxx")
    assert spoilt != encoded
    with pytest.raises(ConfigError, match="is quantised but kv_scales is empty"):
        Space.decode(spoilt)


def test_the_salt_is_not_printed() -> None:
    assert "hunter2" not in repr(Space(**BASE, tenant=b"hunter2"))


def test_block_bytes() -> None:
    assert Space(**BASE).block_bytes == 4 * 4096
