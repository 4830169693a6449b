"""Requests to a test's vLLM server: completions, streamed or not, one or many at once, and its metrics.

Standard library only, so that the collection of these tests needs nothing that only the engine brings.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tests.engines.server import MODEL_NAME, VllmServer

# A guard against hangs: a prompt of 8,000 tokens on a busy core takes some seconds.
REQUEST_S = 120.0
Prompt = str | Sequence[int]


class RequestFailed(AssertionError):
    """The server answered with an error."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"HTTP {status}: {body[:2000]}")
        self.status = status
        self.body = body


@dataclass(frozen=True)
class Completion:
    """An answer. With `n` > 1 the tokens, text and reason are the first choice's; `choices` has all tokens."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: str | None
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that were not computed: the engine's own prefix hit and what a connector brought."""
    logprobs: tuple[float, ...]
    """Of each token, where the request asked for `logprobs`."""
    top_logprobs: tuple[dict[str, float], ...]
    choices: tuple[tuple[int, ...], ...]
    request_id: str
    ttft_s: float
    """From sending the request to its first token; the whole time where the answer was not streamed."""
    total_s: float
    raw: dict[str, Any] = field(repr=False)
    """The answer's JSON; a streamed one's last chunk that had a choice, with the usage."""


def complete(
    server: VllmServer, prompt: Prompt, max_tokens: int = 16, *, headers: Mapping[str, str] | None = None, **extra: Any
) -> Completion:
    """A greedy completion of a text or of token ids; exactly `max_tokens` tokens. `extra` goes into the body.

    Raises RequestFailed if the server refuses.
    """
    started = time.monotonic()
    with _post(server, _body(prompt, max_tokens, extra), headers) as answer:
        raw = json.loads(answer.read())
    total_s = time.monotonic() - started
    choices = sorted(raw["choices"], key=lambda choice: choice["index"])
    return _completion(raw, choices, total_s, total_s)


def stream(
    server: VllmServer, prompt: Prompt, max_tokens: int = 16, *, headers: Mapping[str, str] | None = None, **extra: Any
) -> Completion:
    """The same, streamed, with the time to the first token. A single choice."""
    assert extra.get("n", 1) == 1, "one choice a stream"
    started = time.monotonic()
    chunks: list[tuple[float, dict[str, Any]]] = []
    with _post(server, _streamed(_body(prompt, max_tokens, extra)), headers) as answer:
        chunks.extend((time.monotonic() - started, chunk) for chunk in events(answer))
    with_choice = [(at, chunk) for at, chunk in chunks if chunk["choices"]]
    parts = [chunk["choices"][0] for _, chunk in with_choice]
    usage = next(chunk["usage"] for _, chunk in reversed(chunks) if chunk.get("usage"))
    choice = {
        **parts[-1],
        "token_ids": [token for part in parts for token in part.get("token_ids") or ()],
        "text": "".join(part["text"] for part in parts),
        "logprobs": _joined([part["logprobs"] for part in parts if part.get("logprobs")]),
    }
    first = next((at for at, chunk in with_choice if chunk["choices"][0].get("token_ids")), chunks[-1][0])
    return _completion({**with_choice[-1][1], "usage": usage}, [choice], first, chunks[-1][0])


@contextlib.contextmanager
def open_stream(
    server: VllmServer, prompt: Prompt, max_tokens: int = 16, *, headers: Mapping[str, str] | None = None, **extra: Any
) -> Iterator[Iterator[dict[str, Any]]]:
    """The chunks of a streamed completion as they come. Leaving early hangs up: the server aborts the request."""
    with _post(server, _streamed(_body(prompt, max_tokens, extra)), headers) as answer:
        yield events(answer)


