"""The space of a vLLM engine: which other processes' blocks it may use, and which engines cannot be said to have one.

Two engines share if they load the same weight files with the same effective configuration and keep the same kind of
blocks; names, paths and ports do not count. Covers the engine's own space, that of an adapter, and what is refused.
Does not cover a request's own differences (`requests.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock import Space
from penstock.connectors.vllm.layout import PagedCaches
from penstock.connectors.vllm.messages import RankId, Variant
from penstock.errors import Refused
from penstock.identity import UNIT_SCALES, Rank, config_digest, weight_files, weights_digest

__all__ = ["ENGINE", "Adapters", "check_engine", "engine_space", "varied"]

ENGINE = "vllm/1"

# Speculation that keeps no KV of its own; a draft model's would lie in blocks that this space does not describe.
_DRAFTLESS = frozenset({"ngram", "ngram_gpu", "suffix"})
_RANDOM_FORMATS = frozenset({"dummy"})
# Settings of the configuration that do not reach keys and values.
_UNRELATED = frozenset(
    {
        "_name_or_path", "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id",
        "id2label", "label2id", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type",
        "return_dict", "torch_dtype", "transformers_version", "use_cache",
    }
)  # fmt: skip
# Rope kinds that choose their frequencies by the engine's own length limit.
_BY_LENGTH = frozenset({"dynamic", "longrope"})


def check_engine(vllm_config: Any) -> None:
    """Refused, with the reason, for an engine whose blocks cannot be told apart by what is known at start."""
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise Refused(f"{name}={getattr(parallel, name)}: blocks that are spread over ranks token by token")
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise Refused(
            "calculate_kv_scales: scales that are calculated at run time differ between processes; turn it off"
        )
    if getattr(vllm_config.cache_config, "kv_sharing_fast_prefill", False):
        raise Refused("kv_sharing_fast_prefill leaves parts of the blocks unwritten; turn it off")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in _DRAFTLESS:
        raise Refused(
            f"speculative decoding with {speculative.method!r} keeps a KV cache of its own; "
            f"only {', '.join(sorted(_DRAFTLESS))} can be used with a shared pool"
        )
    if vllm_config.model_config.is_encoder_decoder:
        raise Refused("an encoder-decoder model: its blocks depend on more than the tokens before")
    if vllm_config.load_config.load_format in _RANDOM_FORMATS:
        raise Refused("load_format='dummy': random weights cannot be told from other ones")


def engine_space(vllm_config: Any, caches: PagedCaches, spec: Any, rank: RankId, weights: str, layers: Any) -> Space:
    """The space of what rank (pipeline, tensor) keeps. Reads the weight files once per machine (about 1 GB/s and
    core). Raises Refused where the weights are not known."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    pipeline, tensor = rank
    layer_names = "" if parallel.pipeline_parallel_size == 1 else f"/{caches.layers[0]}..{caches.layers[-1]}"
    return Space(
        weights=weights or _weights(model, vllm_config.load_config),
        config=config_digest(_effective(vllm_config)),
        engine=ENGINE,
        layout=caches.layout + layer_names,
        dtype=str(spec.dtype).removeprefix("torch."),
        kv_scales=_scales(caches, spec, layers),
        block_tokens=int(spec.block_size),
        n_segments=len(caches.layers),
        segment_bytes=caches.page_bytes,
        tensor_rank=Rank(tensor, parallel.tensor_parallel_size),
        pipeline_rank=Rank(pipeline, parallel.pipeline_parallel_size),
    )


def varied(space: Space, variant: Variant) -> Space:
    """`space` with what a request adds to it."""
    if not variant.adapter and not variant.epoch:
        return space
    return replace(space, adapter=variant.adapter, epoch=variant.epoch)


