"""Wide copies and hash turns on raw addresses, as numba intrinsics over LLVM vector types.

A *lane* is one page on its way: a source, a destination and, where it is hashed, eight 64-bit accumulators. A
*turn* moves the next 128 bytes of every lane. Eight lanes keep enough cache lines in flight to saturate one
core's path to memory, and writing whole lines past the cache saves reading them first.

Covers only the inner loops. The order of pages is in `pages.py`, the definition of the checksum in
`checksum.py`, fences are in `atomics.py`. LLVM splits the 512-bit vectors where the machine has narrower
ones, so nothing here knows an instruction set. Addresses are int64; nothing here checks bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "LANES",
    "NO_LIMIT",
    "STRIPE",
    "accumulate_1",
    "accumulate_8",
    "copy_1",
    "copy_8",
    "copy_bytes",
    "fold_product",
    "hash_copy_1",
    "hash_copy_8",
    "hash_stream_1",
    "hash_stream_8",
    "load_i64",
    "load_plain_u64",
    "scramble",
    "stack_words",
    "store_byte",
    "store_i64",
    "store_plain_u64",
    "stream_1",
    "stream_8",
]

LANES = 8
STRIPE = 64

_I8, _I32, _I64, _I128 = (ir.IntType(bits) for bits in (8, 32, 64, 128))
_STRIPE = ir.VectorType(_I64, 8)
# How far ahead of its loads a lane asks for its source, and the limit that means none.
_AHEAD = 512
NO_LIMIT = 1 << 40


def _splat(value: int) -> ir.Constant:
    return ir.Constant(_STRIPE, [value] * 8)


_SWAP_PAIRS = ir.Constant(ir.VectorType(_I32, 8), [1, 0, 3, 2, 5, 4, 7, 6])


def _vector_at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _STRIPE.as_pointer())


def _load_vector(builder: Any, address: Any) -> Any:
    # Alignment 1: on aligned data an unaligned load costs nothing, and an engine's tensor may start anywhere.
    return builder.load(_vector_at(builder, address), align=1)


def _store_ordinary(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, _vector_at(builder, address), align=1)


def _store_streaming(builder: Any, value: Any, address: Any) -> None:
    """Past the cache. The address must be a multiple of 64: another one is a segmentation fault on x86."""
    store = builder.store(value, _vector_at(builder, address), align=STRIPE)
    store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))


def _prefetch(builder: Any, address: Any) -> None:
    byte_pointer = _I8.as_pointer()
    function_type = ir.FunctionType(ir.VoidType(), [byte_pointer, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(address, byte_pointer), _I32(0), _I32(3), _I32(1)])


def _accumulate(builder: Any, accumulators: Any, data: Any, secret: Any) -> Any:
    """One stripe into eight accumulators: the step of XXH3 for long inputs in the xxHash specification."""
    mixed = builder.xor(data, secret)
    product = builder.mul(builder.and_(mixed, _splat(0xFFFFFFFF)), builder.lshr(mixed, _splat(32)))
    swapped = builder.shuffle_vector(data, ir.Constant(_STRIPE, ir.Undefined), _SWAP_PAIRS)
    return builder.add(builder.add(accumulators, swapped), product)


class _Turns:
    """Emits one loop: `lanes` lanes over `n_stripes` stripes, two a turn; hashed or not, stored or not."""

    def __init__(self, lanes: int, hashed: bool, store: Callable[[Any, Any, Any], None] | None) -> None:
        self.lanes = lanes
        self.hashed = hashed
        self.store = store

    def emit(
        self,
        builder: Any,
        sources: Any,
        targets: Any,
        begin: Any,
        n_stripes: Any,
        limit: Any,
        state: Any,
        secret: Any,
    ) -> None:
        # Relative to `begin`: the last stripe that may be asked for ahead.
        self.last_ahead = builder.sub(builder.sub(limit, begin), _I64(STRIPE))
        source = [self._word(builder, sources, lane, begin) for lane in range(self.lanes)]
        target = [self._word(builder, targets, lane, begin) for lane in range(self.lanes)] if self.store else []
        accumulators = []
        for lane in range(self.lanes if self.hashed else 0):
            cell = cgutils.alloca_once(builder, _STRIPE)
            builder.store(_load_vector(builder, builder.add(state, _I64(lane * STRIPE))), cell)
            accumulators.append(cell)
        n_even = builder.and_(n_stripes, _I64(-2))
        with cgutils.for_range_slice(builder, _I64(0), n_even, _I64(2)) as (index, _):
            self._turn(builder, index, 2, source, target, accumulators, secret)
        with builder.if_then(builder.icmp_signed("<", n_even, n_stripes)):
            self._turn(builder, n_even, 1, source, target, accumulators, secret)
        for lane, cell in enumerate(accumulators):
            _store_ordinary(builder, builder.load(cell), builder.add(state, _I64(lane * STRIPE)))

    @staticmethod
    def _word(builder: Any, words: Any, index: int, begin: Any) -> Any:
        word = builder.load(builder.inttoptr(builder.add(words, _I64(8 * index)), _I64.as_pointer()))
        return builder.add(word, begin)

    def _turn(
        self, builder: Any, index: Any, stripes: int, source: Any, target: Any, accumulators: Any, secret: Any
    ) -> None:
        offset = builder.mul(index, _I64(STRIPE))
        keys = []
        for stripe in range(stripes if self.hashed else 0):
            # XXH3 moves on by 8 bytes of its secret from one stripe to the next.
            step = builder.add(builder.mul(index, _I64(8)), _I64(8 * stripe))
            keys.append(_load_vector(builder, builder.add(secret, step)))
        ahead = [self._ahead(builder, offset, stripe) for stripe in range(stripes)]
        for lane in range(self.lanes):
            for stripe in range(stripes):
                _prefetch(builder, builder.add(source[lane], ahead[stripe]))
        for lane in range(self.lanes):
            self._turn_of_lane(builder, lane, offset, stripes, source, target, accumulators, keys)

    def _ahead(self, builder: Any, offset: Any, stripe: int) -> Any:
        wished = builder.add(offset, _I64(STRIPE * stripe + _AHEAD))
        return builder.select(builder.icmp_signed("<", wished, self.last_ahead), wished, self.last_ahead)

    def _turn_of_lane(
        self,
        builder: Any,
        lane: int,
        offset: Any,
        stripes: int,
        source: Any,
        target: Any,
        accumulators: Any,
        keys: Any,
    ) -> None:
        at = [builder.add(offset, _I64(STRIPE * stripe)) for stripe in range(stripes)]
        data = [_load_vector(builder, builder.add(source[lane], place)) for place in at]
        for stripe in range(stripes):
            if self.hashed:
                before = builder.load(accumulators[lane])
                builder.store(_accumulate(builder, before, data[stripe], keys[stripe]), accumulators[lane])
            if self.store is not None:
                self.store(builder, data[stripe], builder.add(target[lane], at[stripe]))


def _make_copy(lanes: int, store: Callable[[Any, Any, Any], None]) -> Any:
    def typer(typing_context: Any, from_: Any, to: Any, at: Any, count: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            sources, targets, begin, n_stripes = args
            turns = _Turns(lanes, False, store)
            turns.emit(builder, sources, targets, begin, n_stripes, _I64(NO_LIMIT), None, None)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return intrinsic(typer)


def _make_hash(lanes: int, store: Callable[[Any, Any, Any], None] | None) -> Any:
    def typer(
        typing_context: Any, from_: Any, to: Any, at: Any, count: Any, limit: Any, state: Any, secret: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _Turns(lanes, True, store).emit(builder, *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return intrinsic(typer)


# Arguments: address of the lanes' source addresses, address of their target addresses, what to add to all of
# those, stripes to move. Source and target of a lane may not overlap. `copy` goes through the cache, `stream`
# past it (targets at multiples of 64).
copy_8 = _make_copy(LANES, _store_ordinary)
copy_1 = _make_copy(1, _store_ordinary)
stream_8 = _make_copy(LANES, _store_streaming)
stream_1 = _make_copy(1, _store_streaming)
# The same, and the stripes are accumulated: plus the position where the sources end (asking ahead past it would
# fetch what nobody reads), the address of the lanes' accumulators (64 bytes a lane, updated), and the address of the
# secret's bytes for the first stripe. `accumulate` stores nothing and ignores the targets.
hash_copy_8 = _make_hash(LANES, _store_ordinary)
hash_copy_1 = _make_hash(1, _store_ordinary)
hash_stream_8 = _make_hash(LANES, _store_streaming)
hash_stream_1 = _make_hash(1, _store_streaming)
accumulate_8 = _make_hash(LANES, None)
accumulate_1 = _make_hash(1, None)


@intrinsic  # type: ignore[untyped-decorator]
def scramble(typing_context: Any, state: Any, secret: Any, prime: Any) -> Any:
    """XXH3's scramble of the eight accumulators at `state` with 64 bytes at `secret`: a bijection of each."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        accumulators = _load_vector(builder, args[0])
        mixed = builder.xor(accumulators, builder.lshr(accumulators, _splat(47)))
        mixed = builder.xor(mixed, _load_vector(builder, args[1]))
        first = builder.insert_element(ir.Constant(_STRIPE, ir.Undefined), args[2], _I32(0))
        primes = builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_I32, 8), [0] * 8))
        _store_ordinary(builder, builder.mul(mixed, primes), args[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def fold_product(typing_context: Any, left: Any, right: Any) -> Any:
    """The low half of the 128-bit product of two u64, xor its high half."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        product = builder.mul(builder.zext(args[0], _I128), builder.zext(args[1], _I128))
        high = builder.trunc(builder.lshr(product, _I128(64)), _I64)
        return builder.xor(builder.trunc(product, _I64), high)

    return types.uint64(types.uint64, types.uint64), codegen


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def stack_words(typing_context: Any, n_words: Any) -> Any:
    """The address of `n_words` (a literal) 8-byte words on the calling function's stack, at a multiple of 64.

    Valid until that function returns; the same memory each time the same call is reached. Not initialised.
    """
    if not isinstance(n_words, types.IntegerLiteral):
        return None
    count = n_words.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cell = cgutils.alloca_once(builder, ir.ArrayType(_I64, count))
        cell.align = STRIPE
        return builder.ptrtoint(cell, _I64)

    return types.int64(n_words), codegen


@intrinsic  # type: ignore[untyped-decorator]
def copy_bytes(typing_context: Any, target: Any, source: Any, n_bytes: Any) -> Any:
    """`memcpy`, for pieces that are no whole number of stripes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _I8.as_pointer()
        into, out_of = (builder.inttoptr(address, pointer) for address in args[:2])
        cgutils.raw_memcpy(builder, into, out_of, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def store_byte(typing_context: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(builder.trunc(args[1], _I8), builder.inttoptr(args[0], _I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _make_plain_load(numba_type: Any) -> Any:
    def typer(typing_context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(builder.inttoptr(args[0], _I64.as_pointer()), align=1)

        return numba_type(types.int64), codegen

    return intrinsic(typer)


def _make_plain_store(numba_type: Any) -> Any:
    def typer(typing_context: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(args[1], builder.inttoptr(args[0], _I64.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, numba_type), codegen

    return intrinsic(typer)


# Plain words, not atomic: scratch on the stack, and memory that a lease or a grant keeps others from writing.
load_i64: Callable[[int], int] = _make_plain_load(types.int64)
store_i64 = _make_plain_store(types.int64)
load_plain_u64: Callable[[int], np.uint64] = _make_plain_load(types.uint64)
store_plain_u64 = _make_plain_store(types.uint64)
