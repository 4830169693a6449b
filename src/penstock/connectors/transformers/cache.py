"""A transformers cache whose keys and values lie in storage reserved ahead.

The pool's kernels copy blocks straight into and out of that storage, and decoding appends in place where
`DynamicCache` allocates and copies everything for every token. Covers the cache and the address maps that
kernels take (for plain `DynamicCache` objects too). Does not cover which blocks are copied (`connector.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from penstock import TensorMap
from penstock.errors import Refused

__all__ = ["KvShape", "ReservedCache", "ReservedLayer", "Snapshot", "snapshot_of"]


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one token adds to a model's cache: [n_heads, head_dim] keys and as many values in every layer."""

    n_layers: int
    n_heads: int
    """Key-value heads: fewer than query heads under grouped-query attention."""
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys (or values) of one layer."""
        return self.n_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Where a cache's keys and values lie; keeps that memory alive. Tokens below `n_tokens` do not change
    any more: a cache that drops tokens moves to other memory first."""

    n_tokens: int
    seg_base: np.ndarray[Any, np.dtype[np.int64]]
    """Address of segment 2l (keys of layer l) and 2l + 1 (its values)."""
    token_stride: int
    head_stride: int
    n_heads: int
    tensors: tuple[torch.Tensor, ...]

    def tensor_map(self, first: int, last: int, block_tokens: int) -> TensorMap:
        """The map of blocks first .. last-1 of the sequence."""
        return TensorMap(
            seg_base=self.seg_base,
            block_index=np.arange(first, last, dtype=np.int64),
            block_stride=block_tokens * self.token_stride,
            runs=self.n_heads,
            run_stride=self.head_stride,
            keep_alive=self.tensors,
        )


class ReservedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values in `storage` [2, 1, n_heads, capacity, head_dim]; one sequence only.

    `keys` and `values` are views of the tokens held. Appending writes behind them, and moves to storage of
    twice the size when it is full. Whatever drops or reorders tokens moves to fresh storage, because a
    `Snapshot` of the old one may still be read.
    """

    def __init__(self, shape: KvShape, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = shape.dtype
        self.device = torch.device("cpu")
        self.storage = torch.empty((2, 1, shape.n_heads, capacity, shape.head_dim), dtype=shape.dtype)
        self.is_initialized = True
        self.show(0)

    @property
    def capacity(self) -> int:
        """Tokens that the storage holds."""
        return self.storage.shape[3]

    def show(self, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the first `n_tokens` tokens of the storage the content of the cache; returns them."""
        keys, values = self.storage[0, :, :, :n_tokens], self.storage[1, :, :, :n_tokens]
        self.keys, self.values = keys, values
        return keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [1, n_heads, n, head_dim] keys and values; returns views of all that is held.

        Raises Refused, the cache unchanged, for another batch size, dtype or device than that reserved for.
        """
        self._check(key_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self.capacity:
            self._move(max(end, 2 * self.capacity))
        self.storage[0, :, :, start:end].copy_(key_states)
        self.storage[1, :, :, start:end].copy_(value_states)
        return self.show(end)

    def _check(self, states: torch.Tensor) -> None:
        if states.shape[0] != 1:
            raise Refused(f"a batch of {states.shape[0]} sequences: this cache holds one. Send one request at a time")
        if states.dtype != self.dtype or states.device != self.device:
            raise Refused(
                f"the model computed keys as {states.dtype} on {states.device}, and did as {self.dtype} on "
                f"{self.device} when the connector was made: make it under the same autocast, device and "
                "dtype as the requests"
            )

    def _move(self, capacity: int) -> None:
        """Copy what is shown to fresh storage."""
        keys, values = self.keys, self.values
        if keys is None or values is None:
            raise Refused("the cache was emptied from outside: take a new one from load()")
        if keys.shape[0] != 1:
            raise Refused(f"the cache was expanded to {keys.shape[0]} sequences: send one request at a time")
        n_heads, n_tokens, head_dim = keys.shape[1:]
        self.storage = torch.empty((2, 1, n_heads, capacity, head_dim), dtype=self.dtype)
        shown = self.show(n_tokens)
        shown[0].copy_(keys)
        shown[1].copy_(values)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        self._move(self.capacity)

    def reset(self) -> None:
        self.show(0)
        self._move(self.capacity)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._move(self.capacity)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._move(self.capacity)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._move(self.capacity)


class ReservedCache(DynamicCache):
    """A `DynamicCache` of `ReservedLayer`s, for `model(past_key_values=...)` and `model.generate`."""

    def __init__(self, shape: KvShape, capacity: int) -> None:
        self._reserved = [ReservedLayer(shape, capacity) for _ in range(shape.n_layers)]
        # Past DynamicCache's own constructor, which would plan layers of its own.
        Cache.__init__(self, layers=list(self._reserved))

    def show(self, n_tokens: int) -> None:
        """Make the first `n_tokens` tokens of every layer's storage the content of the cache."""
        for layer in self._reserved:
            layer.show(n_tokens)

    def reserved(self) -> Snapshot:
        """A snapshot that spans the whole capacity, to gather into."""
        return _snapshot([half for layer in self._reserved for half in layer.storage.unbind(0)])


