"""The space of a loaded model: which other processes' blocks it may use.

Two models share blocks if their weights, their configuration, the dtype of their cache, their active
adapters, the length of a block and the tenant's salt agree; where they were loaded from does not count.
Covers noticing that any of these changed. Does not cover the space's encoding (`penstock.identity`).
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch

from penstock.connectors.transformers.adapters import (
    Stamp,
    active_settings,
    adapter_stamp,
    check_adapters,
    merged_stamp,
    split_tensors,
)
from penstock.connectors.transformers.cache import KvShape
from penstock.identity import (
    Space,
    TensorBytes,
    config_digest,
    join_digests,
    tensors_digest,
    weight_files,
    weights_digest,
)

__all__ = ["ENGINE", "LAYOUT", "SpaceSource", "effective_config"]

ENGINE = "transformers/1"
LAYOUT = "hf-kv-v1"
"""Segments 2l and 2l+1 are the keys and values of layer l, each [kv_heads, block_tokens, head_dim], rope
applied."""

# Settings that do not reach keys and values: names and places, what is sampled, what is returned.
_UNRELATED = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

_lock = threading.Lock()
_digests: WeakKeyDictionary[Any, dict[Stamp, str]] = WeakKeyDictionary()
"""Digests of live models' tensors, so that several connectors of one model read it once."""
_MAX_SPACES = 64


class SpaceSource:
    """Gives the space of a model, and another one when the model changed.

    Weights are digested where they lie in memory, once (about 1 GB/s and core); `checkpoint`, a folder or the
    files, takes the digest of the files instead, which is kept between runs: the caller's promise that the
    model's own weights are exactly theirs. Processes share blocks only if both do it the same way.
    Later changes are noticed by the tensors' addresses and version counters, and digested in memory. A write
    through `.data` moves neither: call `refresh` after one.
    """

    def __init__(
        self,
        model: Any,
        shape: KvShape,
        *,
        block_tokens: int,
        tenant: bytes = b"",
        epoch: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        check_adapters(model)
        self._model = model
        self._shape = shape
        self._block_tokens = block_tokens
        self._tenant = tenant
        self._epoch = epoch
        self._config = effective_config(model)
        self._files: tuple[Stamp, str] | None = None
        if checkpoint is not None:
            self._files = (self._weights_stamp(split_tensors(model)[0]), _files_digest(checkpoint))
        self._spaces: dict[Stamp, Space] = {}

    def current(self) -> Space:
        """The space of the model as it is now. Digests what changed since the last call."""
        stamp = (adapter_stamp(self._model), _stamp(_named(self._model)))
        space = self._spaces.get(stamp)
        if space is None:
            check_adapters(self._model)
            space = self._build()
            if len(self._spaces) >= _MAX_SPACES:
                self._spaces.clear()
            self._spaces[stamp] = space
        return space

    def refresh(self) -> None:
        """Forget what is known about the weights: they were changed in a way that cannot be seen."""
        with _lock:
            _digests.pop(self._model, None)
        self._files = None
        self._spaces.clear()

    def _build(self) -> Space:
        weights, adapter = split_tensors(self._model)
        return Space(
            weights=self._weights_digest(weights),
            config=config_digest(self._config),
            engine=ENGINE,
            layout=LAYOUT,
            dtype=str(self._shape.dtype).removeprefix("torch."),
            block_tokens=self._block_tokens,
            n_segments=2 * self._shape.n_layers,
            segment_bytes=self._block_tokens * self._shape.token_bytes,
            adapter=_adapter_digest(adapter, active_settings(self._model)) if adapter else "",
            tenant=self._tenant,
            epoch=self._epoch,
        )

    def _weights_digest(self, weights: dict[str, torch.Tensor]) -> str:
        stamp = self._weights_stamp(weights)
        if self._files is not None and self._files[0] == stamp:
            return self._files[1]
        with _lock:
            known = _digests.setdefault(self._model, {})
            if stamp not in known:
                known.clear()
                known[stamp] = tensors_digest(_Bytes(weights))
            return known[stamp]

    def _weights_stamp(self, weights: dict[str, torch.Tensor]) -> Stamp:
        """Without the active adapters: switching between them must not read the weights again."""
        return (merged_stamp(self._model), _stamp(weights.values()))


def effective_config(model: Any) -> dict[str, Any]:
    """The model's configuration as it is in memory, overrides included, without what cannot reach keys and
    values, in plain values; with the attention implementation, which `to_dict` leaves out."""
    plain: dict[str, Any] = _plain(model.config.to_dict())
    plain["attn_implementation"] = getattr(model.config, "_attn_implementation", None)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if key not in _UNRELATED}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return repr(value)


def _adapter_digest(tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> str:
    return join_digests(tensors_digest(_Bytes(tensors)), config_digest(settings))


def _files_digest(checkpoint: str | os.PathLike[str]) -> str:
    return weights_digest(weight_files(checkpoint) if os.path.isdir(checkpoint) else [checkpoint])


def _named(model: Any) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _stamp(tensors: Iterable[torch.Tensor]) -> Stamp:
    """Moves when a tensor is replaced or written in place. Tensors made in inference mode count no
    versions."""
    return tuple((id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)


class _Bytes(Mapping[str, TensorBytes]):
    """Tensors as `tensors_digest` takes them, each looked at when its turn comes."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> TensorBytes:
        tensor = self._tensors[name].detach()
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        return TensorBytes(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), raw)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
