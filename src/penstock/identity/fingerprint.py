"""Fingerprints: digests of weights, tensors and configurations, for the fields of a space.

Every digest names its construction, "algorithm:hex" (`docs/formats.md`). Covers the cache of file digests, so
that a model's files are read once per machine. Does not cover which configuration keys count: the connector
knows its engine.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.errors import ConfigError

__all__ = [
    "DigestCache",
    "TensorBytes",
    "config_digest",
    "join_digests",
    "tensors_digest",
    "weight_files",
    "weights_digest",
]

FILES = "files-blake2b-256"
TENSORS = "tensors-blake2b-256"
CONFIG = "json-blake2b-256"
JOINED = "joined-blake2b-256"

# Hashing releases the GIL; beyond this many threads the storage is what one waits for.
_MAX_THREADS = 8
# Formats in the order in which loaders prefer them.
_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")


def weight_files(model_dir: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The weight files of a model's folder, of the first format found there; ConfigError if there is none."""
    for pattern in _PATTERNS:
        found = tuple(sorted(Path(model_dir).glob(pattern)))
        if found:
            return found
    raise ConfigError(f"no weights in {os.fspath(model_dir)}: looked for {', '.join(_PATTERNS)}")


def weights_digest(paths: Iterable[str | os.PathLike[str]], *, cache: DigestCache | None = None) -> str:
    """Digest of the files' names, sizes and content, whatever folder they are in and in whatever order they
    are given.

    Reads every byte once per machine (about 1 GB/s and thread), later only the metadata. Raises ConfigError
    for no files or two of one name, RuntimeError for a file that changes meanwhile, OSError for one that
    cannot be read.
    """
    given = [Path(path) for path in paths]
    files = {os.fsencode(path.name): path for path in given}
    if not files or len(files) != len(given):
        raise ConfigError(f"{len(given)} weight files of {len(files)} names: pass at least one, each name once")
    cache = DigestCache() if cache is None else cache
    names = sorted(files)
    with ThreadPoolExecutor(_threads(len(names))) as pool:
        digests = list(pool.map(cache.digest, (files[name] for name in names)))
    cache.save()
    total = hashlib.blake2b(digest_size=32)
    for name, (size, digest) in zip(names, digests, strict=True):
        total.update(struct.pack("<I", len(name)) + name + struct.pack("<Q", size) + digest)
    return f"{FILES}:{total.hexdigest()}"


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """One tensor's content without its framework: the bytes of its elements in row-major order,
    little-endian."""

    dtype: str
    """Its framework-free name: "bfloat16", "float32", "int8", ..."""
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview | npt.NDArray[Any]


def tensors_digest(tensors: Mapping[str, TensorBytes | npt.NDArray[Any]]) -> str:
    """Digest of names, dtypes, shapes and bytes of a model that is in memory; the mapping's order does not
    count.

    Values are looked up on worker threads, a few at a time: a lazy mapping can copy one tensor after the
    other from a device. Raises ConfigError for no tensors, or one whose bytes do not fit its shape.
    """
    if not tensors:
        raise ConfigError("no tensors to digest: pass the model's state")
    names = sorted(tensors, key=lambda name: name.encode())

    def leaf(name: str) -> bytes:
        return _tensor_digest(name, tensors[name])

    total = hashlib.blake2b(digest_size=32)
    with ThreadPoolExecutor(_threads(len(names))) as pool:
        for digest in pool.map(leaf, names):
            total.update(digest)
    return f"{TENSORS}:{total.hexdigest()}"


def _tensor_digest(name: str, tensor: TensorBytes | npt.NDArray[Any]) -> bytes:
    if isinstance(tensor, np.ndarray):
        little = np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<"))
        tensor = TensorBytes(tensor.dtype.name, tensor.shape, little)
    raw = _bytes_of(tensor.data)
    count = math.prod(tensor.shape)
    if bool(count) != bool(raw.nbytes) or (count and raw.nbytes % count):
        raise ConfigError(f"tensor {name}: {raw.nbytes} bytes do not fit the shape {tensor.shape}")
    header = _prefixed(name.encode()) + _prefixed(tensor.dtype.encode())
    header += struct.pack(f"<I{len(tensor.shape)}QQ", len(tensor.shape), *tensor.shape, raw.nbytes)
    digest = hashlib.blake2b(header, digest_size=32)
    digest.update(raw)
    return digest.digest()


def _bytes_of(data: bytes | bytearray | memoryview | npt.NDArray[Any]) -> memoryview:
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    view = memoryview(data)
    # An empty view with a shape cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(b"")


