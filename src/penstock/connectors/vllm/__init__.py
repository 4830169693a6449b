"""The connector for vLLM: KV blocks shared by every vLLM process of a machine.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "PenstockConnector",
        "kv_connector_module_path": "penstock.connectors.vllm", "kv_role": "kv_both"}'

vLLM itself is imported when `PenstockConnector` is asked for. `docs/vllm.md` says how to use it; `scheduler.py` and
`worker.py` are its two halves, which run in different processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.connectors.vllm.connector import PenstockConnector

__all__ = ["PenstockConnector"]


def __getattr__(name: str) -> Any:
    if name != "PenstockConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from penstock.connectors.vllm.versions import check_version

    check_version()
    from penstock.connectors.vllm.connector import PenstockConnector

    return PenstockConnector