class Adapters:
    """Digests of the LoRA adapters that requests name. For one thread."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[str, _Stamp]] = {}

    def digest(self, lora_request: Any) -> str:
        """Digest of the adapter's files, whatever it is called. Reads them once (about 1 GB/s and core).

        Raises Refused where they cannot be read, or changed since this name and path were first used: nobody knows
        which of them the engine loaded, and its own prefix cache tells adapters apart by name and path only.
        """
        folder = Path(lora_request.lora_path)
        config = folder / "adapter_config.json"
        if not folder.is_dir() or not config.is_file():
            raise Refused(f"the adapter {lora_request.lora_name!r} is not a folder with an adapter_config.json here")
        files = (*_adapter_files(folder), config)
        stamp = tuple((file.name, *_identity(file.stat())) for file in files)
        key = (str(lora_request.lora_name), str(folder))
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = (weights_digest(files), stamp)
        if known[1] != stamp:
            raise Refused(
                f"the files of adapter {lora_request.lora_name!r} changed after it was first used: load them under "
                "another name"
            )
        return known[0]


_Stamp = tuple[tuple[str, int, int, int], ...]


def _identity(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _adapter_files(folder: Path) -> tuple[Path, ...]:
    files = tuple(sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")) or sorted(folder.glob("*.pt")))
    if not files:
        raise Refused(f"no adapter weights in {folder}: expected *.safetensors, *.bin or *.pt")
    return files


def _weights(model: Any, load_config: Any) -> str:
    try:
        return weights_digest(weight_files(_model_folder(model, load_config)))
    except (OSError, ValueError) as error:
        raise Refused(
            f"the weights of {model.model!r} are not files that can be read here ({error}). Serve a folder or a cached "
            'hub model, or give their digest: kv_connector_extra_config={"weights": "algorithm:hex"}'
        ) from error


def _model_folder(model: Any, load_config: Any) -> Path:
    """The folder with the checkpoint: the model's path, or where the hub's cache keeps it."""
    folder = Path(getattr(model, "model_weights", "") or model.model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            str(folder), revision=model.revision, cache_dir=load_config.download_dir, local_files_only=True
        )
    )


def _effective(vllm_config: Any) -> dict[str, Any]:
    """What, besides the weights, keys and values are computed by."""
    model = vllm_config.model_config
    hf_config = model.hf_config.to_dict()
    effective: dict[str, Any] = {"hf": _plain({k: v for k, v in hf_config.items() if k not in _UNRELATED})}
    effective["dtype"] = str(model.dtype)
    effective["quantization"] = str(model.quantization or "")
    effective["cache_dtype"] = str(vllm_config.cache_config.cache_dtype)
    if _rope_kinds(hf_config) & _BY_LENGTH:
        effective["max_model_len"] = int(model.max_model_len)
    return effective


def _rope_kinds(config: Any) -> set[str]:
    """All rope types named anywhere in a configuration."""
    if not isinstance(config, Mapping):
        return set()
    kinds = {str(config[name]) for name in ("rope_type", "type") if isinstance(config.get(name), str)}
    return kinds.union(*(_rope_kinds(value) for value in config.values()))


def _plain(value: Any) -> Any:
    """`value` with everything that JSON cannot say written as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and value == value and abs(value) != float("inf"):
        return value
    return f"{type(value).__name__}:{os.fspath(value) if isinstance(value, os.PathLike) else value}"


def _scales(caches: PagedCaches, spec: Any, layers: Mapping[str, Any]) -> str:
    """What `Space.kv_scales` says of a cache of this dtype."""
    if (
        getattr(spec.kv_quant_mode, "name", "NONE") == "NONE"
        and spec.dtype.is_floating_point
        and spec.dtype.itemsize > 1
    ):
        return ""
    found = {}
    for name in caches.layers:
        layer = layers[name]
        if getattr(layer, "calculate_kv_scales", False):
            raise Refused("scales that are calculated at run time differ between processes; turn their calculation off")
        found[name] = [float(getattr(layer, attribute)) for attribute in ("_k_scale_float", "_v_scale_float")]
    if all(scale == 1.0 for scales in found.values() for scale in scales):
        return UNIT_SCALES
    return config_digest(found)
