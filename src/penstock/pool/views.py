"""Zero-copy arrays over pool memory that keep what they show alive.

NumPy lets go of nothing: `memoryview.release()` succeeds while an array still points at the memory. So every array
handed out has a pin as its base; arrays and tensors derived from it refer to the pin, and the pin to what must live.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Pins"]


class _Pin:
    """The base of one array. Alive as long as anything derived from that array is."""

    __slots__ = ("__array_interface__", "__weakref__", "_owner", "label")

    def __init__(self, address: int, size: int, read_only: bool, owner: object, label: str) -> None:
        self.__array_interface__: dict[str, Any] = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, read_only),
            "version": 3,
        }
        self._owner = owner
        self.label = label


class Pins:
    """The views that one lease or reservation has given out."""

    __slots__ = ("_alive",)

    def __init__(self) -> None:
        self._alive: list[weakref.ref[_Pin]] = []

    def view(self, address: int, size: int, *, read_only: bool, owner: object, label: str) -> npt.NDArray[np.uint8]:
        """Bytes at `address` as a (size,) uint8 array; `owner` lives as long as the array or anything made from it."""
        pin = _Pin(address, size, read_only, owner, label)
        self._alive.append(weakref.ref(pin))
        return np.asarray(pin)

    def alive(self) -> list[str]:
        """Labels of the views that something still refers to."""
        pins = [pin for ref in self._alive if (pin := ref()) is not None]
        self._alive = [weakref.ref(pin) for pin in pins]
        return [pin.label for pin in pins]
