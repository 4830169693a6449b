"""Spaces: everything that must agree before two parties may share a block.

Covers the record, what is refused in it, and its canonical byte encoding (version 1, `docs/formats.md`). Does
not cover where the digests in it come from (`fingerprint.py`), nor the keys that grow from it (`chain.py`).
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from penstock.errors import ConfigError

__all__ = ["INLINE_SCALES", "SPACE_VERSION", "UNIT_SCALES", "Rank", "Space"]

SPACE_VERSION = 1
MAGIC = b"penspace"
UNIT_SCALES = "unit"
"""Quantised KV whose scales are the constant 1."""
INLINE_SCALES = "inline"
"""Quantised KV whose scales lie in the block's own bytes, so that they travel with it."""

MAX_TEXT_BYTES = 512
MAX_TENANT_BYTES = 255
_UNQUANTISED = frozenset({"bfloat16", "float16", "float32", "float64"})
_DIGEST = re.compile(r"[a-z0-9][a-z0-9-]*:[0-9a-f]{32,128}")
_WORD = re.compile(r"[a-z][a-z0-9_]*")
# Printable ASCII only: no two byte strings for what looks like one text.
_PRINTABLE = re.compile(r"[!-~]([ -~]*[!-~])?")


class Rank(NamedTuple):
    """One of `size` parts that a model is split into along one axis."""

    rank: int = 0
    size: int = 1


WHOLE = Rank()


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What two parties must have in common to share blocks. Equal spaces have equal encodings, and only they
    do.

    Raises ConfigError when a field is out of its bounds or would let different bytes pass for the same block.
    """

    weights: str
    """Digest of the weights' content, "algorithm:hex": `weights_digest` or `tensors_digest`."""
    config: str
    """Digest of the effective model configuration with all overrides (rope scaling too): `config_digest`."""
    engine: str
    """The engine that computes the blocks, with the version of its KV semantics: "transformers/1"."""
    layout: str
    """What the bytes of a block mean, by name; with the instruction set where the engine's kernels lay bytes
    out by it, and with the layers where a space holds only some of them."""
    dtype: str
    """Element type: "bfloat16", "float8_e4m3fn", ..."""
    block_tokens: int
    """Tokens in a block."""
    n_segments: int
    """Layer segments in a block, all of one size."""
    segment_bytes: int
    """Bytes of one layer segment."""
    kv_scales: str = ""
    """"" for unquantised KV; otherwise UNIT_SCALES, INLINE_SCALES, or the digest of scales fixed
    beforehand."""
    tensor_rank: Rank = WHOLE
    pipeline_rank: Rank = WHOLE
    context_rank: Rank = WHOLE
    adapter: str = ""
    """Digest of the adapter's weights and settings ("" for none); never its name or path."""
    tenant: bytes = field(default=b"", repr=False)
    """Salt that keeps tenants apart. Whoever can map the pool can read it."""
    epoch: int = 0
    """Counts weight updates and cache resets of a live engine."""
    kind: str = "kv"
    """What the blocks are."""
    _encoded: bytes = field(init=False, repr=False, compare=False)
    _digest: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for _, name, codec in _FIELDS:
            codec.check(name, getattr(self, name))
        _check_scales(self.dtype, self.kv_scales)
        encoded = _encode(self)
        object.__setattr__(self, "_encoded", encoded)
        object.__setattr__(self, "_digest", hashlib.blake2b(encoded, digest_size=32).digest())

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.n_segments * self.segment_bytes

    def encode(self) -> bytes:
        """The canonical encoding, at most 4 KiB."""
        return self._encoded

    def digest(self) -> bytes:
        """BLAKE2b-256 of the encoding, 32 bytes."""
        return self._digest

    @staticmethod
    def decode(data: bytes) -> Space:
        """The space that encodes to exactly these bytes; ConfigError says where they are not such an
        encoding."""
        return Space(**_decode(bytes(data)))

    def differences(self, other: Space) -> tuple[str, ...]:
        """Names of the fields in which the two differ: why blocks of one are no use to the other."""
        return tuple(name for _, name, _ in _FIELDS if getattr(self, name) != getattr(other, name))


