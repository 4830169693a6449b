"""One OpenAI-compatible front over a server that prefills and a server that decodes, joined by a Penstock pool.

    python proxy.py --prefill http://127.0.0.1:8001 --decode http://127.0.0.1:8002 --port 8000

Each completion goes to the prefill server first, for a single token, which leaves the prompt's KV in the pool, and
then to the decode server as the client sent it. The decode server finds the KV by the prompt itself; nothing is handed
over here, and whatever goes wrong with the prefill costs time, never an answer. `README.md` says how to
start the three. Runs in vLLM's environment: starlette, httpx, uvicorn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

log = logging.getLogger("uvicorn.error")

# What a request for a single token contradicts or has no use for. Everything else may shape the prompt, and stays.
ANSWER_ONLY = frozenset({
    "stream_options", "min_tokens", "max_completion_tokens", "n", "best_of", "use_beam_search", "logprobs",
    "top_logprobs", "prompt_logprobs", "echo",
})  # fmt: skip
# Of one connection, not of the request: each hop has its own. The client library asks for its own encodings.
HOP_HEADERS = frozenset({
    "connection", "content-encoding", "content-length", "host", "keep-alive", "te", "trailer", "transfer-encoding",
    "upgrade", "accept-encoding", "expect",
})  # fmt: skip


def prefill_body(body: dict[str, Any]) -> dict[str, Any]:
    """The request that computes the same prompt and one token."""
    kept = {key: value for key, value in body.items() if key not in ANSWER_ONLY}
    return {**kept, "max_tokens": 1, "stream": False}


def forwarded(headers: Any) -> dict[str, str]:
    """The headers that go with a request or an answer, keys and intent included."""
    return {key: value for key, value in headers.items() if key.lower() not in HOP_HEADERS}


def decode_body(body: dict[str, Any], wait_s: float) -> dict[str, Any]:
    """The client's request, and how long to wait for blocks that the prefill server is still storing."""
    params = body.get("kv_transfer_params") or {}
    return {**body, "kv_transfer_params": {**params, "penstock": {"wait_s": wait_s, **(params.get("penstock") or {})}}}


class Proxy:
    """The routes. `prefill` and `decode` are clients whose base URLs are the two servers."""

    def __init__(self, prefill: httpx.AsyncClient, decode: httpx.AsyncClient, wait_s: float) -> None:
        self.prefill, self.decode, self.wait_s = prefill, decode, wait_s

    def app(self) -> Starlette:
        """The ASGI application. What it has no route for (models, metrics, health) is the decode server's to answer."""
        complete = [
            Route(f"/v1/{name}", self.complete, methods=["POST"]) for name in ("completions", "chat/completions")
        ]
        rest = Route("/{path:path}", self.passed_on, methods=["GET", "POST"])
        return Starlette(routes=[*complete, rest], lifespan=self._lifespan)

    async def complete(self, request: Request) -> Response:
        """Prefill, then decode."""
        raw = await request.body()
        with contextlib.suppress(ValueError, TypeError, AttributeError):  # the decode server says what is wrong
            body = json.loads(raw)
            onward = json.dumps(decode_body(body, self.wait_s)).encode()
            if await self._prefill(request, prefill_body(body)):
                raw = onward
        return await self._decode(request, raw)

    async def passed_on(self, request: Request) -> Response:
        """To the decode server, untouched."""
        return await self._decode(request, await request.body())

    async def _prefill(self, request: Request, body: dict[str, Any]) -> bool:
        """Have the prompt's KV computed and stored. False, and a line in the log, if that failed."""
        try:
            headers = forwarded(request.headers)
            answer = await self.prefill.post(request.url.path, json=body, headers=headers)
            answer.raise_for_status()
        except httpx.HTTPError as error:
            why = (str(error) or type(error).__name__).splitlines()[0]
            log.warning("no prefill, the decode server computes the prompt: %s", why)
            return False
        return True

    async def _decode(self, request: Request, raw: bytes) -> Response:
        """The decode server's answer, passed through as it comes. A client that leaves a stream ends it there too."""
        onward = self.decode.build_request(
            request.method, request.url.path, params=request.url.query.encode(), content=raw,
            headers=forwarded(request.headers),
        )  # fmt: skip
        try:
            answer = await self.decode.send(onward, stream=True)
        except httpx.HTTPError as error:
            return JSONResponse({"error": {"message": f"the decode server: {error!r}", "code": 502}}, status_code=502)
        headers = forwarded(answer.headers)
        return StreamingResponse(
            answer.aiter_bytes(), answer.status_code, headers, background=BackgroundTask(answer.aclose)
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async with self.prefill, self.decode:
            yield


def client(url: str, patience_s: float | None = None) -> httpx.AsyncClient:
    """For any number of requests at once. `patience_s` bounds how long a server may say nothing; None: for ever."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(patience_s, connect=5), limits=limits, trust_env=False)


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="A prefill/decode front over two vLLM servers that share a pool.")
    parser.add_argument("--prefill", required=True, help="URL of the server that prefills")
    parser.add_argument("--decode", required=True, help="URL of the server that decodes")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for a prefill")
    parser.add_argument("--wait", type=float, default=1, help="seconds that a decode may wait for the last blocks")
    given = parser.parse_args()
    proxy = Proxy(client(given.prefill, given.patience), client(given.decode), given.wait)
    uvicorn.run(proxy.app(), host=given.host, port=given.port)


if __name__ == "__main__":
    main()