def complete_all(
    server: VllmServer | Sequence[VllmServer],
    prompts: Sequence[Prompt],
    max_tokens: int = 16,
    *,
    streamed: bool = False,
    at_once: int = 32,
    **extra: Any,
) -> list[Completion]:
    """Completions of all prompts, `at_once` at the same time, in the prompts' order.

    With several servers the prompts go to them in turn.
    """
    servers = [server] if isinstance(server, VllmServer) else list(server)
    call = stream if streamed else complete
    with ThreadPoolExecutor(max(1, min(at_once, len(prompts)))) as threads:
        running = [
            threads.submit(call, servers[i % len(servers)], prompt, max_tokens, **extra)
            for i, prompt in enumerate(prompts)
        ]
        return [one.result() for one in running]


def post(server: VllmServer, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """POST to an administrative address; the answer's JSON, or None without a body. Raises RequestFailed."""
    with _post(server, dict(body or {}), None, path=path) as answer:
        text = answer.read()
    return json.loads(text) if text else None


Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Metrics:
    """A scrape of `/metrics`: values by name and labels."""

    samples: dict[tuple[str, Labels], float]

    def total(self, name: str, /, **labels: str) -> float:
        """The sum over all samples of this name that carry these labels; 0 where there is none."""
        wanted = set(labels.items())
        return sum(value for (found, have), value in self.samples.items() if found == name and wanted <= set(have))

    def names(self) -> set[str]:
        return {name for name, _ in self.samples}


_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+\d+)?$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def metrics(server: VllmServer) -> Metrics:
    """What the server's `/metrics` says now."""
    status, body = server.get("/metrics")
    if status != 200:
        raise RequestFailed(status, body.decode(errors="replace"))
    return parse_metrics(body.decode())


def parse_metrics(text: str) -> Metrics:
    """Prometheus' text format; fails on a line that is not of it."""
    samples: dict[tuple[str, Labels], float] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        match = _SAMPLE.match(line)
        assert match, f"not a sample: {line!r}"
        name, labels, value = match.groups()
        samples[name, tuple(sorted(_LABEL.findall(labels or "")))] = float(value)
    return Metrics(samples)


# ---- inside


def _body(prompt: Prompt, max_tokens: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": MODEL_NAME,
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **extra,
    }


def _streamed(body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


@contextlib.contextmanager
def _post(
    server: VllmServer, body: dict[str, Any], headers: Mapping[str, str] | None, *, path: str = "/v1/completions"
) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=REQUEST_S)
    with contextlib.closing(connection):
        all_headers = {"Content-Type": "application/json", **(headers or {})}
        connection.request("POST", path, json.dumps(body), all_headers)
        answer = connection.getresponse()
        with contextlib.closing(answer):
            if answer.status != 200:
                raise RequestFailed(answer.status, answer.read().decode(errors="replace"))
            yield answer


def events(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event, up to the end mark. Raises RequestFailed on an error in the stream."""
    for line in answer:
        if not line.startswith(b"data: "):
            continue
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            return
        chunk: dict[str, Any] = json.loads(data)
        if "error" in chunk:
            raise RequestFailed(int(chunk["error"].get("code") or 500), data.decode())
        yield chunk
    raise RequestFailed(200, "the stream broke off")


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not parts:
        return None
    names = ("token_logprobs", "top_logprobs")
    return {name: [value for part in parts for value in part.get(name) or ()] for name in names}


def _completion(raw: dict[str, Any], choices: list[dict[str, Any]], ttft_s: float, total_s: float) -> Completion:
    first, usage = choices[0], raw["usage"]
    logprobs = first.get("logprobs") or {}
    return Completion(
        tokens=tuple(first["token_ids"]),
        text=first["text"],
        finish_reason=first["finish_reason"],
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        logprobs=tuple(logprobs.get("token_logprobs") or ()),
        top_logprobs=tuple(logprobs.get("top_logprobs") or ()),
        choices=tuple(tuple(choice["token_ids"]) for choice in choices),
        request_id=raw["id"],
        ttft_s=ttft_s,
        total_s=total_s,
        raw=raw,
    )