def config_digest(config: Mapping[str, Any], *, ignore: Iterable[str] = ()) -> str:
    """Digest of a configuration as canonical JSON, without the top-level keys in `ignore`.

    Canonical: keys sorted, no spaces, ASCII, and whole floats written as integers (10000.0 and 10000 are one
    rope base). Raises ConfigError for what JSON cannot say: NaN, infinities, other types, keys that are not
    strings.
    """
    skipped = frozenset(ignore)
    plain = _canonical({key: value for key, value in config.items() if key not in skipped}, "config")
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return f"{CONFIG}:{hashlib.blake2b(text.encode(), digest_size=32).hexdigest()}"


def _canonical(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ConfigError(f"{where} has keys that are not strings: convert them first")
        return {key: _canonical(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise ConfigError(f"{where}={value!r} has no canonical form: pass a string or finite number, or ignore its key")


def join_digests(*digests: str) -> str:
    """One digest of several, in this order: an adapter is its weights and its settings, for example."""
    joined = b"".join(_prefixed(digest.encode()) for digest in digests)
    return f"{JOINED}:{hashlib.blake2b(joined, digest_size=32).hexdigest()}"


def _prefixed(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def _threads(n_jobs: int) -> int:
    return max(1, min(n_jobs, os.cpu_count() or 1, _MAX_THREADS))


class _Stored(msgspec.Struct):
    """The cache file."""

    algorithm: str
    files: dict[str, str]


# What the cached digests are of: plain BLAKE2b-256 of a file's bytes, as `b2sum -l 256` prints it.
_CACHED = "blake2b-256"
_MAX_CACHED = 4096
# A file changed within this time may change again without a new time stamp (git calls it racily clean): its
# digest is not kept. Two seconds is the coarsest time stamp in use.
_RACY_NS = 2_000_000_000


def _default_path() -> Path | None:
    """`digests.json` in $PENSTOCK_CACHE_DIR, else in `penstock` of $XDG_CACHE_HOME or ~/.cache; None without
    a home."""
    own = os.environ.get("PENSTOCK_CACHE_DIR")
    if own:
        return Path(own) / "digests.json"
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return base / "penstock" / "digests.json" if base.is_absolute() else None


@dataclass(slots=True)
class DigestCache:
    """Digests of files by device, inode, size and time stamps, in one file of the user's cache folder.

    A cache that cannot be read, parsed or written, or that belongs to another user, costs time and nothing
    else.
    """

    path: Path | None = field(default_factory=_default_path)
    """None keeps nothing."""
    now_ns: Callable[[], int] = time.time_ns
    _known: dict[str, str] | None = None
    _new: dict[str, str] = field(default_factory=dict)

    def digest(self, path: Path) -> tuple[int, bytes]:
        """Size and BLAKE2b-256 of the file's content; may be called from several threads."""
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            identity = _identity(before)
            known = self._load().get(identity)
            if known is not None:
                return before.st_size, bytes.fromhex(known)
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).digest()
            if _identity(os.fstat(file.fileno())) != identity:
                raise RuntimeError(f"{path} changed while it was read: try again when its download or update is done")
        if self.now_ns() - max(before.st_mtime_ns, before.st_ctime_ns) > _RACY_NS:
            self._new[identity] = digest.hex()
        return before.st_size, digest

    def save(self) -> None:
        """Add what was computed to the file, replacing it as a whole; of two savers at once one may win."""
        if self.path is None or not self._new:
            return
        merged = {**_read(self.path), **self._new}
        newest = dict(list(merged.items())[-_MAX_CACHED:])
        with suppress(OSError):
            _replace(self.path, msgspec.json.encode(_Stored(_CACHED, newest)))
        self._known = newest
        self._new = {}

    def _load(self) -> dict[str, str]:
        if self._known is None:
            self._known = {} if self.path is None else _read(self.path)
        return self._known


def _identity(stat: os.stat_result) -> str:
    # The change time too: it moves when a tool writes in place and puts the modification time back.
    parts: Sequence[int] = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return ":".join(map(str, parts))


def _read(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                return {}
            stored = msgspec.json.decode(file.read(), type=_Stored)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return {}
    if stored.algorithm != _CACHED or not all(map(_is_digest, stored.files.values())):
        return {}
    return stored.files


def _is_digest(text: str) -> bool:
    return len(text) == 64 and not text.strip("0123456789abcdef")


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise
