"""One Triton launch for all layers and blocks of a transfer, reading and writing host memory by address.

The idea of one fused gather or scatter that loads and stores pool memory from the GPU is Beluga's (arXiv 2511.20172).
Covers moving `Pieces` whose host side is registered (`registration.py`). Does not cover the choice against the copy
engine, streams or leases, and computes no checksum: what checks blocks runs on the host.

Under Triton's interpreter (TRITON_INTERPRET=1 before this is imported) the same kernel runs on host memory alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from penstock.connectors.cuda.pieces import Pieces

__all__ = ["CHUNK_BYTES", "WARPS", "compile_arguments", "copy_pieces", "launch"]

CHUNK_BYTES = 16 << 10
"""What a program moves before it looks for more: 8 warps, 4 accesses of 16 bytes for each thread in flight."""
WARPS = 8

_WORDS = {16: tl.int64, 8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


# Triton's compiler looks annotations up: it takes no others than its own here.
def _copy_pieces(  # type: ignore[no-untyped-def]
    table,
    n_blocks,
    n_segments,
    n_units,
    TO_PAGES: tl.constexpr,
    WORD: tl.constexpr,
    WORDS_IN_UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Copy every piece; a segment has n_units * WORDS_IN_UNIT words, a program takes CHUNK of them at a time.

    `table` is `Pieces.table`. Each address is a multiple of ALIGN, and so is a unit's size: that is what lets the
    compiler make the accesses 16 bytes wide, the masked ones at the end too.
    """
    n_words = n_units * WORDS_IN_UNIT
    chunks = tl.cdiv(n_words, CHUNK)
    for at in range(tl.program_id(0), n_blocks * n_segments * chunks, tl.num_programs(0)):
        piece = at // chunks
        block = piece // n_segments
        segment = piece % n_segments
        slot = tl.load(table + block) + tl.load(table + 2 * n_blocks + segment)
        page = tl.load(table + n_blocks + block) + tl.load(table + 2 * n_blocks + n_segments + segment)
        host = tl.multiple_of(slot.to(tl.pointer_type(WORD)), ALIGN)
        device = tl.multiple_of(page.to(tl.pointer_type(WORD)), ALIGN)
        words = (at % chunks) * CHUNK + tl.arange(0, CHUNK)
        inside = words < n_words
        if TO_PAGES:
            tl.store(device + words, tl.load(host + words, mask=inside), mask=inside)
        else:
            tl.store(host + words, tl.load(device + words, mask=inside), mask=inside)


# The counts differ from call to call: one compiled kernel serves them all.
copy_pieces: Any = triton.jit(do_not_specialize=["n_blocks", "n_segments", "n_units"])(_copy_pieces)


def compile_arguments(alignment: int, *, to_pages: bool) -> dict[str, Any]:
    """The kernel's constants for pieces of this alignment (16, 8, 4, 2 or 1 bytes)."""
    word_bytes = min(alignment, 8)
    return {
        "TO_PAGES": to_pages,
        "WORD": _WORDS[alignment],
        "WORDS_IN_UNIT": alignment // word_bytes,
        "ALIGN": alignment,
        "CHUNK": CHUNK_BYTES // word_bytes,
    }


def launch(pieces: Pieces, device: torch.device, *, to_pages: bool, programs: int) -> None:
    """Queue one launch on the current stream that moves all pieces; at most `programs` programs run it.

    A no-op without pieces. The first launch for an alignment and direction compiles, which takes seconds.
    """
    if not pieces.count:
        return
    alignment = pieces.alignment()
    table = torch.from_numpy(pieces.table())
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    chunks = -(-pieces.segment_bytes // CHUNK_BYTES)
    copy_pieces[(min(pieces.count * chunks, programs),)](
        table,
        len(pieces.slots),
        len(pieces.segs),
        pieces.segment_bytes // alignment,
        num_warps=WARPS,
        **compile_arguments(alignment, to_pages=to_pages),
    )