def snapshot_of(cache: Any, shape: KvShape) -> Snapshot:
    """Where the keys and values of a cache lie. Copies tensors that kernels could not walk.

    Raises Refused for a cache that is not made of `shape`'s plain layers.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, DynamicCache) or layers is None or len(layers) != shape.n_layers:
        raise Refused(
            f"{type(cache).__name__} is not a DynamicCache of {shape.n_layers} layers: pass the cache that "
            "load() returned, or a DynamicCache that the model filled"
        )
    tensors: list[torch.Tensor] = []
    for index, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, ReservedLayer):
            raise Refused(f"layer {index} of the cache is a {type(layer).__name__}, which holds no blocks")
        for tensor in (layer.keys, layer.values):
            _check_shape(tensor, shape, index)
            tensors.append(tensor)
    if len({(tensor.shape, tensor.stride()) for tensor in tensors}) > 1 or not _walkable(tensors[0]):
        n_tokens = min(tensor.shape[2] for tensor in tensors)
        tensors = [tensor[:, :, :n_tokens].contiguous() for tensor in tensors]
    return _snapshot(tensors)


def _check_shape(tensor: torch.Tensor | None, shape: KvShape, layer: int) -> None:
    expected = (1, shape.n_heads, shape.head_dim)
    if tensor is None or tensor.dim() != 4 or (*tensor.shape[:2], tensor.shape[3]) != expected:
        found = "nothing" if tensor is None else str(tuple(tensor.shape))
        raise Refused(
            f"layer {layer} of the cache holds {found}, not [1, {shape.n_heads}, tokens, {shape.head_dim}]: "
            "one sequence of this connector's model"
        )
    if tensor.dtype != shape.dtype or tensor.device.type != "cpu":
        raise Refused(f"layer {layer} of the cache holds {tensor.dtype} on {tensor.device}, not {shape.dtype}")


def _walkable(tensor: torch.Tensor) -> bool:
    """Whether the tokens of a head follow one another without gaps."""
    return tensor.shape[2] == 0 or (tensor.stride(3) == 1 and tensor.stride(2) == tensor.shape[3])


def _snapshot(tensors: Sequence[torch.Tensor]) -> Snapshot:
    """The snapshot of tensors [1, n_heads, tokens, head_dim] that all have the same strides."""
    one = tensors[0]
    return Snapshot(
        n_tokens=one.shape[2],
        seg_base=np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64),
        token_stride=one.shape[3] * one.element_size(),
        head_stride=one.stride(1) * one.element_size(),
        n_heads=one.shape[1],
        tensors=tuple(tensors),
    )
