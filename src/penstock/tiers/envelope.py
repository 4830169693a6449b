"""What precedes a block in a store that others share: a header that says which block this is.

Covers the object of one block, its name and its header, the same in every shared store (`docs/tier-objects.md`, which
is frozen). Does not cover how an object gets there (the tiers) or whether its payload is right (`runtime/shelf.py`
checks every block against the checksum root that the header carries).

A store may hand back anything under a name: what a broken client put there, an object of another key after a careless
copy, the first half of one. So a reader asks `unpack` whether the bytes are exactly a header, and `belongs` whether it
is the header of the block it asked for.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from hashlib import blake2b

from penstock.tiers.base import Batch, BlockSpace

__all__ = ["HEADER_BYTES", "Header", "belongs", "header_at", "object_name", "pack", "unpack"]

HEADER_BYTES = 128

_MAGIC = b"PSTKOBJ1"
_VERSION = 1
_FIELDS = struct.Struct("<8sII32s16s16sQQ24s")
_CHECK = struct.Struct("<Q")
_RESERVED = bytes(24)
_PERSON = b"penstock-object"


@dataclass(frozen=True, slots=True)
class Header:
    """One block's header."""

    space_digest: bytes
    """32 bytes."""
    key: bytes
    """16 bytes."""
    parent: bytes
    """16 bytes: the parent's key, or the space's root."""
    root: int
    """The block's checksum root."""
    payload_bytes: int
    """How many bytes follow the header."""


def pack(header: Header) -> bytes:
    """The `HEADER_BYTES` bytes that precede the payload. Raises ValueError where a field has not its length."""
    if (len(header.space_digest), len(header.key), len(header.parent)) != (32, 16, 16):
        raise ValueError("a header takes a space digest of 32 bytes and keys of 16")
    fields = _FIELDS.pack(
        _MAGIC, _VERSION, HEADER_BYTES, header.space_digest, header.key, header.parent, header.root,
        header.payload_bytes, _RESERVED,
    )  # fmt: skip
    return fields + _CHECK.pack(_check(fields))


def unpack(data: bytes | bytearray | memoryview) -> Header | None:
    """The header that `data` is, or None for anything that is not exactly one of this version, whole and undamaged."""
    if len(data) != HEADER_BYTES:
        return None
    fields = bytes(data[: _FIELDS.size])
    magic, version, size, digest, key, parent, root, payload_bytes, reserved = _FIELDS.unpack(fields)
    if (magic, version, size, reserved) != (_MAGIC, _VERSION, HEADER_BYTES, _RESERVED):
        return None
    if _CHECK.unpack(data[_FIELDS.size :])[0] != _check(fields):
        return None
    return Header(digest, key, parent, root, payload_bytes)


def belongs(header: Header, space: BlockSpace, key: bytes) -> bool:
    """Whether it precedes this block of this space, in its full length."""
    return (header.space_digest, header.key, header.payload_bytes) == (space.digest, key, space.block_bytes)


def header_at(batch: Batch, index: int) -> Header:
    """The header of a batch's block."""
    return Header(
        batch.space.digest, batch.keys[index].tobytes(), batch.parents[index].tobytes(), int(batch.roots[index]),
        batch.space.block_bytes,
    )  # fmt: skip


def object_name(space: BlockSpace, key: bytes) -> str:
    """The name under which a shared store holds a block. The same in every pool, process and host."""
    return f"penstock/v1/{space.digest[:8].hex()}/{key.hex()}"


def _check(fields: bytes) -> int:
    value: int = _CHECK.unpack(blake2b(fields, digest_size=8, person=_PERSON).digest())[0]
    return value
