"""An explicit-state model of the pool's protocol: store buffers, deaths at every step, mutations that must be
found.

Covers leases, grants, commits, recovery, reclamation and wake-up; `docs/architecture.md` says what is left
out.
"""

from penstock.testing.model.explorer import Explorer, Result
from penstock.testing.model.scenarios import MUTATIONS, REDUNDANT, SCENARIOS, UNSOUND, Mutation, explore

__all__ = ["MUTATIONS", "REDUNDANT", "SCENARIOS", "UNSOUND", "Explorer", "Mutation", "Result", "explore"]
