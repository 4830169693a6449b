"""What a request asks for: every place that may say so, their order, and garbage in any of them."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import Intent
from penstock.connectors.below import FetchMode
from penstock.connectors.vllm.intent import ACTION_TYPE, FIELDS, MAX_NAME_CHARS, NOTHING, Asked, read_request

NOW = 1_790_000_000.0


def request(**attributes: Any) -> SimpleNamespace:
    """A vLLM request as it is when nobody asked for anything, but for these attributes."""
    plain = {"session_id": None, "priority": 0, "kv_hints": None, "kv_transfer_params": None, "arrival_time": NOW}
    return SimpleNamespace(**{**plain, **attributes})


def params(**fields: Any) -> dict[str, Any]:
    return {"do_remote_prefill": False, "penstock": fields}


def hints(payload: Any, version: str = "1", kind: str = ACTION_TYPE) -> dict[str, Any]:
    action = {"action_id": "a", "action_type": kind, "action_version": version, "payload": payload}
    return {"protocol_version": "1", "message_id": "m", "actions": [action]}


class Action(msgspec.Struct, frozen=True):
    """As vLLM declares it."""

    action_id: str
    action_type: str
    action_version: str
    payload: dict[str, Any]


class Envelope(msgspec.Struct, frozen=True):
    """As vLLM declares it."""

    protocol_version: str
    message_id: str
    actions: list[Action]


GOOD: dict[str, Any] = {
    "session": "chat-17",
    "tenant": "blue",
    "priority": -5,
    "deadline_s": NOW + 30,
    "ttl_s": 600,
    "skip_save": True,
    "skip_load": True,
    "min_hit_tokens": 64,
    "wait_s": 1.5,
    "fetch": "always",
}
ALWAYS = FetchMode.ALWAYS
GOOD_INTENT = Intent("chat-17", "blue", -5, NOW + 30, 600.0)


def test_nothing_asked() -> None:
    assert read_request(request()) is NOTHING
    assert read_request(object()) is NOTHING
    assert read_request(request(session_id="", kv_transfer_params={}, kv_hints=hints({}))) is NOTHING
    assert read_request(request(kv_transfer_params={"do_remote_decode": True})) is NOTHING
    assert read_request(request(kv_transfer_params={"penstock": None})) is NOTHING
    assert read_request(request(kv_transfer_params=params(**dict.fromkeys(FIELDS)))) is NOTHING


def test_every_field() -> None:
    assert set(GOOD) == set(FIELDS)
    expected = Asked(GOOD_INTENT, skip_save=True, skip_load=True, min_hit_tokens=64, wait_s=1.5, fetch=ALWAYS)
    assert read_request(request(kv_transfer_params=params(**GOOD))) == expected
    assert read_request(request(kv_hints=hints(GOOD))) == expected
    assert read_request(request(kv_hints=msgspec.convert(hints(GOOD), Envelope))) == expected


def test_vllms_own_comes_first_then_hints() -> None:
    told = request(
        session_id="own",
        priority=3,
        kv_hints=hints({"session": "hint", "tenant": "hint", "ttl_s": 5}),
        kv_transfer_params=params(session="params", tenant="params", priority=9, ttl_s=7, min_hit_tokens=32),
    )
    assert read_request(told) == Asked(Intent("own", "hint", -3, None, 5.0), min_hit_tokens=32)


@pytest.mark.parametrize(("theirs", "ours"), [(1, -1), (-7, 7), (2**31, -(2**31)), (-(2**31) + 1, 2**31 - 1)])
def test_vllms_priority_is_negated(theirs: int, ours: int) -> None:
    assert read_request(request(priority=theirs)) == Asked(Intent(priority=ours))


@pytest.mark.parametrize("theirs", [-(2**31), 2**31 + 1, 2**63, True, "high", 1.5, math.nan])
def test_a_priority_out_of_bounds_leaves_the_next_place_its_say(theirs: Any) -> None:
    told = request(priority=theirs, kv_transfer_params=params(priority=4))
    assert read_request(told) == Asked(Intent(priority=4), malformed=("priority",))


def test_vllms_default_priority_says_nothing() -> None:
    assert read_request(request(kv_transfer_params=params(priority=4))) == Asked(Intent(priority=4))
    assert read_request(request(kv_transfer_params=params(priority=0))) == Asked(Intent(priority=0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("session", "x" * (MAX_NAME_CHARS + 1)),
        ("session", 7),
        ("session", "a\nb"),
        ("session", "\x1b[2J"),
        ("session", "\ud800"),
        ("tenant", ["blue"]),
        ("priority", 2**31),
        ("priority", -(2**31) - 1),
        ("priority", 1.0),
        ("priority", True),
        ("priority", "1"),
        ("deadline_s", math.nan),
        ("deadline_s", math.inf),
        ("deadline_s", -1),
        ("deadline_s", 30),  # a duration
        ("deadline_s", NOW * 1000),  # milliseconds
        ("deadline_s", 10**400),
        ("ttl_s", math.nan),
        ("ttl_s", math.inf),
        ("ttl_s", -0.5),
        ("ttl_s", 10**400),
        ("ttl_s", True),
        ("skip_save", 1),
        ("skip_load", "true"),
        ("min_hit_tokens", -1),
        ("min_hit_tokens", 2**31),
        ("min_hit_tokens", 16.0),
        ("min_hit_tokens", False),
        ("wait_s", 61),
        ("wait_s", math.nan),
        ("wait_s", "1"),
        ("fetch", "sometimes"),
        ("fetch", True),
        ("fetch", ["auto"]),
    ],
)
def test_one_malformed_field_costs_the_others_nothing(field: str, value: Any) -> None:
    good = {key: one for key, one in GOOD.items() if key != field}
    clean = read_request(request(kv_transfer_params=params(**good)))
    dirty = read_request(request(kv_transfer_params=params(**good, **{field: value})))
    assert dirty.malformed == (f"kv_transfer_params.{field}",)
    assert dirty == replace(clean, malformed=dirty.malformed)


def test_what_is_malformed_is_named_once_and_never_quoted() -> None:
    told = request(
        session_id=["x"],
        kv_hints={"actions": [hints({}, version="2")["actions"][0], hints(3)["actions"][0], hints({"secret": 1})]},
        kv_transfer_params=params(secret=1, other=2, ttl_s="soon", tenant="blue"),
    )
    assert read_request(told) == Asked(
        Intent(tenant="blue"),
        malformed=(
            "session_id", "kv_hints.action_version", "kv_hints.penstock", "kv_transfer_params.ttl_s",
            "kv_transfer_params.unknown_key",
        ),
    )  # fmt: skip
    assert read_request(request(kv_transfer_params=[1])) == Asked(malformed=("kv_transfer_params",))
    assert read_request(request(kv_transfer_params={"penstock": "x"})).malformed == ("kv_transfer_params.penstock",)
    assert read_request(request(kv_hints=3)) == Asked(malformed=("kv_hints",))


def test_other_components_hints_are_theirs() -> None:
    assert read_request(request(kv_hints=hints({"session": 3}, kind="router.pin"))) is NOTHING
    assert read_request(request(kv_hints={"actions": [None, 3, {}]})) is NOTHING


OBJECTS = ("kv_hints", "kv_transfer_params")
PLACES = {"session_id", "priority", *OBJECTS, "kv_hints.action_version"} | {
    f"{place}.{name}" for place in OBJECTS for name in (*FIELDS, "penstock", "unknown_key")
}
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.sampled_from([*FIELDS, "penstock", "actions", "action_type", "payload"]) | st.text()
garbage = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=12)
bodies = st.dictionaries(keys, garbage)


@given(garbage, garbage, garbage | bodies.map(hints), garbage | bodies.map(lambda body: {"penstock": body}))
def test_garbage_never_raises_and_what_is_used_is_in_bounds(session: Any, priority: Any, hint: Any, param: Any) -> None:
    asked = read_request(
        request(session_id=session, priority=priority, kv_hints=hint, kv_transfer_params=param),
    )
    assert set(asked.malformed) <= PLACES
    assert isinstance(asked.skip_save, bool) and isinstance(asked.skip_load, bool)
    assert type(asked.min_hit_tokens) is int and 0 <= asked.min_hit_tokens < 2**31
    assert type(asked.wait_s) is float and 0 <= asked.wait_s <= 60
    assert asked.fetch is None or isinstance(asked.fetch, FetchMode)
    if (intent := asked.intent) is not None:
        for name in (intent.session, intent.tenant):
            assert isinstance(name, str) and len(name) <= MAX_NAME_CHARS and name.encode() is not None
        assert -(2**31) <= intent.priority < 2**31
        assert all(at is None or (math.isfinite(at) and at >= 0) for at in (intent.deadline_s, intent.ttl_s))


@given(st.dictionaries(st.sampled_from(FIELDS), garbage), st.sets(st.sampled_from(FIELDS)))
def test_well_formed_fields_survive_beside_malformed_ones(body: dict[str, Any], good: set[str]) -> None:
    asked = read_request(request(kv_transfer_params={"penstock": {**body, **{name: GOOD[name] for name in good}}}))
    found = {name: getattr(asked.intent if hasattr(Intent(), name) else asked, name) for name in good}
    assert found == {name: GOOD[name] for name in good}
