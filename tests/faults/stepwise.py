"""The keeper's kernels run by Python, so that a test sees the segment before every single store.

A process that is killed leaves exactly the stores that it made, in order. So the segment as it lies before a store is
what a `kill -9` at that instant leaves behind, and a copy of it can be recovered and checked while the run goes on.
"""

from __future__ import annotations

import ctypes
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
from numba.core.dispatcher import Dispatcher

from penstock.pool import apply, atomics, cells, evict, lookup, publishing, recover, survey
from penstock.pool.segment import Mapping, Segment

KERNELS: tuple[ModuleType, ...] = (apply, cells, evict, lookup, publishing, recover, survey)
Hook = Callable[[Mapping], None]


class Stepwise:
    """Kernels as Python functions, with a hook before each store into a mapped segment.

    `edits` replaces text in a kernel's source first, {(module, function): (old, new)}, to show that a check notices.
    """

    def __init__(self, hook: Hook, edits: dict[tuple[str, str], tuple[str, str]] | None = None) -> None:
        self._hook = hook
        self._mappings: list[Mapping] = []
        self._swaps: list[tuple[dict[str, Any], str, Any, Any]] = []
        self._prepare(edits or {})

    @contextmanager
    def running(self) -> Iterator[None]:
        """Python kernels meanwhile. Segments that are mapped whole meanwhile are watched."""
        original = Segment.map

        def watched(segment: Segment, offset: int, size: int, *, writable: bool, fork: bool = True) -> Mapping:
            mapping = original(segment, offset, size, writable=writable, fork=fork)
            if writable and size == segment.geometry.total_bytes:
                self._mappings.append(mapping)
            return mapping

        Segment.map = watched  # type: ignore[method-assign]
        self._swap(to_python=True)
        try:
            yield
        finally:
            self._swap(to_python=False)
            Segment.map = original  # type: ignore[method-assign]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Machine code meanwhile."""
        self._swap(to_python=False)
        try:
            yield
        finally:
            self._swap(to_python=True)

    def _swap(self, *, to_python: bool) -> None:
        for namespace, name, compiled, interpreted in self._swaps:
            namespace[name] = interpreted if to_python else compiled

    # ---- memory

    def _before_store(self, address: int) -> None:
        for mapping in self._mappings:
            if 0 <= address - mapping.address < len(mapping.array):
                self._hook(mapping)
                return

    def _store(self, address: int, value: int) -> None:
        self._before_store(address)
        ctypes.c_int64.from_address(int(address)).value = int(value)

    def _store32(self, address: int, value: int) -> None:
        self._before_store(address)
        ctypes.c_uint32.from_address(int(address)).value = int(value)

    # ---- what replaces what

    def _prepare(self, edits: dict[tuple[str, str], tuple[str, str]]) -> None:
        primitives: dict[Any, Any] = {
            atomics.load: _load,
            atomics.load_acquire: _load,
            atomics.load32: lambda address: ctypes.c_uint32.from_address(int(address)).value,
            atomics.store: self._store,
            atomics.store_release: self._store,
            atomics.store32: self._store32,
            atomics.fence_full: lambda: None,
            atomics.prefetch: lambda address: None,
        }
        interpreted = {id(compiled): python for compiled, python in primitives.items()}
        for module in KERNELS:
            for name, value in vars(module).items():
                if isinstance(value, Dispatcher) and value.__module__ == module.__name__:
                    edit = edits.get((module.__name__.rpartition(".")[2], name))
                    interpreted[id(value)] = _plain(value.py_func if edit is None else _edited(value.py_func, *edit))
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith(("penstock.pool", "penstock.runtime")):
                for name, value in vars(module).items():
                    if id(value) in interpreted:
                        self._swaps.append((vars(module), name, value, interpreted[id(value)]))


def _load(address: int) -> int:
    return ctypes.c_int64.from_address(int(address)).value


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Hand over arrays as kernels see them: their elements are numbers that do not wrap."""

    def call(*args: Any) -> Any:
        return function(*(_numbers(arg) if isinstance(arg, np.ndarray) else arg for arg in args))

    return call


def _numbers(array: Any) -> Any:
    return _Numbers(array) if array.ndim == 1 and array.dtype != np.uint8 else array


class _Numbers:
    """A one-dimensional array that is read as Python's numbers."""

    def __init__(self, array: Any) -> None:
        self._array, self.size, self.shape = array, array.size, array.shape

    def __getitem__(self, index: int) -> int:
        return int(self._array[index])

    def __setitem__(self, index: int, value: int) -> None:
        self._array[index] = value


def _edited(function: Callable[..., Any], old: str, new: str) -> Callable[..., Any]:
    source = textwrap.dedent(inspect.getsource(function))
    source = source[source.index("def ") :]
    assert source.count(old) == 1, f"{old!r} is not (once) in {function.__name__}"
    changed: dict[str, Any] = {}
    exec(compile(source.replace(old, new), function.__code__.co_filename, "exec"), function.__globals__, changed)
    return changed[function.__name__]  # type: ignore[no-any-return]
