"""Loads, stores and fences on raw addresses, as numba intrinsics that emit LLVM's atomic instructions.

Every control word that two processes share is touched through these and nothing else: a plain array read in a spin
loop compiles to a loop that never reads again, and Python has no memory order at all. Addresses are int64 values that
come from the mapped segment; nothing here checks bounds.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "fence_full",
    "load",
    "load32",
    "load_acquire",
    "prefetch",
    "store",
    "store32",
    "store_fence_nt",
    "store_release",
]

Load = Callable[[int], int]
Store = Callable[[int, int], None]

_IS_X86 = platform.machine().lower() in {"x86_64", "amd64"}


def _make_load(bits: int, ordering: str) -> Any:
    def typer(typing_context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], ir.IntType(bits).as_pointer())
            value = builder.load_atomic(pointer, ordering, bits // 8)
            return value if bits == 64 else builder.zext(value, ir.IntType(64))

        return types.int64(types.int64), codegen

    return intrinsic(typer)


def _make_store(bits: int, ordering: str) -> Any:
    def typer(typing_context: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], ir.IntType(bits).as_pointer())
            value = args[1] if bits == 64 else builder.trunc(args[1], ir.IntType(bits))
            builder.store_atomic(value, pointer, ordering, bits // 8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return intrinsic(typer)


# All cells are int64 in kernels, whatever they mean: numba turns uint64 + int64 into a float.
# Subscribe: what was written before the matching release store is seen after this load.
load_acquire: Load = _make_load(64, "acquire")
# Publish: what was written before this store is seen by whoever acquires the value.
store_release: Store = _make_store(64, "release")
# Only atomicity, for cells whose order another load, store or fence already gives.
load: Load = _make_load(64, "monotonic")
store: Store = _make_store(64, "monotonic")
# The same for 4-byte cells, zero-extended.
load32: Load = _make_load(32, "monotonic")
store32: Store = _make_store(32, "monotonic")


def _fence_full(typing_context: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


def _store_fence_nt(typing_context: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _IS_X86:
            function_type = ir.FunctionType(ir.VoidType(), [])
            function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.x86.sse.sfence")
            builder.call(function, [])
        else:
            builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


def _prefetch(typing_context: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte_pointer = ir.IntType(8).as_pointer()
        pointer = builder.inttoptr(args[0], byte_pointer)
        i32 = ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [byte_pointer, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        builder.call(function, [pointer, i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


# A full fence: no load after it runs before a store ahead of it (`mfence` on x86, `dmb ish` on Arm).
fence_full: Callable[[], None] = intrinsic(_fence_full)
# Orders non-temporal stores before the publication that follows; LLVM's release fence does not on x86.
store_fence_nt: Callable[[], None] = intrinsic(_store_fence_nt)
# Asks for the cache line at an address to be read soon; never faults.
prefetch: Callable[[int], None] = intrinsic(_prefetch)
