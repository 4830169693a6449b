"""Makes SGLang's storage classes importable without a GPU.

They import half of the engine, which imports `torchvision` for its image models. Its default build does not load
beside the CPU build of PyTorch, so an empty module stands in for it: nothing that is tested here calls it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings


class _Empty(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def prepare() -> bool:
    """Import the classes, with their warnings silenced. False where SGLang is not installed."""
    if importlib.util.find_spec("sglang") is None:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "torchvision" not in sys.modules and not _works("torchvision"):
            from transformers.utils import is_torchvision_available

            # Asked first, and remembered: transformers must not take the stand-in for the real thing.
            is_torchvision_available()
            for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
                sys.modules[name] = _Empty(name)
        for name in ("memory_pool", "pool_host", "storage.backend_factory"):
            importlib.import_module(f"sglang.srt.mem_cache.{name}")
        importlib.import_module("sglang.srt.managers.cache_controller")
    return True


def _works(module: str) -> bool:
    try:
        importlib.import_module(module)
    except (ImportError, RuntimeError):
        return False
    return True