def _check_scales(dtype: str, kv_scales: str) -> None:
    if dtype in _UNQUANTISED:
        if kv_scales:
            raise ConfigError(f"kv_scales={kv_scales!r} with the unquantised dtype {dtype}: leave kv_scales empty")
        return
    if kv_scales in {UNIT_SCALES, INLINE_SCALES} or _DIGEST.fullmatch(kv_scales):
        return
    if not kv_scales:
        raise ConfigError(
            f"dtype {dtype} is quantised but kv_scales is empty: pass UNIT_SCALES if every scale is 1, "
            "INLINE_SCALES if they lie inside the block, or the digest of the checkpoint's scales"
        )
    raise ConfigError(
        f"kv_scales={kv_scales!r} does not name fixed scales. Scales calculated at run time differ from "
        "process to process, which would misread each other's blocks. Turn their calculation off (vLLM: "
        "calculate_kv_scales=False), use a checkpoint that carries scales and pass their digest, or use an "
        "unquantised KV cache"
    )


class _Codec(Protocol):
    """One kind of field: what it may hold, and its bytes."""

    def check(self, name: str, value: Any) -> None: ...

    def pack(self, value: Any) -> bytes: ...

    def unpack(self, name: str, data: bytes) -> Any: ...


@dataclass(frozen=True, slots=True)
class _Text:
    pattern: re.Pattern[str]
    expects: str
    optional: bool = False

    def check(self, name: str, value: Any) -> None:
        if not isinstance(value, str):
            raise ConfigError(f"{name} must be a str, not {type(value).__name__}")
        if value == "" and self.optional:
            return
        if len(value) > MAX_TEXT_BYTES or not self.pattern.fullmatch(value):
            raise ConfigError(f"{name}={value[:80]!r}: expected {self.expects}, at most {MAX_TEXT_BYTES} characters")

    def pack(self, value: str) -> bytes:
        return value.encode("ascii")

    def unpack(self, name: str, data: bytes) -> str:
        try:
            return data.decode("ascii")
        except UnicodeDecodeError as error:
            raise ConfigError(f"field {name} of the space holds bytes that are not ASCII") from error


@dataclass(frozen=True, slots=True)
class _Unsigned:
    size: int
    least: int = 0

    def check(self, name: str, value: Any) -> None:
        if type(value) is not int:
            raise ConfigError(f"{name} must be an int, not {type(value).__name__}")
        if not self.least <= value < 1 << 8 * self.size:
            raise ConfigError(f"{name}={value}: expected {self.least} to 2**{8 * self.size} - 1")

    def pack(self, value: int) -> bytes:
        return value.to_bytes(self.size, "little")

    def unpack(self, name: str, data: bytes) -> int:
        _check_length(name, data, self.size)
        return int.from_bytes(data, "little")


@dataclass(frozen=True, slots=True)
class _RankOf:
    def check(self, name: str, value: Any) -> None:
        if not isinstance(value, Rank) or not all(type(part) is int for part in value):
            raise ConfigError(f"{name} must be a Rank(rank, size) of ints, not {value!r}")
        if not 0 <= value.rank < value.size < 1 << 32:
            raise ConfigError(f"{name}={value}: expected 0 <= rank < size < 2**32")

    def pack(self, value: Rank) -> bytes:
        return struct.pack("<II", *value)

    def unpack(self, name: str, data: bytes) -> Rank:
        _check_length(name, data, 8)
        return Rank(*struct.unpack("<II", data))


