"""The interface of a policy: in which order blocks leave.

A policy owns its ordering state and nothing else. It reads and changes the facts only through
`facts.apply_event` (once for every event, in order) and `facts.pick` (once for every victim), and never
sees bytes, threads or wall time. The suite every policy has to pass is
`penstock.testing.policies.PolicySuite`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from penstock.policies.facts import Facts, Words

__all__ = ["Policy"]


class Policy(ABC):
    """One policy's state over `facts`, which it shares with the brain. Nothing here blocks."""

    name: ClassVar[str]
    """As in `Brain(policy=...)`."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts

    @abstractmethod
    def observe(self, events: Words, now: int) -> int:
        """Apply the events, `event_dtype` as words [n, EVENT_WORDS], one after the other.

        Returns how many were applied: fewer than n if the one after them is illegal, and that one changed
        nothing.
        """

    @abstractmethod
    def victims(self, slot_class: int, n: int, out: Words) -> int:
        """Pick up to n resident, unpicked blocks of the class into `out`, children first; returns how many.

        Returns fewer than n only if no unpicked block of the class is left. A picked block is out of the
        order until an event answers it.
        """

    @abstractmethod
    def restore(self, units: NDArray[np.int64]) -> None:
        """Build the order anew for blocks that are in the facts already, given from oldest to newest use."""

    @abstractmethod
    def assert_consistent(self) -> None:
        """Raise ConsistencyError unless each resident, unpicked block is in the order exactly once."""

    def admit(self, events: NDArray[np.void]) -> NDArray[np.bool_]:
        """[n]: which of these blocks, not yet committed, are worth a slot. All of them unless a policy
        overrides it.
        """
        return np.ones(len(events), np.bool_)
