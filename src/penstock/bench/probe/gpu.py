"""The links of a GPU, through torch: pinned host memory to the device and back, and within the device.

Imported by name only where a GPU and torch are (`targets.py`), because importing torch takes seconds. Times are by the
host's clock around the copy and a wait for the device, so that latency is what a caller sees. One stream: links that
run both ways at once are measured one way at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from penstock.bench.probe.base import CannotMeasure, Plan, Subject, Timing, sample
from penstock.config import memory_limit_bytes
from penstock.profile import Direction

__all__ = ["GpuLink", "devices"]

_RUN_BYTES = 256 << 20
_RUN = 32


class GpuLink(Subject):
    """One GPU by its number."""

    directions = (Direction.TO_DEVICE, Direction.FROM_DEVICE, Direction.COPY)

    def __init__(self, index: int) -> None:
        super().__init__()
        self._index = index
        self.name = f"gpu:{index}"

    @contextmanager
    def opened(self, plan: Plan) -> Iterator[None]:
        import torch

        size = plan.sizes[-1]
        if size > memory_limit_bytes() // 4:
            raise CannotMeasure(f"{size >> 20} MiB of host memory cannot be pinned; name smaller --sizes")
        device = torch.device("cuda", self._index)
        self._buffers: dict[str, Any] = {}
        try:
            self._buffers["host"] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            for name in ("from", "to"):
                self._buffers[name] = torch.zeros(size, dtype=torch.uint8, device=device)
            self._wait: Callable[[], None] = lambda: torch.cuda.synchronize(device)
            self.notes.append(torch.cuda.get_device_name(device))
            yield
        except (
            RuntimeError,
            AssertionError,
        ) as error:  # what torch raises for all that a device, or its build, refuses
            raise CannotMeasure(f"torch: {str(error).splitlines()[0]}") from error
        finally:
            self._buffers.clear()

    def time(self, direction: Direction, size: int, point_s: float) -> Timing | None:
        source, target = {
            Direction.TO_DEVICE: ("host", "to"),
            Direction.FROM_DEVICE: ("from", "host"),
            Direction.COPY: ("from", "to"),
        }[direction]
        into, out_of = self._buffers[target][:size], self._buffers[source][:size]
        count = max(1, min(_RUN, _RUN_BYTES // size))

        def copies(n: int) -> Callable[[], None]:
            def call() -> None:
                for _ in range(n):
                    into.copy_(out_of, non_blocking=True)
                self._wait()

            return call

        return Timing(sample(copies(1), point_s / 2), count, sample(copies(count), point_s / 2))


def devices() -> int:
    """How many GPUs torch can use; imports torch. A torch that cannot be imported uses none."""
    try:
        import torch
    except (ImportError, OSError):
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
