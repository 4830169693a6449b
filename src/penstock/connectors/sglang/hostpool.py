"""Where SGLang's host pool keeps a page, and what its bytes mean.

Covers the layouts of plain MHA and MLA host pools. Everything else is refused: an unknown layout is never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.mem_cache.device_pool_info import KVBufferLayout
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

from penstock import TensorMap
from penstock.errors import Refused

__all__ = ["HostPages", "inspect_host_pool"]

# What a pool takes (`Pool.space`).
_SEGMENT_ALIGN = 64
_SEGMENT_LEAST = 256
_LAYOUTS = ("layer_first", "page_first", "page_first_direct")


@dataclass(frozen=True, slots=True)
class HostPages:
    """The pages of one host pool. All addresses and strides are bytes of `buffer`, which is the host pool's own."""

    buffer: torch.Tensor
    layout: str
    """What the bytes of a block mean, for the space. `layer_first` and `page_first_direct` pages hold the same:
    segments [page_size, heads, dim] of layer 0, 1, ..., keys before values; a `page_first` page holds
    [page_size, layers, heads, dim], keys before values. MLA has one latent row where the others have two."""
    dtype: str
    page_size: int
    """Tokens in a page."""
    n_pages: int
    seg_base: npt.NDArray[np.int64]
    segment_bytes: int
    page_stride: int
    geometry: tuple[int, ...]
    """Kinds (keys, values), layers, heads and dim, for the space's configuration."""

    @property
    def n_segments(self) -> int:
        """Segments in a block."""
        return len(self.seg_base)

    def tensor_map(self, host_indices: torch.Tensor, n_pages: int) -> TensorMap | None:
        """The pages that hold these tokens, (n_pages * page_size,) of them; None if they are no whole pages."""
        tokens = host_indices.detach().cpu().numpy().astype(np.int64, copy=False)
        if tokens.ndim != 1 or len(tokens) != n_pages * self.page_size:
            return None
        rows = tokens.reshape(n_pages, self.page_size)
        pages, offsets = np.divmod(rows[:, 0], self.page_size)
        whole = not offsets.any() and np.array_equal(rows, rows[:, :1] + np.arange(self.page_size))
        if not whole or (n_pages and not 0 <= pages.min() <= pages.max() < self.n_pages):
            return None
        return TensorMap(self.seg_base, np.ascontiguousarray(pages), self.page_stride, keep_alive=self.buffer)


def inspect_host_pool(host_pool: Any) -> HostPages:
    """The pages of SGLang's host pool. Raises Refused, with the remedy, for one that this does not know."""
    kinds = _kinds(host_pool)
    layout, buffer = host_pool.layout, host_pool.kv_buffer
    if layout not in _LAYOUTS:
        raise Refused(
            f"host layout {layout!r} is not supported: start SGLang with --hicache-mem-layout page_first_direct "
            f"(or {', '.join(_LAYOUTS[:2])})"
        )
    if not isinstance(buffer, torch.Tensor) or buffer.device.type != "cpu" or not buffer.is_contiguous():
        raise Refused("the host pool's buffer is not one contiguous tensor in host memory: nothing could be copied")
    page, layers, pages = host_pool.page_size, host_pool.layer_num, host_pool.page_num
    row = (host_pool.head_num, host_pool.head_dim) if kinds == 2 else (1, host_pool.kv_cache_dim)
    shape, page_axis, layer_axis = _expected(layout, page, layers, pages)
    expected = ((2,) if kinds == 2 else ()) + shape + row
    if tuple(buffer.shape) != expected:
        raise Refused(f"a {layout} host pool of shape {tuple(buffer.shape)}, expected {expected}: not a known layout")
    item = buffer.element_size()
    strides = [stride * item for stride in buffer.stride()][kinds - 1 :]
    # Axes are [kind] + shape + row; of one kind there is no kind axis.
    starts = [buffer.data_ptr() + kind * buffer.stride(0) * item for kind in range(kinds)]
    token_bytes = row[0] * row[1] * item
    if layout == "page_first":
        bases, segment_bytes = starts, page * layers * token_bytes
    else:
        bases = [start + layer * strides[layer_axis] for start in starts for layer in range(layers)]
        segment_bytes = page * token_bytes
    page_stride = strides[page_axis] * (1 if layout == "page_first_direct" else page)
    name = "mha" if kinds == 2 else "mla"
    order = "tokens" if layout == "page_first" else "layers"
    _check_segment(segment_bytes, page)
    return HostPages(
        buffer=buffer,
        layout=f"sglang-{name}-{order}-v1",
        dtype=str(buffer.dtype).removeprefix("torch."),
        page_size=page,
        n_pages=pages,
        seg_base=np.array(bases, dtype=np.int64),
        segment_bytes=segment_bytes,
        page_stride=page_stride,
        geometry=(kinds, layers, *row),
    )


def _expected(layout: str, page: int, layers: int, pages: int) -> tuple[tuple[int, ...], int, int]:
    """Shape without kinds and row, the axis of tokens or pages, and that of layers."""
    if layout == "layer_first":
        return (layers, pages * page), 1, 0
    if layout == "page_first":
        return (pages * page, layers), 0, 1
    return (pages, layers, page), 0, 1


def _kinds(host_pool: Any) -> int:
    """2 for keys and values, 1 for MLA's latent rows; Refused for every other host pool."""
    # Subclasses lay pages out in their own way: asymmetric heads, MXFP8 scales, sparse attention.
    kinds = {MHATokenToKVPoolHost: 2, MLATokenToKVPoolHost: 1}.get(type(host_pool))
    if kinds is None:
        raise Refused(
            f"host pools of type {type(host_pool).__name__} are not supported: penstock knows plain MHA and MLA pools. "
            "Start SGLang without --hicache-storage-backend for this model"
        )
    if host_pool.dcp_size != 1 or getattr(host_pool, "_layer_shard_enabled", False):
        raise Refused("decode context parallelism and layer-sharded KV are not supported by penstock")
    if host_pool.storage_format_tag is not None or host_pool.shared_allocation_domain is not None:
        raise Refused(
            "the host pool has a page format of its own (unified memory): start SGLang without --enable-unified-memory"
        )
    if host_pool.layer_num != host_pool.target_layer_num:
        raise Refused(
            "the host pool holds a draft model's layers beside the model's own: pages would depend on weights that "
            "are not in their identity. Start SGLang without --speculative-algorithm"
        )
    if kinds == 2 and any(
        info.buffers.layout is not KVBufferLayout.NHD or info.scales is not None for info in host_pool._buffer_infos
    ):
        raise Refused(
            "the device's KV is not laid out [tokens, heads, dim] without scales: choose another attention backend"
        )
    if kinds == 1 and host_pool.dsa_kv_cache_store_fp8:
        raise Refused("MLA pages packed as FP8 with their scales are not supported: set --kv-cache-dtype bfloat16")
    return kinds


def _check_segment(segment_bytes: int, page: int) -> None:
    if segment_bytes % _SEGMENT_ALIGN or segment_bytes < _SEGMENT_LEAST:
        raise Refused(
            f"--page-size {page} makes layer segments of {segment_bytes} bytes; they must be multiples of "
            f"{_SEGMENT_ALIGN} of at least {_SEGMENT_LEAST}: choose a larger page size, such as 64"
        )
