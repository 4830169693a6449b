"""Where vLLM keeps its KV and what the bytes of a block are.

A pool block is the engine's whole block: one segment for each layer, in the order of the model. The bytes inside
belong to the attention kernel, which lays them out by instruction set, so that its name is part of the space. Covers
the CPU backend's layout, which is the only one known here; every other one is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from penstock.errors import Refused
from penstock.pool.tensors import TensorMap

__all__ = ["PagedCaches", "group_spec", "inspect_caches"]

_BACKENDS = frozenset({"CPU_ATTN"})
# Kinds of quantisation whose bytes are the values, and nothing else.
_QUANT_MODES = frozenset({"NONE", "FP8_PER_TENSOR"})


@dataclass(frozen=True, slots=True)
class PagedCaches:
    """The paged caches of one worker: page p of layer l is `page_bytes` bytes at `bases[l] + p * page_bytes`."""

    layers: tuple[str, ...]
    bases: npt.NDArray[np.int64]
    n_pages: int
    page_bytes: int
    layout: str
    """Name of what the bytes of a page mean."""
    tensors: tuple[torch.Tensor, ...]

    def map(self, pages: list[int]) -> TensorMap:
        """The tensors of these pages. Raises ValueError for a page that is not there: copying there would write into
        other memory."""
        index = np.array(pages, np.int64)
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= self.n_pages):
            raise ValueError(f"pages {int(index.min())} to {int(index.max())} of a cache that has {self.n_pages}")
        return TensorMap(self.bases, index, self.page_bytes, keep_alive=self.tensors)


def group_spec(kv_cache_config: Any) -> Any:
    """The one KV cache group's specification; Refused, with the reason, for caches of another kind."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
        raise Refused(
            f"a hybrid model with {len(groups)} KV cache groups ({', '.join(kinds)}): only models whose layers all "
            "keep every token in one kind of block can be shared. For models with sliding windows, "
            "--disable-hybrid-kv-cache-manager makes them so"
        )
    spec = groups[0].kv_cache_spec
    if type(spec) is not FullAttentionSpec:
        raise Refused(f"{type(spec).__name__}: only full attention keeps one entry for each token and layer")
    _check_spec(spec)
    return spec


def _check_spec(spec: Any) -> None:
    odd = {
        "attention_chunk_size": (None, "chunked attention"),
        "non_causal": (False, "attention that looks ahead: a block depends on later tokens"),
        "tokens_per_state": (1, "compressed states"),
        "num_head_slots": (None, "packed heads"),
        "state_content_bytes": (None, "packed states"),
        "page_size_padded": (None, "padded pages"),
    }
    for name, (plain, what) in odd.items():
        if getattr(spec, name, plain) != plain:
            raise Refused(f"the KV cache has {name}={getattr(spec, name)!r} ({what}): its layout is not known here")
    mode = getattr(spec.kv_quant_mode, "name", str(spec.kv_quant_mode))
    if "PER_TOKEN" in mode or "PER_HEAD" in mode:
        raise Refused(f"KV quantisation {mode}: scales that are calculated at run time differ between processes")
    if mode not in _QUANT_MODES:
        raise Refused(f"KV quantisation {mode}: its layout is not known here")


def inspect_caches(kv_caches: Mapping[str, torch.Tensor], spec: Any, forward_context: Mapping[str, Any]) -> PagedCaches:
    """The caches that vLLM registered, checked against what is known of their layout; Refused otherwise.

    `kv_caches` maps each layer to its (pages, kv_heads, block_size, 2 * head_dim) tensor; `forward_context` to its
    attention layer, which knows the kernel.
    """
    names = tuple(sorted(kv_caches, key=_layer_order))
    tensors = tuple(kv_caches[name] for name in names)
    if not tensors:
        raise Refused("the model has no KV cache: nothing to share")
    shape, first = tuple(tensors[0].shape), tensors[0]
    page_bytes = int(spec.page_size_bytes)
    for name, tensor in zip(names, tensors):
        if tensor.device.type != "cpu":
            raise Refused(
                f"the KV cache is on {tensor.device}: this release shares KV caches in host memory (CPU) only"
            )
        if tuple(tensor.shape) != shape or tensor.dtype != first.dtype:
            raise Refused(f"layer {name} has a cache of {list(tensor.shape)} {tensor.dtype}, others {list(shape)}")
        if not tensor[0].is_contiguous() or tensor.stride(0) * tensor.element_size() != page_bytes:
            raise Refused(f"layer {name}: pages of its cache are not {page_bytes} bytes in one piece")
    expected = (spec.num_kv_heads, spec.block_size, spec.head_size + spec.head_size_v)
    if len(shape) != 4 or shape[1:] != expected:
        raise Refused(f"KV caches of {list(shape)}: only [pages, {', '.join(map(str, expected))}] is known here")
    if len({tensor.data_ptr() for tensor in tensors}) != len(tensors):
        raise Refused("layers that share one KV cache: their blocks are not whole by themselves")
    kernels = {_kernel(name, forward_context[name]) for name in names}
    if len(kernels) != 1:
        raise Refused(f"layers of different attention kernels ({', '.join(sorted(kernels))})")
    bases = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
    layout = f"vllm-lbhnc-v1/{kernels.pop()}/{spec.num_kv_heads}x{spec.block_size}x{spec.head_size}+{spec.head_size_v}"
    return PagedCaches(names, bases, shape[0], page_bytes, layout, tensors)


def _kernel(name: str, layer: Any) -> str:
    """The attention kernel with its instruction set: "CPU_ATTN/amx"."""
    backend = layer.get_attn_backend().get_name()
    isa = getattr(layer, "isa", None)
    if backend not in _BACKENDS or not isinstance(isa, str):
        raise Refused(f"layer {name} uses the attention backend {backend}: its blocks are not known here")
    return f"{backend}/{isa}"


def _layer_order(name: str) -> tuple[list[int], str]:
    """By the numbers in the name, as in model.layers.10.self_attn.attn."""
    return [int(number) for number in re.findall(r"\d+", name)], name
