"""The real kernels under a race of two processes on a few slots: nothing torn; and with any part of the protocol taken
out, torn reads. Which part is needed for what is in `docs/architecture.md`; `race.py` says how the race is run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import Scale
from tests.stress.mutants import MUTANTS
from tests.support import ROOT, environment

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a race needs two processors")

# What a mutant does wrong without any help from the processor's store buffers shows at once, everywhere.
CERTAIN = {"keeper's scan"}
# Compiling and starting, on a machine with other work.
OVERHEAD_S = 120


def race(mutant: str, slots: int, seconds: float) -> dict[str, Any]:
    """One race; a mutant's ends at its first torn reads."""
    command = [sys.executable, "-m", "tests.stress.race", "--seconds", str(seconds), "--slots", str(slots), mutant]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=seconds + OVERHEAD_S
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    print(result)
    return result


@pytest.mark.parametrize(("real", "slots"), [("", 2), ("", 4), ("apart", 2)])
def test_nothing_is_torn(real: str, slots: int) -> None:
    result = race(real, slots, 3)
    assert result["reads"] > 0 and result["evicted"] > 0
    assert result["torn"] == 0


@pytest.mark.parametrize("mutant", sorted(MUTANTS))
def test_every_part_is_needed(mutant: str, scale: Scale) -> None:
    result = race(mutant, 2 if mutant == "writer's sfence" else 4, scale.of(15, 60))
    if mutant not in CERTAIN and not result["torn"]:
        pytest.skip(f"not shown on this machine within the time: without the {mutant} nothing was torn in {result}")
    assert result["torn"] > 0


@pytest.mark.faults
@pytest.mark.parametrize("slots", [2, 3, 8, 16])
@pytest.mark.parametrize("real", ["", "apart"])
def test_nothing_is_torn_at_length(real: str, slots: int, scale: Scale) -> None:
    if not scale.full:
        pytest.skip("PENSTOCK_TEST_SCALE=full runs it")
    result = race(real, slots, 20)
    assert result["reads"] > 0 and result["evicted"] > 0
    assert result["torn"] == 0
