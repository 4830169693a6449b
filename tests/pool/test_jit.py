"""Where compiled kernels are kept."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock import jit


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """`cache_dir` answers once for a process; here it is asked anew."""
    jit.cache_dir.cache_clear()
    yield
    jit.cache_dir.cache_clear()


def test_the_folder_is_made_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE_DIR", str(tmp_path / "a" / "b"))
    where = jit.cache_dir()
    assert where is not None and where.parent == tmp_path / "a" / "b"
    assert where.stat().st_mode & 0o777 == 0o700
    assert list(where.iterdir()) == []
    assert jit.cache_dir() == where


def test_the_default_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    where = jit.cache_dir()
    assert where is not None and where.parent == tmp_path / "penstock"
    jit.cache_dir.cache_clear()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    where = jit.cache_dir()
    assert where is not None and where.parent == tmp_path / "home" / ".cache" / "penstock"


def test_an_unwritable_folder_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below a file nobody can make a folder, not even root."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("PENSTOCK_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.warns(RuntimeWarning, match="set PENSTOCK_CACHE_DIR"):
        assert jit.cache_dir() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jit.cache_dir() is None


def test_kernels_work_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "cache_dir", lambda: None)

    @jit.kernel("int64(int64)")
    def double(x: int) -> int:
        return 2 * x

    assert double(21) == 42


def test_the_folders_name_follows_every_kernel_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numba's own cache does not notice a changed callee in another file."""
    package = tmp_path / "penstock"
    shutil.copytree(Path(jit.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    monkeypatch.setattr(jit, "__file__", str(package / "jit.py"))
    digests = [jit._sources_digest()]
    for name in ("pool/lookup.py", "pool/atomics.py", "pool/vector.py", "pool/layout.py", "types.py", "jit.py"):
        source = package / name
        source.write_text(source.read_text() + "\n# changed\n")
        digests.append(jit._sources_digest())
    assert len(set(digests)) == len(digests), "a module that kernels are made from does not count"
    (package / "cli" / "rm.py").write_text("# nothing to do with it\n")
    assert jit._sources_digest() == digests[-1]
