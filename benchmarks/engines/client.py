"""One streamed completion, and how long its first token took."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Answer", "ask", "healthy"]

MODEL_NAME = "model"
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Answer:
    """What came back."""

    ttft_s: float
    """From sending the request to its first token."""
    total_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    """Prompt tokens that the engine says it did not compute."""
    tokens: tuple[int, ...]


def ask(
    port: int,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    began: threading.Event | None = None,
    enough: threading.Event | None = None,
) -> Answer | None:
    """A greedy completion of exactly `max_tokens` tokens. Raises RuntimeError if the server refuses or breaks off.

    Sets `began` at the first token. Hangs up, and returns None, at the first token after `enough` was set.
    """
    body = json.dumps({
        "model": MODEL_NAME, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True, "stream": True, "stream_options": {"include_usage": True},
    })  # fmt: skip
    tokens: list[int] = []
    usage = None
    first_s = 0.0
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    with contextlib.closing(connection):
        started = time.perf_counter()
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"HTTP {answer.status}: {answer.read()[:500]!r}")
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(f"the stream said {chunk['error']}")
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                got = choice.get("token_ids") or ()
                if got and not tokens:
                    first_s = time.perf_counter() - started
                    if began is not None:
                        began.set()
                tokens.extend(got)
            if enough is not None and enough.is_set():
                return None
        total_s = time.perf_counter() - started
    if usage is None or not tokens:
        raise RuntimeError("the stream broke off")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Answer(first_s, total_s, usage["prompt_tokens"], len(tokens), cached, tuple(tokens))


def healthy(port: int) -> bool:
    """Whether the server answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
