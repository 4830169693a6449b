"""Adapters on a model (PEFT), told apart from its own weights by what the model looks like in memory.

A model with an adapter loaded but switched off computes what it computes without it, and one that has three
loaded computes what the active one says: so the weights and the active adapters are digested apart, and names
that the owner chose (of adapters, of folders) count for nothing. Follows PEFT's layer protocol
(`adapter_layer_names`, `active_adapters`, `merged_adapters` of `BaseTunerLayer` and of the wrappers of
`modules_to_save`) without importing PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from penstock.errors import Refused

__all__ = ["Stamp", "active_settings", "adapter_stamp", "check_adapters", "merged_stamp", "split_tensors"]

Stamp = tuple[Any, ...]

# What an adapter's configuration says about where it came from and how it was trained.
_ORIGIN = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
)


def check_adapters(model: Any) -> None:
    """Refused for adapters whose effect is more than the weights that a block's tokens pass through."""
    configs = getattr(model, "peft_config", None) or {}
    for config in configs.values():
        if getattr(config, "is_prompt_learning", False):
            raise Refused("prompt tuning puts virtual tokens before the first one, which keys do not name")
        if getattr(config, "alora_invocation_tokens", None):
            raise Refused("an activated LoRA looks for its invocation in the whole request, also in what was loaded")
    if configs and not _tuners(model):
        raise Refused("the model has a peft_config but no PEFT layers: its adapter cannot be told from its weights")


def adapter_stamp(model: Any) -> Stamp:
    """Which adapters of which layers are at work, and at what scale; compared, never stored."""
    return tuple((name, tuple(_active(tuner)), _merged(tuner), _scales(tuner)) for name, tuner in _tuners(model))


def merged_stamp(model: Any) -> Stamp:
    """Which adapters lie in the weights now. PEFT merges through `.data`, which no version counter shows."""
    return tuple((name, _merged(tuner)) for name, tuner in _tuners(model))


def split_tensors(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The model's own parameters and buffers under the names they have without adapters, and the tensors of
    the active adapters. An adapter that is merged lies in the weights and is not listed."""
    owners = {
        f"{name}.{part}.": (name, part, tuner) for name, tuner in _tuners(model) for part in tuner.adapter_layer_names
    }
    base: dict[str, torch.Tensor] = {}
    active: dict[str, torch.Tensor] = {}
    for name, tensor in _named_tensors(model):
        owner = next((prefix for prefix in owners if name.startswith(prefix)), None) if owners else None
        if owner is None:
            base[_plain_name(name)] = tensor
            continue
        layer, part, tuner = owners[owner]
        adapter, _, rest = name.removeprefix(owner).partition(".")
        order = _active(tuner)
        if adapter in order:
            active[f"{order.index(adapter)}:{_plain_name(layer)}.{part}.{rest}"] = tensor
    return base, active


def active_settings(model: Any) -> dict[str, Any]:
    """The configurations and scales of the active adapters, in plain values; empty without any."""
    settings: dict[str, Any] = {}
    configs = getattr(model, "peft_config", None) or {}
    for name, tuner in _tuners(model):
        for place, adapter in enumerate(_active(tuner)):
            settings[f"scale {place}:{_plain_name(name)}"] = repr(_scale(tuner, adapter))
            if adapter in configs:
                settings[f"config {place}:{_plain_name(name)}"] = _plain_config(configs[adapter])
    return settings


def _tuners(model: Any) -> list[tuple[str, Any]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if getattr(type(module), "adapter_layer_names", ()) and hasattr(module, "active_adapters")
    ]


def _active(tuner: Any) -> list[str]:
    """Adapters that this layer applies on top of its weights, in order."""
    if getattr(tuner, "disable_adapters", False) or _merged(tuner):
        return []
    return list(tuner.active_adapters)


def _merged(tuner: Any) -> tuple[str, ...]:
    return tuple(getattr(tuner, "merged_adapters", ()))


def _scales(tuner: Any) -> Stamp:
    return tuple((adapter, repr(_scale(tuner, adapter))) for adapter in _active(tuner))


def _scale(tuner: Any, adapter: str) -> Any:
    scaling = getattr(tuner, "scaling", None)
    return scaling.get(adapter) if isinstance(scaling, Mapping) else None


def _plain_config(config: Any) -> dict[str, str]:
    values: dict[str, Any] = config.to_dict()
    return {
        key: repr(sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)
        for key, value in values.items()
        if key not in _ORIGIN
    }


def _named_tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Buffers too, also those that are not saved: rope frequencies are among them."""
    return [*model.named_parameters(), *model.named_buffers()]


def _plain_name(name: str) -> str:
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer", "").replace(".original_module", "")