@dataclass(frozen=True, slots=True)
class _Salt:
    def check(self, name: str, value: Any) -> None:
        if not isinstance(value, bytes):
            raise ConfigError(f"{name} must be bytes, not {type(value).__name__}")
        if len(value) > MAX_TENANT_BYTES:
            raise ConfigError(f"{name} has {len(value)} bytes, at most {MAX_TENANT_BYTES} are allowed: pass a digest")

    def pack(self, value: bytes) -> bytes:
        return bytes(value)

    def unpack(self, name: str, data: bytes) -> bytes:
        return data


def _check_length(name: str, data: bytes, size: int) -> None:
    if len(data) != size:
        raise ConfigError(f"field {name} of the space has {len(data)} bytes instead of {size}")


_DIGEST_TEXT = 'a digest "algorithm:lowercase hex" of at least 128 bits'
_NAME = _Text(_PRINTABLE, "printable ASCII without spaces at its ends")
_RANK = _RankOf()

# Frozen with SPACE_VERSION: tag, field, codec, in the order of the encoding.
_FIELDS: tuple[tuple[int, str, _Codec], ...] = (
    (1, "kind", _Text(_WORD, "a lower-case word")),
    (2, "weights", _Text(_DIGEST, _DIGEST_TEXT)),
    (3, "config", _Text(_DIGEST, _DIGEST_TEXT)),
    (4, "engine", _NAME),
    (5, "layout", _NAME),
    (6, "dtype", _Text(_WORD, 'a lower-case dtype name such as "bfloat16"')),
    (7, "kv_scales", _Text(_PRINTABLE, "printable ASCII", optional=True)),
    (8, "block_tokens", _Unsigned(4, least=1)),
    (9, "n_segments", _Unsigned(4, least=1)),
    (10, "segment_bytes", _Unsigned(8, least=1)),
    (11, "tensor_rank", _RANK),
    (12, "pipeline_rank", _RANK),
    (13, "context_rank", _RANK),
    (14, "adapter", _Text(_DIGEST, _DIGEST_TEXT, optional=True)),
    (15, "tenant", _Salt()),
    (16, "epoch", _Unsigned(8)),
)


def _encode(space: Space) -> bytes:
    parts = [MAGIC, struct.pack("<HH", SPACE_VERSION, len(_FIELDS))]
    for tag, name, codec in _FIELDS:
        value = codec.pack(getattr(space, name))
        parts.append(struct.pack("<HH", tag, len(value)))
        parts.append(value)
    return b"".join(parts)


def _decode(data: bytes) -> dict[str, Any]:
    at = len(MAGIC) + 4
    if len(data) < at or not data.startswith(MAGIC):
        raise ConfigError(f"not the encoding of a space: it does not start with {MAGIC!r} and a header")
    version, count = struct.unpack_from("<HH", data, len(MAGIC))
    if version != SPACE_VERSION:
        raise ConfigError(
            f"space encoding version {version}, this release reads version {SPACE_VERSION}: "
            "use the same release of penstock on both sides"
        )
    if count != len(_FIELDS):
        raise ConfigError(f"version {version} of the space encoding has {len(_FIELDS)} fields, not {count}")
    values: dict[str, Any] = {}
    for tag, name, codec in _FIELDS:
        value, at = _field(data, at, tag, name)
        values[name] = codec.unpack(name, value)
    if at != len(data):
        raise ConfigError(f"{len(data) - at} bytes follow the last field of the space")
    return values


def _field(data: bytes, at: int, tag: int, name: str) -> tuple[bytes, int]:
    """The bytes of the field that starts at `at`, and where the next one starts."""
    if len(data) < at + 4:
        raise ConfigError(f"the encoding of the space ends before field {name}")
    found, size = struct.unpack_from("<HH", data, at)
    if found != tag:
        raise ConfigError(f"tag {found} where field {name} (tag {tag}) belongs")
    end = at + 4 + size
    if len(data) < end:
        raise ConfigError(f"the encoding of the space ends inside field {name}")
    return data[at + 4 : end], end
