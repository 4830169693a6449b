"""Where transfers queue up: a CUDA stream of their own, or the calling thread for memory of the CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

__all__ = ["CudaStream", "HostStream", "Passing", "Stream", "stream_for"]


class Passing(Protocol):
    """A point in a stream, as `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether everything before it is done. Does not block."""
        ...

    def synchronize(self) -> None:
        """Block until everything before it is done."""
        ...


class Stream(Protocol):
    """What a mover queues its work on."""

    def entered(self) -> AbstractContextManager[Any]:
        """Work queued inside begins after what the caller's current stream holds now: pages may still be in use."""
        ...

    def mark(self) -> Passing:
        """The point behind all that is queued."""
        ...

    def drain(self) -> None:
        """Block until nothing is queued."""
        ...

    def order(self, passing: Passing) -> None:
        """Let the caller's current stream wait for that point. Does not block."""
        ...


class CudaStream:
    """A stream of its own on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def entered(self) -> AbstractContextManager[Any]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)

    def mark(self) -> Passing:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def drain(self) -> None:
        self._stream.synchronize()

    def order(self, passing: Passing) -> None:
        assert isinstance(passing, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(passing)


class _Past:
    """A point that has been passed."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return


class HostStream:
    """No stream: copies within host memory are done when their call returns. For tests without a GPU."""

    def entered(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def mark(self) -> Passing:
        return _Past()

    def drain(self) -> None:
        return

    def order(self, passing: Passing) -> None:
        passing.synchronize()


def stream_for(device: torch.device) -> Stream:
    """A new stream of a device."""
    return CudaStream(device) if device.type == "cuda" else HostStream()
