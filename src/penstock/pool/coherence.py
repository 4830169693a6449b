"""Writing cache lines back and dropping them, for memory that other hosts map without coherence (CXL 2.0).

A publisher writes back what it stored before it publishes it; a reader drops the lines it is about to load. Both wait
for it, because these instructions are ordered by fences only. The order in which a pool needs them is explored in
`testing/model/incoherent.py`. On a processor that has no such instructions they do nothing, and `need_instructions`
raises.

x86: clwb where there is one, else clflushopt, else clflush, and sfence; to drop, clflushopt or clflush, and mfence
(Intel SDM volume 2, on CLWB and CLFLUSHOPT). 64-bit Arm: dc cvac and dc civac, to the point of coherency, and dsb sy.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from penstock.errors import ConfigError
from penstock.jit import inline_kernel, kernel
from penstock.pool.layout import LINE

__all__ = ["drop_lines", "invalidate", "line_instructions", "need_instructions", "write_back", "write_back_lines"]


class LineInstructions(NamedTuple):
    """What each does to the line at an address: LLVM's name of it on x86, the instruction itself on Arm."""

    write_back: str
    drop: str
    fence_stores: str
    fence_all: str


def line_instructions(machine: str, features: str) -> LineInstructions:
    """The best that a processor has. `features` as LLVM lists them. Raises ConfigError for a machine without any."""
    has = set(features.split(","))
    if machine in ("x86_64", "amd64"):
        drop = "llvm.x86.clflushopt" if "+clflushopt" in has else "llvm.x86.sse2.clflush"
        write = "llvm.x86.clwb" if "+clwb" in has else drop
        return LineInstructions(write, drop, "llvm.x86.sse.sfence", "llvm.x86.sse2.mfence")
    if machine in ("aarch64", "arm64"):
        return LineInstructions("dc cvac, $0", "dc civac, $0", "dsb sy", "dsb sy")
    raise ConfigError(
        f"{machine}: it is not known how to write cache lines back from here; use memory that is coherent on all hosts"
    )


def need_instructions() -> None:
    """Raises ConfigError on a processor that cannot write cache lines back and drop them."""
    line_instructions(platform.machine().lower(), get_host_cpu_features())


_NONE = LineInstructions("", "", "", "")
try:
    _here = line_instructions(platform.machine().lower(), get_host_cpu_features())
except ConfigError:
    _here = _NONE
if _here is not _NONE and not _here.drop.startswith("llvm."):
    llvm.initialize_native_asmparser()  # without it, inline assembly ends the process


def _emit(builder: Any, instruction: str, *pointers: Any) -> None:
    """A call of LLVM's intrinsic, or the instruction as inline assembly."""
    if not instruction:
        return
    kind = ir.FunctionType(ir.VoidType(), [pointer.type for pointer in pointers])
    if instruction.startswith("llvm."):
        builder.call(cgutils.get_or_insert_function(builder.module, kind, instruction), pointers)
        return
    constraints = ",".join(["r"] * len(pointers) + ["~{memory}"])
    builder.call(ir.InlineAsm(kind, instruction, constraints, side_effect=True), pointers)


def _on_line(instruction: str) -> Any:
    def typer(typing_context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit(builder, instruction, builder.inttoptr(args[0], ir.IntType(8).as_pointer()))
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return intrinsic(typer)


def _barrier(instruction: str) -> Any:
    def typer(typing_context: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit(builder, instruction)
            return context.get_dummy_value()

        return types.void(), codegen

    return intrinsic(typer)


# One line each, at any address in it; nothing waits for it but the fences.
write_back_line: Callable[[int], None] = _on_line(_here.write_back)
drop_line: Callable[[int], None] = _on_line(_here.drop)
# Stores after it come after every write-back ahead of it.
fence_written: Callable[[], None] = _barrier(_here.fence_stores)
# Loads after it come after every drop, and every load, ahead of it.
fence_dropped: Callable[[], None] = _barrier(_here.fence_all)


@inline_kernel
def write_back_lines(address: int, n_bytes: int) -> None:
    """Ask for every line of a range to be written back; `fence_written` waits for it."""
    line = address & -LINE
    while line < address + n_bytes:
        write_back_line(line)
        line += LINE


@inline_kernel
def drop_lines(address: int, n_bytes: int) -> None:
    """Ask for every line of a range to be dropped; `fence_dropped` waits for it."""
    line = address & -LINE
    while line < address + n_bytes:
        drop_line(line)
        line += LINE


@kernel("void(int64, int64)")
def write_back(address: int, n_bytes: int) -> None:
    """Write a range of bytes back to memory, and wait: what is stored after it is seen after it."""
    write_back_lines(address, n_bytes)
    fence_written()


@kernel("void(int64, int64)")
def invalidate(address: int, n_bytes: int) -> None:
    """Drop a range of bytes from this host's caches, and wait: what is loaded after it comes from memory.

    A line that was changed here is written back first.
    """
    drop_lines(address, n_bytes)
    fence_dropped()
