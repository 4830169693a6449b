"""Traffic shaped like a conversation trace: one request at a time, the two servers of a system in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.engines.documents import ask_counting, rotated
from benchmarks.engines.systems import System
from benchmarks.engines.traffic import Turn, ideal_hits

__all__ = ["Turns", "hits_elsewhere", "measure_turns"]


@dataclass
class Turns:
    """One system's samples, one a request, in the traffic's order."""

    ttft_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    cached_tokens: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Of prompt and answer."""
    cpu_s: list[tuple[float, float]] = field(default_factory=list)
    """As of a document's requests."""


def measure_turns(systems: Sequence[System], turns: Sequence[Turn], say: Callable[[str], None]) -> dict[str, Turns]:
    """Every system sees every request; after each of them all that it does behind the answer ends first."""
    samples = {system.name: Turns() for system in systems}
    for number, turn in enumerate(turns):
        for system in rotated(systems, number):
            into = samples[system.name]
            server = system.servers[number % 2]
            answer, cpu_s = ask_counting(system, server, turn.prompt, turn.max_tokens)
            into.cpu_s.append(cpu_s)
            into.ttft_s.append(answer.ttft_s)
            into.total_s.append(answer.total_s)
            into.cached_tokens.append(answer.cached_tokens)
            into.tokens.append(answer.prompt_tokens + answer.output_tokens)
        if number % 10 == 9 or number + 1 == len(turns):
            hits = "  ".join(f"{name} {sum(one.cached_tokens)}" for name, one in samples.items())
            say(f"request {number + 1}/{len(turns)}: hit tokens so far: {hits}")
    return samples


def hits_elsewhere(turns: Sequence[Turn], cached_tokens: Sequence[int], block_tokens: int) -> int:
    """Hit tokens that the server that was asked had not seen in any request of its own."""
    total = 0
    for server in (0, 1):
        own = ideal_hits(turns[server::2], block_tokens)
        total += sum(max(0, cached - seen) for cached, seen in zip(cached_tokens[server::2], own))
    return total
