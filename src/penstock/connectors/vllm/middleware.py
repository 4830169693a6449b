"""Headers that say what a request asks of the pool, for clients that cannot change the JSON they send.

    vllm serve MODEL ... --middleware penstock.connectors.vllm.middleware.IntentMiddleware

`X-Penstock-*` headers (`HEADERS`) become fields of `kv_transfer_params["penstock"]` in the request's JSON, from where
vLLM carries them to the connector (`intent.py`). What the body says itself wins. A value that does not parse is passed
on as the text that it is, so that the connector counts it as malformed. Everything else goes through untouched:
requests without such headers, other paths, bodies that are no JSON object or too large, and every response.

Plain ASGI: imports neither vLLM nor a web framework.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from penstock.connectors.vllm.intent import PARAMS_KEY

__all__ = ["HEADERS", "MAX_BODY_BYTES", "PATHS", "IntentMiddleware"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PATHS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"})
"""The endpoints whose JSON has `kv_transfer_params`."""
MAX_BODY_BYTES = 16 << 20
"""A larger body is not held back to be changed: middleware runs before the API key is checked."""


class IntentMiddleware:
    """Wraps an ASGI application."""

    def __init__(self, app: App, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or connection."""
        asked = _asked(scope["headers"]) if _is_ours(scope) else {}
        if not asked or _declared_bytes(scope["headers"]) > self.max_body_bytes:
            await self.app(scope, receive, send)
            return
        messages, complete = await _read(receive, self.max_body_bytes)
        if complete:
            body = b"".join(message.get("body", b"") for message in messages)
            changed = _with_asked(body, asked)
            if changed is not None:
                messages = [{"type": "http.request", "body": changed, "more_body": False}]
                scope = {**scope, "headers": _with_length(scope["headers"], len(changed))}
        await self.app(scope, _replay(messages, receive), send)


# ---- what the headers say

Headers = Iterable[tuple[bytes, bytes]]


def _is_ours(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    media = _first(scope["headers"], b"content-type").partition(b";")[0].strip().lower()
    return path in PATHS and media == b"application/json"


def _declared_bytes(headers: Headers) -> int:
    declared = _first(headers, b"content-length")
    if not declared.isdigit():
        return 0
    return int(declared) if len(declared) < 20 else 1 << 63


def _first(headers: Headers, name: bytes) -> bytes:
    return next((value for key, value in headers if key.lower() == name), b"")


def _asked(headers: Headers) -> dict[str, Any]:
    """The fields that the headers name. Where a header is there twice, or two say the same field, the first counts."""
    asked: dict[str, Any] = {}
    for key, value in headers:
        known = HEADERS.get(key.lower().decode("latin-1"))
        # What is not UTF-8 becomes half a surrogate pair, which the connector refuses.
        text = value.decode("utf-8", "surrogateescape").strip()
        if known is not None and text:
            field, parse = known
            asked.setdefault(field, parse(text))
    return asked


def _flag(text: str) -> object:
    return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}.get(text.lower(), text)


def _whole(text: str) -> object:
    try:
        return int(text)
    except ValueError:
        return text


def _number(text: str) -> object:
    try:
        value = float(text)
    except ValueError:
        return text
    return value if math.isfinite(value) else text


def _milliseconds(text: str) -> object:
    value = _number(text)
    return value / 1000 if isinstance(value, float) else value


HEADERS: dict[str, tuple[str, Callable[[str], object]]] = {
    "x-penstock-session": ("session", str),
    "x-penstock-tenant": ("tenant", str),
    "x-penstock-priority": ("priority", _whole),
    "x-penstock-deadline-s": ("deadline_s", _number),
    "x-penstock-deadline-ms": ("deadline_s", _milliseconds),
    "x-penstock-ttl-s": ("ttl_s", _number),
    "x-penstock-skip-save": ("skip_save", _flag),
    "x-penstock-skip-load": ("skip_load", _flag),
    "x-penstock-min-hit-tokens": ("min_hit_tokens", _whole),
    "x-penstock-wait-s": ("wait_s", _number),
    "x-penstock-fetch": ("fetch", str.lower),
}
"""Header, in lower case -> the field of `kv_transfer_params["penstock"]`, and how its text is read."""


# ---- the body


async def _read(receive: Receive, max_bytes: int) -> tuple[list[Message], bool]:
    """The messages up to the body's end, or up to where it grew too large or the client left; whether it ended."""
    messages: list[Message] = []
    n_bytes = 0
    while n_bytes <= max_bytes:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request":
            return messages, False
        n_bytes += len(message.get("body", b""))
        if not message.get("more_body", False):
            return messages, n_bytes <= max_bytes
    return messages, False


def _replay(messages: Iterable[Message], receive: Receive) -> Receive:
    """These messages first, then what is still to come: the rest of a body, the client's disconnect."""
    waiting = deque(messages)

    async def replayed() -> Message:
        return waiting.popleft() if waiting else await receive()

    return replayed


def _with_asked(body: bytes, asked: dict[str, Any]) -> bytes | None:
    """The JSON with these fields where it does not say them itself. None if there is nothing to change, or if it is
    not the kind of JSON that has a place for them; the server says what is wrong with it."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    params = _object(request, "kv_transfer_params")
    said = _object(params, PARAMS_KEY)
    if said is None or not asked.keys() - said.keys():
        return None
    request["kv_transfer_params"] = {**(params or {}), PARAMS_KEY: {**asked, **said}}
    return json.dumps(request, separators=(",", ":")).encode()


def _object(parent: Any, name: str) -> dict[str, Any] | None:
    """The object of that name, empty where there is none yet; None where it cannot be."""
    if not isinstance(parent, dict):
        return None
    found = parent.get(name)
    if found is None:
        return {}
    return found if isinstance(found, dict) else None


def _with_length(headers: Headers, n_bytes: int) -> list[tuple[bytes, bytes]]:
    """The headers for a body of one piece."""
    framing = (b"content-length", b"transfer-encoding")
    kept = [(key, value) for key, value in headers if key.lower() not in framing]
    return [*kept, (b"content-length", str(n_bytes).encode())]
