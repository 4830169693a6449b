"""The space of a SGLang rank: which other processes' pages it may use, and which models are refused.

SGLang tells a storage backend its ranks and a name; what is behind the name is read from the settings that the
engine's process has published. Covers the weights' identity and what page hashes do not say. Does not cover the
layout of a page (`hostpool.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang.srt.runtime_context import get_server_args

from penstock.connectors.sglang.hostpool import HostPages
from penstock.connectors.sglang.options import Options, engine_version
from penstock.errors import ConfigError, Refused
from penstock.identity import Rank, Space, config_digest, weight_files, weights_digest

__all__ = ["ModelIdentity", "identify_model", "space_of"]

# Settings that change what tokens' keys and values are, whatever the files say.
_COMPUTE = ("dtype", "json_model_override_args", "kv_cache_dtype", "modelopt_quant", "quantization")
_UNRELATED = ("_name_or_path", "transformers_version")
_QUANTISED_REMEDY = (
    '"unit" if SGLang said that it uses scale 1, "checkpoint" if they come with the weights, or the digest of the '
    "file given as --quantization-param-path"
)


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What the KV of a model depends on, apart from ranks and layout."""

    weights: str
    config: Mapping[str, Any]
    engine: str


def identify_model(options: Options) -> ModelIdentity:
    """The identity of the model that this engine process serves. Reads the weights once per machine.

    Raises Refused for settings under which equal page hashes would not mean equal KV, ConfigError for an identity
    that cannot be found.
    """
    engine = f"sglang/{engine_version()}"
    settings = _settings()
    _check_adapters(settings)
    folder = _model_path(settings, required=not options.weights)
    config = _model_config(folder)
    _check_text_only(config)
    compute = {name: getattr(settings, name, None) for name in _COMPUTE}
    return ModelIdentity(
        weights=options.weights or _weights_of(folder),
        config={"model": config, "settings": _plain(compute)},
        engine=engine,
    )


def space_of(model: ModelIdentity, pages: HostPages, storage_config: Any, options: Options, epoch: int) -> Space:
    """The space of this rank's pages. Raises ConfigError where scales of a quantised KV cache are not known, Refused
    for ranks that share pages in a way that penstock does not know."""
    if storage_config.should_split_heads or storage_config.dcp_size != 1:
        raise Refused(
            "pages split for other tensor-parallel sizes (tp_lcm_size) and decode context parallelism are not "
            "supported: leave both out"
        )
    # MLA pages are the same on every rank: rank 0 writes them and all read them.
    tensor_rank = 0 if storage_config.is_mla_model else storage_config.tp_rank
    return Space(
        weights=model.weights,
        config=config_digest({**model.config, "geometry": list(pages.geometry)}),
        engine=model.engine,
        layout=pages.layout,
        dtype=pages.dtype,
        block_tokens=pages.page_size,
        n_segments=pages.n_segments,
        segment_bytes=pages.segment_bytes,
        kv_scales=_kv_scales(pages.dtype, model, options),
        tensor_rank=Rank(tensor_rank, storage_config.tp_size),
        pipeline_rank=Rank(storage_config.pp_rank, storage_config.pp_size),
        context_rank=Rank(storage_config.attn_cp_rank, storage_config.attn_cp_size),
        tenant=options.tenant,
        epoch=epoch,
    )


def _settings() -> Any:
    try:
        return get_server_args()
    except ValueError as error:
        raise Refused(
            f"SGLang has published no settings in this process ({error}): without them nobody knows whether adapters "
            "or overrides are in use. Let SGLang itself create the backend: --hicache-storage-backend dynamic"
        ) from error


def _check_adapters(settings: Any) -> None:
    if settings.enable_lora or settings.lora_paths or getattr(settings, "uno_lora_path", None):
        raise Refused(
            "LoRA is not supported: SGLang's page hashes name an adapter by its name and path, not by its content, so "
            "pages of a replaced adapter could be taken for the new one's. Serve adapters without "
            "--hicache-storage-backend"
        )
    if settings.load_format == "dummy":
        raise Refused("--load-format dummy makes up weights that no file describes: their KV is of no use elsewhere")


def _check_text_only(config: Mapping[str, Any]) -> None:
    modal = sorted(key for key in ("vision_config", "audio_config", "thinker_config") if config.get(key))
    if modal:
        raise Refused(
            f"multimodal models ({', '.join(modal)}) are not supported: SGLang's page hashes name an image by 64 bits "
            "of its hash, too few to share between tenants. Serve this model without --hicache-storage-backend"
        )


def _model_path(settings: Any, *, required: bool) -> Path | None:
    """The model's folder or file; looked up in the local Hugging Face cache for an id of the hub."""
    path = Path(settings.model_path)
    if path.exists():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(settings.model_path, revision=settings.revision, local_files_only=True))
    except Exception as error:
        if not required:
            return None
        raise ConfigError(
            f"the files of {settings.model_path!r} are not on this machine ({type(error).__name__}): give "
            '--model-path a folder, or name the weights by a digest, "weights": "sha256:<64 hex digits>", in '
            "--hicache-storage-backend-extra-config"
        ) from error


def _weights_of(path: Path | None) -> str:
    assert path is not None
    return weights_digest(weight_files(path) if path.is_dir() else [path])


def _model_config(path: Path | None) -> Mapping[str, Any]:
    """The model's config.json; empty where there is none, as beside a single file, which holds its own."""
    file = None if path is None or not path.is_dir() else path / "config.json"
    if file is None or not file.is_file():
        return {}
    config = json.loads(file.read_text())
    if not isinstance(config, dict):
        raise ConfigError(f"{file} holds no JSON object: it is not a model's configuration")
    return {key: value for key, value in config.items() if key not in _UNRELATED}


def _plain(settings: Mapping[str, Any]) -> dict[str, str]:
    """As text: an option may hold anything, and only whether it differs counts."""
    return {name: "" if value is None else str(value) for name, value in settings.items()}


def _kv_scales(dtype: str, model: ModelIdentity, options: Options) -> str:
    quantised = dtype not in {"bfloat16", "float16", "float32", "float64"}
    if not quantised:
        if options.kv_scales:
            raise ConfigError(f"kv_scales={options.kv_scales!r} for an unquantised KV cache of {dtype}: leave it out")
        return ""
    if not options.kv_scales:
        raise ConfigError(
            f"the KV cache is quantised ({dtype}) and SGLang does not tell a storage backend its scales: set "
            f"kv_scales in --hicache-storage-backend-extra-config to {_QUANTISED_REMEDY}. Scales calculated at run "
            "time cannot be shared: set --kv-cache-dtype bfloat16"
        )
    return model.weights if options.kv_scales == "checkpoint" else options.kv_scales
