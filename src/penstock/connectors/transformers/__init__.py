"""The connector for decoder-only transformers models with ordinary attention, on the CPU.

`Connector` refuses, with the reason, every model that it could not store block by block.
"""

from __future__ import annotations

from penstock.connectors.transformers.connector import (
    Connector,
    FetchMode,
    GenerationResult,
    Loaded,
    RequestOptions,
)

__all__ = ["Connector", "FetchMode", "GenerationResult", "Loaded", "RequestOptions"]
