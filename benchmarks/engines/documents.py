"""A long document, computed by one server and asked of another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.engines.client import Answer
from benchmarks.engines.systems import Server, System
from benchmarks.engines.traffic import fresh_prompt

__all__ = ["Documents", "ask_counting", "measure_documents", "rotated"]


@dataclass
class Documents:
    """One system's samples, one a document, all in the same order."""

    recompute_s: list[float] = field(default_factory=list)
    """TTFT of a document that this server never saw, without any hit."""
    cross_s: list[float] = field(default_factory=list)
    """TTFT of the document that the other server computed."""
    local_s: list[float] = field(default_factory=list)
    """TTFT of the same document asked of the same server again."""
    cross_tokens: list[int] = field(default_factory=list)
    local_tokens: list[int] = field(default_factory=list)
    cross_cpu_s: list[tuple[float, float]] = field(default_factory=list)
    """CPU time of all the system's processes for the cross-process request: until its answer, until they are at rest.
    vLLM's workers poll for a second after each step, which is in the second."""
    recompute_cpu_s: list[tuple[float, float]] = field(default_factory=list)
    same_tokens: list[bool] = field(default_factory=list)
    """Whether the answer after a hit has the first token of the answer without one. In bf16 it need not."""


def rotated(systems: Sequence[System], by: int) -> list[System]:
    """The systems in another order each time, so that none always comes first."""
    at = by % len(systems)
    return [*systems[at:], *systems[:at]]


def measure_documents(
    systems: Sequence[System], n_documents: int, n_tokens: int, say: Callable[[str], None]
) -> dict[str, Documents]:
    """Every system sees every document; systems take turns within a document."""
    samples = {system.name: Documents() for system in systems}
    for number in range(n_documents):
        for system in rotated(systems, number):
            _one(system, number, n_tokens, samples[system.name])
        cross = "  ".join(f"{name} {1000 * one.cross_s[-1]:.0f}" for name, one in samples.items())
        say(f"document {number + 1}/{n_documents}: TTFT in the other process, ms: {cross}")
    return samples


def _one(system: System, number: int, n_tokens: int, into: Documents) -> None:
    first, second = system.servers
    document = fresh_prompt(n_tokens, "document", number)
    computed = first.ask(document)
    system.settle()
    cross, cross_cpu_s = ask_counting(system, second, document)
    local = second.ask(document)
    system.settle()
    recompute, recompute_cpu_s = ask_counting(system, second, fresh_prompt(n_tokens, "other document", number))
    into.recompute_cpu_s.append(recompute_cpu_s)
    into.cross_cpu_s.append(cross_cpu_s)
    into.recompute_s.append(recompute.ttft_s)
    into.cross_s.append(cross.ttft_s)
    into.local_s.append(local.ttft_s)
    into.cross_tokens.append(cross.cached_tokens)
    into.local_tokens.append(local.cached_tokens)
    into.same_tokens.append(_first(cross) == _first(computed))


def ask_counting(
    system: System, server: Server, prompt: list[int], max_tokens: int = 4
) -> tuple[Answer, tuple[float, float]]:
    """An answer, and the CPU time of the whole system until it was complete and until the system is at rest again."""
    before = system.cpu_seconds()
    answer = server.ask(prompt, max_tokens)
    answered = system.cpu_seconds()
    system.settle()
    return answer, (answered - before, system.cpu_seconds() - before)


def _first(answer: Answer) -> int:
    return answer.tokens[0]
