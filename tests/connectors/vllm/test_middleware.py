"""The middleware between a scripted client and a scripted application: no server, no framework."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import Intent
from penstock.connectors.below import FetchMode
from penstock.connectors.vllm.intent import FIELDS, Asked, read_request
from penstock.connectors.vllm.middleware import HEADERS, PATHS, IntentMiddleware

NOW = 1_790_000_000
DISCONNECT = {"type": "http.disconnect"}


def chunk(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


class App:
    """Reads the body to its end and one message more, then streams an answer."""

    def __init__(self) -> None:
        self.scope: Any = None
        self.messages: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope = scope
        if scope["type"] == "http":
            while not self.messages or self.messages[-1]["type"] != DISCONNECT["type"]:
                self.messages.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-app", b"1")]})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await send({"type": "http.response.body", "body": b"two", "more_body": False})

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.messages if message["type"] == "http.request")

    @property
    def lengths(self) -> list[bytes]:
        return [value for key, value in self.scope["headers"] if key == b"content-length"]


def scope(headers: dict[str, str | bytes], path: str = "/v1/completions", **other: Any) -> dict[str, Any]:
    pairs = [(k.lower().encode(), v if isinstance(v, bytes) else v.encode()) for k, v in headers.items()]
    if "content-type" not in {key.decode() for key, _ in pairs}:
        pairs.append((b"content-type", b"application/json; charset=utf-8"))
    return {"type": "http", "method": "POST", "path": path, "headers": pairs, **other}


def drive(sent: dict[str, Any], *messages: dict[str, Any], max_body_bytes: int = 1 << 20) -> App:
    """Run one request through; the client leaves after its last message. The answer must come through as it is."""
    app, left, answered = App(), [*messages, DISCONNECT], []

    async def receive() -> Any:
        return left.pop(0)

    async def send(message: Any) -> None:
        answered.append(message)

    asyncio.run(IntentMiddleware(app, max_body_bytes)(sent, receive, send))
    assert [message.get("body") for message in answered] == [None, b"one", b"two"]
    assert not left or sent["type"] != "http", "a message was lost"
    return app


def assert_untouched(app: App, sent: dict[str, Any], *messages: dict[str, Any]) -> None:
    assert app.scope is sent
    assert app.messages == [*messages, DISCONNECT]


ALL: dict[str, str | bytes] = {
    "X-Penstock-Session": "chat-17 ü",
    "X-Penstock-Tenant": "blue",
    "X-Penstock-Priority": "-5",
    "X-Penstock-Deadline-Ms": f"{NOW}500",
    "X-Penstock-Ttl-S": "600",
    "X-Penstock-Skip-Save": "true",
    "X-Penstock-Skip-Load": "0",
    "X-Penstock-Min-Hit-Tokens": "64",
    "X-Penstock-Wait-S": "1.5",
    "X-Penstock-Fetch": "Always",
}


def asked(app: App) -> Asked:
    """What the connector makes of the body that the application got."""
    return read_request(SimpleNamespace(kv_transfer_params=json.loads(app.body)["kv_transfer_params"]))


@pytest.mark.parametrize("path", sorted(PATHS))
def test_every_header_reaches_the_connector(path: str) -> None:
    app = drive(scope({**ALL, "Content-Length": "17"}, path), chunk(b'{"prompt": "hi"} '))
    body = json.loads(app.body)
    assert body.pop("kv_transfer_params").keys() == {"penstock"} and body == {"prompt": "hi"}
    assert app.lengths == [str(len(app.body)).encode()]
    expected = Intent("chat-17 ü", "blue", -5, NOW + 0.5, 600.0)
    assert asked(app) == Asked(
        expected, skip_save=True, skip_load=False, min_hit_tokens=64, wait_s=1.5, fetch=FetchMode.ALWAYS
    )
    assert {field for field, _ in HEADERS.values()} == set(FIELDS)


def test_the_body_wins_field_by_field() -> None:
    said = {"kv_transfer_params": {"do_remote_decode": True, "penstock": {"session": "body", "ttl_s": None}}}
    app = drive(scope(ALL), chunk(json.dumps(said).encode()))
    params = json.loads(app.body)["kv_transfer_params"]
    assert params["do_remote_decode"] is True
    assert params["penstock"]["session"] == "body" and params["penstock"]["ttl_s"] is None
    assert params["penstock"]["tenant"] == "blue"


def test_null_is_no_answer() -> None:
    for said in ({"kv_transfer_params": None}, {"kv_transfer_params": {"penstock": None}}):
        assert asked(drive(scope({"X-Penstock-Tenant": "t"}), chunk(json.dumps(said).encode()))) == Asked(
            Intent(tenant="t")
        )


def test_a_chunked_body_becomes_one_piece_with_its_length() -> None:
    sent = scope({"X-Penstock-Tenant": "t", "Transfer-Encoding": "chunked"})
    app = drive(sent, chunk(b'{"pro', True), {"type": "http.request", "more_body": True}, chunk(b'mpt": 1}'))
    assert json.loads(app.body) == {"prompt": 1, "kv_transfer_params": {"penstock": {"tenant": "t"}}}
    assert app.messages == [chunk(app.body), DISCONNECT]
    assert app.lengths == [str(len(app.body)).encode()]
    assert b"transfer-encoding" not in dict(app.scope["headers"])
    assert (b"transfer-encoding", b"chunked") in sent["headers"], "the server's own scope is not changed"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[1]", b'"x"', b"null", b"\xff\xfe\xfd", b"[" * 100_000,
        b'{"kv_transfer_params": 3}', b'{"kv_transfer_params": {"penstock": "x"}}',
        b'{"kv_transfer_params": {"penstock": {"tenant": "mine"}}}', b'{"n": ' + b"1" * 5000 + b"}",
    ],
    ids=range(11),
)  # fmt: skip
def test_bodies_with_no_place_for_it_are_left_alone(body: bytes) -> None:
    sent = scope({"X-Penstock-Tenant": "t"})
    assert_untouched(drive(sent, chunk(body)), sent, chunk(body))


@pytest.mark.parametrize(
    "sent",
    [
        scope({}),
        scope({"X-Penstock-Tenant": " "}),
        scope({"X-Penstock-Other": "1"}),
        scope(ALL, "/v1/models"),
        scope(ALL, "/v1/completions/"),
        scope({**ALL, "Content-Type": "text/plain"}),
        {**scope(ALL), "method": "GET"},
        {**scope(ALL), "type": "websocket"},
        {"type": "lifespan"},
    ],
    ids=range(9),
)
def test_other_requests_are_left_alone(sent: dict[str, Any]) -> None:
    messages = [chunk(b'{"a"', True), chunk(b": 1}")] if sent["type"] == "http" else []
    app = drive(sent, *messages)
    assert app.scope is sent
    assert app.messages == [*messages, DISCONNECT][: len(app.messages)]


def test_under_a_root_path() -> None:
    app = drive(scope({"X-Penstock-Tenant": "t"}, "/llm/v1/completions", root_path="/llm"), chunk(b"{}"))
    assert asked(app).intent == Intent(tenant="t")


def test_a_body_over_the_bound_is_passed_on_in_its_pieces() -> None:
    sent = scope({"X-Penstock-Tenant": "t"})
    pieces = [chunk(b'{"a": "', True), chunk(b"x" * 50, True), chunk(b"x" * 50, True), chunk(b'"}')]
    assert_untouched(drive(sent, *pieces, max_body_bytes=80), sent, *pieces)
    whole = chunk(b'{"a": "' + b"x" * 100 + b'"}')
    assert_untouched(drive(sent, whole, max_body_bytes=80), sent, whole)
    assert json.loads(drive(sent, *pieces, max_body_bytes=109).body)["kv_transfer_params"]


def test_a_declared_length_over_the_bound_is_not_waited_for() -> None:
    """The application starts before the first piece has come: none is asked for on its behalf."""
    started = []

    async def app(*_: Any) -> None:
        started.append(True)

    async def receive() -> Any:
        raise AssertionError("read ahead")

    async def send(_: Any) -> None: ...

    sent = scope({"X-Penstock-Tenant": "t", "Content-Length": "1001"})
    asyncio.run(IntentMiddleware(app, 1000)(sent, receive, send))
    assert started


def test_a_client_that_leaves_within_its_body() -> None:
    sent = scope({"X-Penstock-Tenant": "t"})
    assert_untouched(drive(sent, chunk(b'{"a"', True)), sent, chunk(b'{"a"', True))


@pytest.mark.parametrize(
    ("header", "value", "field"),
    [
        ("Priority", "high", "priority"),
        ("Priority", "9" * 5000, "priority"),
        ("Ttl-S", "nan", "ttl_s"),
        ("Ttl-S", "-1", "ttl_s"),
        ("Ttl-S", "1e999", "ttl_s"),
        ("Deadline-S", "30", "deadline_s"),
        ("Deadline-Ms", "soon", "deadline_s"),
        ("Skip-Save", "maybe", "skip_save"),
        ("Min-Hit-Tokens", "1.5", "min_hit_tokens"),
        ("Session", "x" * 201, "session"),
        ("Session", b"\xff\xfe", "session"),
    ],
)
def test_malformed_headers_reach_the_connector_as_malformed(header: str, value: str | bytes, field: str) -> None:
    app = drive(scope({f"X-Penstock-{header}": value, "X-Penstock-Tenant": "t"}), chunk(b"{}"))
    assert asked(app) == Asked(Intent(tenant="t"), malformed=(f"kv_transfer_params.{field}",))


def test_the_first_of_two_headers_counts() -> None:
    sent = scope({"X-Penstock-Deadline-S": f"{NOW}", "X-Penstock-Deadline-Ms": f"{NOW}999"})
    sent["headers"] += [(b"X-Penstock-Tenant", b"one"), (b"x-penstock-tenant", b"two")]
    assert asked(drive(sent, chunk(b"{}"))) == Asked(Intent(tenant="one", deadline_s=float(NOW)))


@given(st.dictionaries(st.sampled_from(sorted(HEADERS)), st.binary(max_size=40)), st.binary(max_size=60))
def test_no_header_or_body_breaks_it(headers: dict[str, bytes], body: bytes) -> None:
    assert drive(scope(dict(headers)), chunk(body)).messages[-1] == DISCONNECT


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_the_rest_of_the_body_stays_what_it_was(value: Any) -> None:
    app = drive(scope({"X-Penstock-Tenant": "t"}), chunk(json.dumps({"value": value}).encode()))
    assert json.loads(app.body)["value"] == value
