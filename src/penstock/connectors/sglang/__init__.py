"""SGLang's HiCache on a Penstock pool: `--hicache-storage-backend dynamic` with this module and class.

SGLang keeps KV in the device's memory and in host memory of each process; this makes the pool the tier below, which
every process on the machine shares.
"""

from __future__ import annotations

from penstock.connectors.sglang.storage import PenstockStorage

__all__ = ["PenstockStorage"]
