"""Fingerprints: any change of content or name shows, and the cache saves time without changing an answer."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.identity import (
    DigestCache,
    TensorBytes,
    config_digest,
    fingerprint,
    join_digests,
    tensors_digest,
    weight_files,
    weights_digest,
)

FAR_FUTURE_NS = 1 << 62


def later() -> int:
    """A clock by which no file has changed just now."""
    return FAR_FUTURE_NS


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "model"
    folder.mkdir()
    paths = [folder / f"model-{number}.safetensors" for number in (1, 2)]
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    return paths


def digest(paths: list[Path]) -> str:
    return weights_digest(paths, cache=DigestCache(None))


def test_order_and_folder_do_not_count(shards: list[Path], tmp_path: Path) -> None:
    expected = digest(shards)
    assert expected.startswith("files-blake2b-256:")
    assert digest(shards[::-1]) == expected
    links = [tmp_path / path.name for path in shards]
    for link, path in zip(links, shards, strict=True):
        link.symlink_to(path)
    assert digest(links) == expected


def flip_a_byte(path: Path) -> Path:
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)
    return path


def move_a_byte_over(path: Path) -> Path:
    other = path.with_name("model-2.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    other.write_bytes(data[-1:] + other.read_bytes())
    return path


@pytest.mark.parametrize(
    "change",
    [
        flip_a_byte,
        move_a_byte_over,
        lambda path: path.rename(path.with_name("model-0.safetensors")),
        lambda path: path.write_bytes(path.read_bytes() + b"\0") and path,
    ],
    ids=["flip", "move", "rename", "append"],
)
def test_every_change_shows(shards: list[Path], change: Callable[[Path], Path]) -> None:
    before = digest(shards)
    assert digest([change(shards[0]), shards[1]]) != before


def test_which_files(shards: list[Path], tmp_path: Path) -> None:
    (shards[0].parent / "pytorch_model.bin").write_bytes(b"old")
    assert weight_files(shards[0].parent) == tuple(shards)
    with pytest.raises(ConfigError, match="no weights in"):
        weight_files(tmp_path)
    for paths in ([], [shards[0], shards[0]]):
        with pytest.raises(ConfigError, match="each name once"):
            digest(paths)


def test_the_cache_is_used_and_is_per_file(shards: list[Path], tmp_path: Path) -> None:
    store = tmp_path / "cache" / "digests.json"
    expected = weights_digest(shards, cache=DigestCache(store, later))
    stored = json.loads(store.read_bytes())
    assert len(stored["files"]) == 2
    assert {hashlib.blake2b(path.read_bytes(), digest_size=32).hexdigest() for path in shards} == set(
        stored["files"].values()
    )
    assert store.stat().st_mode & 0o777 == 0o600
    # Another digest in its place shows that the file is not read again.
    stored["files"] = dict.fromkeys(stored["files"], "00" * 32)
    store.write_text(json.dumps(stored))
    assert weights_digest(shards, cache=DigestCache(store, later)) != expected
    # Digests of another construction are none of ours.
    store.write_text(json.dumps(stored | {"algorithm": "blake3"}))
    assert weights_digest(shards, cache=DigestCache(store, later)) == expected


def test_a_replaced_file_is_read_again(shards: list[Path], tmp_path: Path) -> None:
    store = tmp_path / "digests.json"
    before = weights_digest(shards, cache=DigestCache(store, later))
    flip_a_byte(shards[0])
    assert weights_digest(shards, cache=DigestCache(store, later)) == digest(shards) != before


def test_restoring_the_modification_time_hides_nothing(shards: list[Path], tmp_path: Path) -> None:
    store = tmp_path / "digests.json"
    before = weights_digest(shards, cache=DigestCache(store, later))
    stat = shards[0].stat()
    flip_a_byte(shards[0])
    # The kernel's clock ticks every few milliseconds: touch until the change time has moved.
    while shards[0].stat().st_ctime_ns == stat.st_ctime_ns:
        os.utime(shards[0])
    os.utime(shards[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert shards[0].stat().st_mtime_ns == stat.st_mtime_ns
    assert shards[0].stat().st_size == stat.st_size
    assert weights_digest(shards, cache=DigestCache(store, later)) == digest(shards) != before


def test_a_file_that_just_changed_is_not_kept(shards: list[Path], tmp_path: Path) -> None:
    """It may change again within the same tick of its time stamp."""
    store = tmp_path / "digests.json"
    changed_ns = max(shards[0].stat().st_ctime_ns, shards[1].stat().st_ctime_ns)
    weights_digest(shards, cache=DigestCache(store, lambda: changed_ns + 1_000_000_000))
    assert not store.exists()
    weights_digest(shards, cache=DigestCache(store, lambda: changed_ns + 3_000_000_000))
    assert len(json.loads(store.read_bytes())["files"]) == 2


def test_a_file_that_changes_while_it_is_read(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hashlib.file_digest

    def interrupted(file: Any, algorithm: Any) -> Any:
        with shards[0].open("ab") as other:
            other.write(b"more")
        return whole(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", interrupted)
    with pytest.raises(RuntimeError, match="changed while it was read"):
        digest(shards)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff{",
        b"[]",
        b'{"algorithm":"md5","files":{}}',
        b'{"algorithm":"blake2b-256","files":{"1:2":"xyz"}}',
        b'{"algorithm":"blake2b-256","files":{"1:2":3}}',
    ],
)
def test_a_broken_cache_is_as_none_and_is_repaired(shards: list[Path], tmp_path: Path, content: bytes) -> None:
    store = tmp_path / "digests.json"
    store.write_bytes(content)
    assert weights_digest(shards, cache=DigestCache(store, later)) == digest(shards)
    assert len(json.loads(store.read_bytes())["files"]) == 2


def test_another_users_cache_is_not_trusted(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "digests.json"
    expected = weights_digest(shards, cache=DigestCache(store, later))
    stored = json.loads(store.read_bytes())
    stored["files"] = dict.fromkeys(stored["files"], "00" * 32)
    store.write_text(json.dumps(stored))
    monkeypatch.setattr(os, "geteuid", lambda: store.stat().st_uid + 1)
    assert weights_digest(shards, cache=DigestCache(store, later)) == expected


def test_an_unwritable_cache_is_no_error(shards: list[Path], tmp_path: Path) -> None:
    blocked = tmp_path / "a file"
    blocked.touch()
    assert weights_digest(shards, cache=DigestCache(blocked / "digests.json", later)) == digest(shards)


def test_a_failed_replacement_leaves_nothing_behind(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folder = tmp_path / "cache"
    monkeypatch.setattr(os, "replace", full)
    assert weights_digest(shards, cache=DigestCache(folder / "digests.json", later)) == digest(shards)
    assert list(folder.iterdir()) == []


def test_two_savers_keep_each_others_files(shards: list[Path], tmp_path: Path) -> None:
    store = tmp_path / "digests.json"
    one, other = DigestCache(store, later), DigestCache(store, later)
    weights_digest(shards[:1], cache=one)
    weights_digest(shards[1:], cache=other)
    assert len(json.loads(store.read_bytes())["files"]) == 2


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE_DIR", str(tmp_path / "own"))
    assert DigestCache().path == tmp_path / "own" / "digests.json"
    monkeypatch.delenv("PENSTOCK_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert DigestCache().path == tmp_path / "xdg" / "penstock" / "digests.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert DigestCache().path == tmp_path / ".cache" / "penstock" / "digests.json"
    assert DigestCache().now_ns is time.time_ns


def test_tensors_in_any_order_and_form() -> None:
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    raw = weights.tobytes()
    expected = tensors_digest({"a": weights, "b": TensorBytes("bfloat16", (3,), bytes(6))})
    assert expected.startswith("tensors-blake2b-256:")
    for same in (
        np.asfortranarray(weights),
        weights.astype(">f4"),
        TensorBytes("float32", (2, 3), raw),
        TensorBytes("float32", (2, 3), memoryview(raw)),
        TensorBytes("float32", (2, 3), np.frombuffer(raw, dtype=np.uint8)),
    ):
        assert tensors_digest({"b": TensorBytes("bfloat16", (3,), bytearray(6)), "a": same}) == expected


def test_every_change_of_a_tensor_shows() -> None:
    base = {"a": TensorBytes("float32", (2, 3), bytes(24)), "b": TensorBytes("float32", (6,), bytes(24))}
    flipped = bytes(23) + b"\1"
    variants = [
        base,
        {"a": base["a"]},
        {"a": base["a"], "c": base["b"]},
        {"a": base["b"], "b": base["a"]},
        base | {"a": TensorBytes("float32", (3, 2), bytes(24))},
        base | {"a": TensorBytes("int32", (2, 3), bytes(24))},
        base | {"a": TensorBytes("float32", (2, 3), flipped)},
        base | {"b": TensorBytes("float32", (6,), flipped)},
    ]
    assert len({tensors_digest(variant) for variant in variants}) == len(variants)


@given(st.integers(0, 95), st.integers(1, 255))
def test_every_flipped_byte_shows(at: int, flip: int) -> None:
    data = bytearray(96)
    data[at] ^= flip
    clean = tensors_digest({"w": TensorBytes("float32", (24,), bytes(96))})
    assert tensors_digest({"w": TensorBytes("float32", (24,), data)}) != clean


def test_tensors_that_do_not_fit() -> None:
    empty = TensorBytes("int8", (0, 4), np.empty((0, 4), np.int8).data)
    assert tensors_digest({"e": empty}) == tensors_digest({"e": np.empty((0, 4), np.int8)})
    for shape, data in (((2, 3), bytes(25)), ((2,), b""), ((0,), bytes(4))):
        with pytest.raises(ConfigError, match="do not fit the shape"):
            tensors_digest({"w": TensorBytes("float32", shape, data)})
    with pytest.raises(ConfigError, match="no tensors"):
        tensors_digest({})


def test_config_is_canonical() -> None:
    one = {"rope_theta": 10000.0, "heads": [1, 2], "scaling": {"factor": 2.5, "type": "linear"}, "path": "/a"}
    other = {"path": "/b", "scaling": {"type": "linear", "factor": 2.5}, "heads": (1, 2), "rope_theta": 10000}
    assert config_digest(one, ignore=["path"]) == config_digest(other, ignore=["path"])
    assert config_digest(one) != config_digest(other)
    one["scaling"]["factor"] = 4.0  # type: ignore[index]
    assert config_digest(one, ignore=["path"]) != config_digest(other, ignore=["path"])
    assert config_digest({"tie": True}) != config_digest({"tie": 1}) != config_digest({"tie": "1"})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"a": {"b": [0.5, float("nan")]}}, r"config\.a\.b\[1\]=nan has no canonical form"),
        ({"a": float("inf")}, "no canonical form"),
        ({"a": object()}, "no canonical form"),
        ({"a": {1: 2}}, "keys that are not strings"),
    ],
)
def test_config_without_canonical_form(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config_digest(config)


def test_joined_digests_cannot_be_confused() -> None:
    assert len({join_digests(*parts) for parts in ([], ["ab"], ["a", "b"], ["b", "a"], ["ab", ""])}) == 5


def test_threads_stay_few() -> None:
    assert fingerprint._threads(0) == 1
    assert fingerprint._threads(10_000) <= fingerprint._MAX_THREADS
