"""Traffic in which nothing is ever asked twice: what a connector costs where it cannot help."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.engines.systems import System
from benchmarks.engines.times import ConnectorTimes, read_times
from benchmarks.engines.traffic import fresh_prompt

__all__ = ["AT_ONCE", "OUTPUT_TOKENS", "PROMPT_TOKENS", "Fresh", "measure_fresh"]

AT_ONCE, PROMPT_TOKENS, OUTPUT_TOKENS = 4, 1000, 48
_PEERS_EVERY = 4
"""Peers' numbers are for information: they take part in every fourth round."""


@dataclass
class Fresh:
    """One system's samples: tokens a second by round, and the connector's CPU time by round where it is measured."""

    tokens_per_s: dict[int, float] = field(default_factory=dict)
    times: list[ConnectorTimes] = field(default_factory=list)


def measure_fresh(systems: Sequence[System], n_rounds: int, say: Callable[[str], None]) -> dict[str, Fresh]:
    """In each round a batch of fresh requests to the first server of each system. Penstock and no connector are
    neighbours in every round, in an order that changes."""
    samples = {system.name: Fresh() for system in systems}
    pair = [system for system in systems if system.name in ("none", "penstock")]
    peers = [system for system in systems if system not in pair]
    for number in range(n_rounds):
        order = pair[:: 1 if number % 2 else -1]
        for system in [*order, *(peers if number % _PEERS_EVERY == 0 else ())]:
            _round(system, number, samples[system.name])
        if number % 8 == 7 or number + 1 == n_rounds:
            speeds = "  ".join(f"{name} {list(one.tokens_per_s.values())[-1]:.0f}" for name, one in samples.items())
            say(f"round {number + 1}/{n_rounds}: tokens/s without reuse: {speeds}")
    return samples


def _round(system: System, number: int, into: Fresh) -> None:
    prompts = [fresh_prompt(PROMPT_TOKENS, "fresh", number, at) for at in range(AT_ONCE)]
    before = read_times(system.times_folder) if system.times_folder else None
    seconds = _all_at_once(system, prompts)
    into.tokens_per_s[number] = AT_ONCE * (PROMPT_TOKENS + OUTPUT_TOKENS) / seconds
    system.settle()
    if before is not None and system.times_folder is not None:
        into.times.append(read_times(system.times_folder) - before)


def _all_at_once(system: System, prompts: list[list[int]]) -> float:
    """Seconds until the last of them is answered. Raises what a request raised."""
    server, failures = system.servers[0], list[Exception]()

    def run(prompt: list[int]) -> None:
        try:
            server.ask(prompt, OUTPUT_TOKENS)
        except RuntimeError as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(prompt,)) for prompt in prompts]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if failures:
        raise failures[0]
    return seconds
