"""Host memory that the GPU can read and write by address: pinned and mapped through the CUDA runtime.

Covers one registration for each range of a process, counted, in pieces. Registering touches and pins every page:
all of a pool's data, also where nothing was stored yet, is in memory from then until the last close.
The device uses the host's own addresses (unified addressing), which 64-bit Linux has.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from penstock.errors import ConfigError, NoSpaceLeft, PenstockError, PoolClosed
from penstock.pool.client import Pool

__all__ = ["CudaHost", "HostRuntime", "Registration", "register", "register_pool"]

# cudaHostRegisterPortable | cudaHostRegisterMapped: for every context of the process, and readable by kernels.
_FLAGS = 0x01 | 0x02
_OUT_OF_MEMORY, _ALREADY_REGISTERED, _NOT_SUPPORTED = 2, 712, 801
# One call pins everything it is given or nothing; a piece bounds what a failure has to undo.
_PIECE_BYTES = 16 << 30


class HostRuntime(Protocol):
    """What registers memory: the CUDA runtime, or a stand-in for tests. Codes are CUDA's, 0 is success."""

    def register(self, address: int, n_bytes: int) -> int:
        """Pin and map a range."""
        ...

    def unregister(self, address: int) -> int:
        """Undo the registration that starts there. The device must be done with it."""
        ...

    def describe(self, code: int) -> str:
        """The text of a code."""
        ...


