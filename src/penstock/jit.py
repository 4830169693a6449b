"""The one way Penstock compiles machine code: `@kernel(signature)`.

Covers where compiled kernels are cached, under which name, and how several processes avoid compiling the same thing at
once. Does not cover what the kernels do; those live beside the data they touch (`pool/`, `core/`, `identity/`).

Importing a module that contains kernels compiles them (seconds, once per machine) or loads them (milliseconds). Light
modules therefore import kernel modules inside functions, and `import penstock` compiles nothing.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core import config as numba_config

__all__ = ["cache_dir", "inline_kernel", "kernel"]

F = TypeVar("F", bound=Callable[..., Any])

# Raised when cached machine code must not be reused although no kernel source changed.
_CACHE_FORMAT = 1


def inline_kernel(fn: F) -> F:
    """A helper that is compiled into the kernels that call it; never called from Python, never cached by itself."""
    return numba.njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(fn)  # type: ignore[no-any-return]


def kernel(signature: str) -> Callable[[F], F]:
    """Compile a function for exactly one signature, or load it from the on-disk cache.

    One signature per function: two processes that compile different signatures of one function at the same time can
    end up with each other's machine code in numba's cache.
    """

    def wrap(fn: F) -> F:
        where = cache_dir()
        if where is None:
            return numba.njit(signature, nogil=True)(fn)  # type: ignore[no-any-return]
        # Loading needs no lock, and processes that start together would wait for each other at every kernel.
        stamp = where / f".{fn.__module__}.{fn.__qualname__}-{_place(fn)}.compiled"
        is_new = not stamp.exists()
        with _exclusive(where) if is_new else nullcontext(), _numba_cache_in(where):
            compiled = numba.njit(signature, nogil=True, cache=True)(fn)
        if is_new:
            stamp.touch()
        return compiled  # type: ignore[no-any-return]

    return wrap


def _place(fn: Callable[..., Any]) -> str:
    """Stands for the source file: numba keeps the machine code of each checkout by itself."""
    return hashlib.blake2b(fn.__code__.co_filename.encode(), digest_size=8).hexdigest()


@functools.cache
def cache_dir() -> Path | None:
    """The folder of compiled kernels, created on first use; None (after one warning) if nothing can be written there.

    Numba's own cache notices a changed function but not a changed callee in another file, so the folder's name carries
    a digest of every kernel source.
    """
    base = os.environ.get("PENSTOCK_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "penstock"
    )
    path = Path(base) / f"kernels-{_CACHE_FORMAT}-{_sources_digest()}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = path / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        warnings.warn(
            f"compiled kernels cannot be kept in {path} ({error.strerror}); every process will compile them again "
            "(10-30 s). Remedy: set PENSTOCK_CACHE_DIR to a writable folder.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return path


def _sources_digest() -> str:
    digest = hashlib.blake2b(numba.__version__.encode(), digest_size=8)
    root = Path(__file__).parent
    for source in sorted(root.rglob("*.py")):
        text = source.read_bytes()
        # Kernels, the intrinsics that they are made from, and the numbers that they have built in.
        if b"kernel" in text or b"intrinsic" in text or source == root / "types.py":
            digest.update(source.relative_to(root).as_posix().encode() + b"\0" + text)
    return digest.hexdigest()


@contextmanager
def _exclusive(where: Path) -> Iterator[None]:
    """One process compiles at a time; others that want the same wait for it and then load what it made."""
    fd = os.open(where / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextmanager
def _numba_cache_in(where: Path) -> Iterator[None]:
    previous = numba_config.CACHE_DIR
    numba_config.CACHE_DIR = str(where)
    try:
        yield
    finally:
        numba_config.CACHE_DIR = previous
