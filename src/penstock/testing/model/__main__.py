"""Explore everything and print a table: `python -m penstock.testing.model [mutation]`."""

from __future__ import annotations

import sys

from penstock.testing.model import incoherent
from penstock.testing.model.scenarios import MUTATIONS, SCENARIOS, explore


def main(wanted: list[str]) -> None:
    """Without arguments the table; with names of mutations or scenarios their results with traces."""
    for scenario in SCENARIOS:
        if not wanted or scenario in wanted:
            result = str(explore(scenario))
            print(f"{scenario:45} {result if wanted else result.splitlines()[0]}", flush=True)
    for mutation in MUTATIONS:
        if not wanted or mutation.name in wanted:
            removed = [name for name in (mutation.name, mutation.behind) if name]
            for sequential in (False, True):
                result = str(explore(mutation.scenario, *removed, sequential=sequential))
                label = " + ".join(removed) + (" (SC)" if sequential else "")
                print(f"{label:75} {result if wanted else result.splitlines()[0]}", flush=True)
    for scenario in incoherent.SCENARIOS:
        if not wanted or scenario in wanted:
            result = str(incoherent.explore(scenario))
            print(f"{scenario:75} {result if wanted else result.splitlines()[0]}", flush=True)
    for loss in incoherent.MUTATIONS:
        if not wanted or loss.name in wanted:
            result = str(incoherent.explore(loss.scenario, loss.name))
            print(f"{loss.name:75} {result if wanted else result.splitlines()[0]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
