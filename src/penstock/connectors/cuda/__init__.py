"""Blocks between a pool's slots and paged KV tensors on a GPU: a library for connectors.

    with register_pool(pool) as memory, Mover(memory, "cuda") as mover:
        transfer = mover.gather(lease, handle, tensors)   # the lease is the transfer's from here on
        transfer.wait()                                   # or done(), or order(stream)
        usable = transfer.good

`registration.py` makes the pool's memory known to the driver, `kernels.py` moves all pieces in one launch, `copies.py`
moves them with the copy engine and says which of the two is chosen, `movers.py` puts that together and `transfers.py`
holds the lease until the device is done. Does not cover which pages an engine gives to which block: the caller's
`TensorMap` says so, and its page numbers are not checked here.

PyTorch is needed when this is imported, Triton when the fused kernel runs first; without it everything goes through the
copy engine.
"""

from __future__ import annotations

from penstock.connectors.cuda.copies import Limits, measure_limits
from penstock.connectors.cuda.movers import Mover
from penstock.connectors.cuda.registration import Registration, register, register_pool
from penstock.connectors.cuda.transfers import Transfer

__all__ = ["Limits", "Mover", "Registration", "Transfer", "measure_limits", "register", "register_pool"]