class CudaHost:
    """The CUDA runtime that PyTorch carries. Raises ConfigError where it has none or sees no GPU."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
            raise ConfigError(
                f"no CUDA device: PyTorch {torch.__version__} was built {built}. Install a CUDA build of PyTorch, and "
                "look whether nvidia-smi lists a GPU here"
            )
        torch.cuda.init()  # type: ignore[no-untyped-call]
        self._runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]

    def register(self, address: int, n_bytes: int) -> int:
        code = int(self._runtime.cudaHostRegister(address, n_bytes, _FLAGS))
        if code:
            _clear_last_error()
        return code

    def unregister(self, address: int) -> int:
        # A queued copy would go on reading what is about to be unpinned.
        torch.cuda.synchronize()
        code = int(self._runtime.cudaHostUnregister(address))
        if code:
            _clear_last_error()
        return code

    def describe(self, code: int) -> str:
        return str(self._runtime.cudaGetErrorString(self._runtime.cudaError(code)))


def _clear_last_error() -> None:
    """The runtime remembers a failed call, and PyTorch would raise it from the next launch, wherever that is."""
    try:
        torch.zeros(1, device="cuda").add_(1)
    except RuntimeError:
        return


@dataclass(slots=True)
class _Standing:
    """A registered range. The array keeps it mapped."""

    array: npt.NDArray[np.uint8]
    runtime: HostRuntime
    pieces: list[int] = field(default_factory=list)
    """Where each registered piece starts."""
    users: int = 0


_lock = threading.Lock()
_standing: dict[tuple[int, int], _Standing] = {}


class Registration:
    """One user's share in a registered range; the range is given up when the last share is closed.

    Close it (or leave its `with` block) after the transfers that use it have ended. Thread-safe.
    """

    __slots__ = ("_key", "_open", "address", "n_bytes", "tensor")

    def __init__(self, key: tuple[int, int], array: npt.NDArray[np.uint8]) -> None:
        self._key = key
        self._open = True
        self.address, self.n_bytes = key
        self.tensor = torch.from_numpy(array)
        """The range, (n_bytes,) uint8."""

    def require(self, addresses: npt.NDArray[np.int64], n_bytes: int) -> None:
        """Raise unless `n_bytes` from each address are registered: PoolClosed after close, ConfigError elsewhere."""
        if not self._open:
            raise PoolClosed("the registration was closed; register the pool again")
        if not len(addresses):
            return
        least, most = int(addresses.min()), int(addresses.max()) + n_bytes
        if least < self.address or most > self.address + self.n_bytes:
            raise ConfigError(
                "a slot lies outside the registered memory: the pool has attached to another segment since. Close this "
                "registration and register the pool again"
            )

    def close(self) -> None:
        """Give this share up. Idempotent. Raises ConfigError if the runtime does not let go of the memory."""
        with _lock:
            if not self._open:
                return
            self._open = False
            standing = _standing.get(self._key)
            if standing is None:  # in a forked child: the parent's
                return
            standing.users -= 1
            if standing.users:
                return
            del _standing[self._key]
            _unregister(standing)

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def register(
    array: npt.NDArray[np.uint8], *, piece_bytes: int = _PIECE_BYTES, runtime: HostRuntime | None = None
) -> Registration:
    """Register the bytes of a writable, contiguous array, or take a further share in them.

    No single transfer may cross from one piece into the next. All or nothing. Raises NoSpaceLeft when the memory cannot
    be pinned, ConfigError for everything else; the text names the remedy.
    """
    if array.dtype != np.uint8 or array.ndim != 1 or not array.flags.c_contiguous or not array.flags.writeable:
        raise ConfigError("register a writable, contiguous one-dimensional uint8 array")
    if not array.size or piece_bytes < 1:
        raise ConfigError(f"{array.size} bytes in pieces of {piece_bytes}: there is nothing to register")
    key = (array.ctypes.data, array.size)
    with _lock:
        standing = _standing.get(key)
        if standing is None:
            standing = _Standing(array, runtime if runtime is not None else CudaHost())
            _register(standing, piece_bytes)
            _standing[key] = standing
        standing.users += 1
    return Registration(key, array)


def register_pool(pool: Pool, *, piece_bytes: int = _PIECE_BYTES, runtime: HostRuntime | None = None) -> Registration:
    """Register the data of a pool's present segment. Raises as `register` does."""
    at = pool._at
    # A slot lies in one slab, so that pieces of whole slabs cut none.
    slab_bytes = at.geometry.slab_bytes
    return register(at.data.array, piece_bytes=max(1, piece_bytes // slab_bytes) * slab_bytes, runtime=runtime)


def _register(standing: _Standing, piece_bytes: int) -> None:
    address, n_bytes = standing.array.ctypes.data, standing.array.size
    try:
        for start in range(0, n_bytes, piece_bytes):
            size = min(piece_bytes, n_bytes - start)
            code = standing.runtime.register(address + start, size)
            if code:
                raise _refusal(code, standing.runtime.describe(code), size)
            standing.pieces.append(address + start)
    except BaseException:
        for piece in standing.pieces:
            standing.runtime.unregister(piece)
        raise


def _unregister(standing: _Standing) -> None:
    codes = [standing.runtime.unregister(piece) for piece in standing.pieces]
    if failed := [code for code in codes if code]:
        raise ConfigError(
            f"{len(failed)} of {len(codes)} pieces of pinned memory could not be unregistered "
            f"({standing.runtime.describe(failed[0])}): end the process to give them back"
        )


def _refusal(code: int, text: str, n_bytes: int) -> PenstockError:
    what = f"{n_bytes >> 20} MiB of the pool cannot be pinned for the GPU ({text}, CUDA error {code})"
    if code == _OUT_OF_MEMORY:
        return NoSpaceLeft(
            f"{what}: give the keeper a smaller --size, raise the locked-memory limit (`ulimit -l unlimited`, "
            "`docker run --ulimit memlock=-1`), or free memory"
        )
    if code == _ALREADY_REGISTERED:
        return ConfigError(f"{what}: something else in this process registered it; let only Penstock register the pool")
    if code == _NOT_SUPPORTED:
        return ConfigError(f"{what}: this driver cannot pin such memory; put the pool into /dev/shm (no --path)")
    return ConfigError(f"{what}: restart the process if the GPU failed before; `nvidia-smi` says how it is")


def _after_fork() -> None:
    """A child has neither the parent's CUDA context nor its registrations."""
    global _lock
    _lock = threading.Lock()
    _standing.clear()


os.register_at_fork(after_in_child=_after_fork)
