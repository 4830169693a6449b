"""NUMA nodes: which there are, and from which of them memory is taken.

Through libnuma where it is installed, else through the same system calls it makes. Which memory a node is made of (DRAM
of another socket, CXL) is not looked at; a node that has memory can be used.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from penstock.errors import ConfigError
from penstock.pool.huge import map_for_huge_pages

__all__ = ["bind_file", "binding", "check_node", "memory_nodes"]

_NODES = Path("/sys/devices/system/node/has_memory")
_MPOL_DEFAULT, _MPOL_BIND = 0, 2
# mbind and set_mempolicy
_SYSCALLS = {"x86_64": (237, 238), "aarch64": (235, 237)}
_MASK_BITS = 1024
_WORD_BITS = 64


def memory_nodes(listing: Path = _NODES) -> list[int]:
    """The nodes that have memory, ascending. A kernel without NUMA has one, 0."""
    try:
        text = listing.read_text().strip()
    except OSError:
        return [0]
    nodes: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        nodes += range(int(first), int(last or first) + 1)
    return nodes


def check_node(node: int) -> int:
    """The node itself if it has memory, else ConfigError naming those that do."""
    nodes = memory_nodes()
    if node not in nodes:
        raise ConfigError(f"NUMA node {node} has no memory here; nodes with memory: {', '.join(map(str, nodes))}")
    return node


@contextlib.contextmanager
def binding(node: int) -> Iterator[None]:
    """Meanwhile this thread, and every process it starts, takes new memory from `node` only.

    Raises ConfigError for a node without memory and where the system forbids it.
    """
    _set_policy(_MPOL_BIND, check_node(node))
    try:
        yield
    finally:
        _set_policy(_MPOL_DEFAULT, None)


def bind_file(fd: int, size_bytes: int, node: int) -> None:
    """Whoever touches a page of this file on tmpfs or hugetlbfs from now on takes it from `node`.

    The rule stays with the file for as long as the file is in memory. Pages that are there already do not move. Raises
    ConfigError as `binding`.
    """
    check_node(node)
    room, at = map_for_huge_pages(fd, 0, size_bytes, writable=False)
    with room:
        here = ctypes.c_char.from_buffer(room, at)
        address = ctypes.addressof(here)
        del here
        _call("mbind", 0, ctypes.c_void_p(address), ctypes.c_ulong(size_bytes), _MPOL_BIND, _mask(node),
              ctypes.c_ulong(_MASK_BITS), 0)  # fmt: skip


def _set_policy(mode: int, node: int | None) -> None:
    mask = None if node is None else _mask(node)
    _call("set_mempolicy", 1, mode, mask, ctypes.c_ulong(0 if node is None else _MASK_BITS))


def _mask(node: int) -> ctypes.Array[ctypes.c_ulong]:
    if node >= _MASK_BITS - 1:
        raise ConfigError(f"NUMA node {node}: at most {_MASK_BITS - 2}")
    words = (ctypes.c_ulong * (_MASK_BITS // _WORD_BITS))()
    words[node // _WORD_BITS] = 1 << node % _WORD_BITS
    return words


def _libnuma() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libnuma.so.1", use_errno=True)
    except OSError:
        return None


def _call(name: str, number: int, *arguments: object) -> None:
    """A call by libnuma's name, or by its number where that is not installed."""
    library = _libnuma()
    if library is not None:
        result = getattr(library, name)(*arguments)
    else:
        numbers = _SYSCALLS.get(platform.machine())
        if numbers is None:
            raise ConfigError(f"numa= needs libnuma on {platform.machine()}: install libnuma1")
        result = ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(numbers[number]), *arguments)
    if result:
        code = ctypes.get_errno()
        raise ConfigError(
            f"{name}: {os.strerror(code)}; a container needs the capability SYS_NICE for numa=, or start it under "
            "`numactl --membind` and leave numa= out"
        )
