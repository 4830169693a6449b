"""A hit while other requests decode on the same server: loads inside the step that needs them, or beside steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from benchmarks.engines.client import ask
from benchmarks.engines.systems import Server, System
from benchmarks.engines.traffic import fresh_prompt

__all__ = ["DECODING", "Loaded", "measure_loaded"]

DECODING = 3
"""Requests that decode meanwhile."""
_DECODE_TOKENS = 4000
_BEGIN_S = 60.0


@dataclass
class Loaded:
    """TTFT of hits under load, by how they were loaded; the same documents in the same order."""

    sync_s: list[float] = field(default_factory=list)
    beside_s: list[float] = field(default_factory=list)
    sync_tokens: list[int] = field(default_factory=list)
    beside_tokens: list[int] = field(default_factory=list)


def measure_loaded(penstock: System, beside: System, n: int, n_tokens: int, say: Callable[[str], None]) -> Loaded:
    """Documents computed by the first server, then asked of the second and of the one that loads beside its steps."""
    samples = Loaded()
    for number in range(n):
        document = fresh_prompt(n_tokens, "loaded", number)
        penstock.servers[0].ask(document)
        penstock.settle()
        ways = [
            (penstock.servers[1], samples.sync_s, samples.sync_tokens),
            (beside.servers[0], samples.beside_s, samples.beside_tokens),
        ]
        for server, seconds, tokens in ways[:: 1 if number % 2 else -1]:
            with _decoding(server, number):
                answer = server.ask(document)
            seconds.append(answer.ttft_s)
            tokens.append(answer.cached_tokens)
            penstock.settle()
            beside.settle()
        say(
            f"under load {number + 1}/{n}: TTFT of a hit, ms: in the step {1000 * samples.sync_s[-1]:.0f}, "
            f"beside {1000 * samples.beside_s[-1]:.0f}"
        )
    return samples


@contextmanager
def _decoding(server: Server, number: int) -> Iterator[None]:
    """Requests that decode until the block ends."""
    enough = threading.Event()
    began = [threading.Event() for _ in range(DECODING)]

    def decode(at: int) -> None:
        ask(server.port, fresh_prompt(64, "decoding", number, at), _DECODE_TOKENS, began=began[at], enough=enough)

    threads = [threading.Thread(target=decode, args=(at,), daemon=True) for at in range(DECODING)]
    for thread in threads:
        thread.start()
    try:
        for event in began:
            if not event.wait(_BEGIN_S):
                raise RuntimeError(f"{server.process.name}: no first token of the requests that decode")
        yield
    finally:
        enough.set()
        for thread in threads:
            thread.join(_BEGIN_S)
