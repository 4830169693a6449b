"""What one request asks of the pool: whose its blocks are, and what to do with them.

Three places may say so, and for each field the first that says something counts: vLLM's own `session_id` and
`priority`; an action of type `penstock.intent` in its `kv_hints`; the object `penstock` in `kv_transfer_params`. What
is malformed is ignored field by field and named, for the caller to count: intent may never fail a request.

Imports no vLLM. Headers become `kv_transfer_params` in `middleware.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from penstock.connectors.below import FetchMode
from penstock.types import Intent

__all__ = [
    "ACTION_TYPE",
    "ACTION_VERSION",
    "FIELDS",
    "MAX_NAME_CHARS",
    "NOTHING",
    "PARAMS_KEY",
    "Asked",
    "read_request",
]

PARAMS_KEY = "penstock"
"""Our object's name in `kv_transfer_params`, which other connectors' keys share."""
ACTION_TYPE = "penstock.intent"
ACTION_VERSION = "1"

MAX_NAME_CHARS = 200
_MIN_PRIORITY, _MAX_PRIORITY = -(1 << 31), (1 << 31) - 1
# September 2001 and the year 5138: outside lies what somebody meant as a duration, or as milliseconds.
_MIN_DEADLINE_S, _MAX_DEADLINE_S = 1e9, 1e11
_MAX_TTL_S = 1e9
_MAX_WAIT_S = 60.0
_MAX_TOKENS = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asked for; where it said nothing, the defaults."""

    intent: Intent | None = None
    """None if it said nothing about its blocks."""
    skip_save: bool = False
    skip_load: bool = False
    min_hit_tokens: int = 0
    """A hit of fewer tokens is not worth loading to this request."""
    wait_s: float = 0.0
    """How long its first lookup may wait for blocks that another server is still storing."""
    fetch: FetchMode | None = None
    """What to do about blocks below the pool; None if it said nothing."""
    malformed: tuple[str, ...] = ()
    """What was ignored, by the name of its place: one of a small fixed set, never the request's own text."""


NOTHING = Asked()


class _Malformed(Exception):
    """This value cannot be used."""


def read_request(request: object) -> Asked:
    """What a vLLM `Request`, or anything with some of its attributes, asks for. Never raises.

    vLLM handles *lower* priorities earlier, and the pool keeps blocks of *higher* ones longer, so vLLM's is negated:
    what is urgent to compute is valuable to keep. 0 is vLLM's default and says nothing; the other two places speak
    of the pool's priority and are taken as they are.
    """
    malformed: list[str] = []
    said: dict[str, Any] = {}
    for source in (_from_vllm(request), _from_hints(request), _from_params(request)):
        for place, name, value in source:
            try:
                checked = _FIELDS[name](value) if name in _FIELDS else _refuse()
            except _Malformed:
                malformed.append(place)
            else:
                if checked is not None:
                    said.setdefault(name, checked)
    if not said and not malformed:
        return NOTHING
    intent = {name: said[name] for name in _INTENT_FIELDS if name in said}
    return Asked(
        intent=Intent(**intent) if intent else None,
        skip_save=said.get("skip_save", False),
        skip_load=said.get("skip_load", False),
        min_hit_tokens=said.get("min_hit_tokens", 0),
        wait_s=said.get("wait_s", 0.0),
        fetch=said.get("fetch"),
        malformed=tuple(dict.fromkeys(malformed)),
    )


# ---- the three places: each gives (place, field or "" for something unusable, value)

_Said = list[tuple[str, str, object]]


def _from_vllm(request: object) -> _Said:
    said: _Said = [("session_id", "session", getattr(request, "session_id", None))]
    priority = getattr(request, "priority", None)
    if isinstance(priority, int) and not isinstance(priority, bool):
        said.append(("priority", "priority", -priority or None))
    elif priority is not None:
        said.append(("priority", "", priority))
    return said


def _from_hints(request: object) -> _Said:
    hints = getattr(request, "kv_hints", None)
    if hints is None:
        return []
    actions = _member(hints, "actions")
    if not isinstance(actions, list | tuple):
        return [("kv_hints", "", hints)]
    said: _Said = []
    for action in actions:
        if _member(action, "action_type") != ACTION_TYPE:
            continue  # for another component
        if _member(action, "action_version") != ACTION_VERSION:
            said.append(("kv_hints.action_version", "", action))
        else:
            said += _fields("kv_hints", _member(action, "payload"))
    return said


def _from_params(request: object) -> _Said:
    params = getattr(request, "kv_transfer_params", None)
    if params is None:
        return []
    if not isinstance(params, Mapping):
        return [("kv_transfer_params", "", params)]
    return _fields("kv_transfer_params", params[PARAMS_KEY]) if PARAMS_KEY in params else []


def _fields(place: str, body: object) -> _Said:
    """The fields of one object. Null says nothing; a key that there is not would be somebody's typing error."""
    if not isinstance(body, Mapping):
        return [] if body is None else [(f"{place}.{PARAMS_KEY}", "", body)]
    known: _Said = [(f"{place}.{name}", name, body[name]) for name in _FIELDS if name in body]
    if len(known) < len(body):
        known.append((f"{place}.unknown_key", "", None))
    return known


def _member(record: object, name: str) -> object:
    """Of vLLM's struct, or of the same thing as decoded JSON."""
    return record.get(name) if isinstance(record, Mapping) else getattr(record, name, None)


# ---- what each field may be


def _refuse() -> object:
    raise _Malformed


def _name(value: object) -> object:
    """Printable, because names are shown: no line breaks, no terminal controls, no half of a surrogate pair."""
    if not isinstance(value, str) or len(value) > MAX_NAME_CHARS or not value.isprintable():
        raise _Malformed
    return value or None


def _flag(value: object) -> object:
    if not isinstance(value, bool):
        raise _Malformed
    return value


def _mode(value: object) -> object:
    if not isinstance(value, str) or value not in set(FetchMode):
        raise _Malformed
    return FetchMode(value)


def _whole(least: int, most: int) -> Callable[[object], object]:
    def check(value: object) -> object:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise _Malformed
        return value

    return check


def _number(least: float, most: float) -> Callable[[object], object]:
    def check(value: object) -> object:
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:  # nor NaN
            raise _Malformed
        return float(value)

    return check


def _or_unsaid(check: Callable[[object], object]) -> Callable[[object], object]:
    return lambda value: None if value is None else check(value)


_INTENT_FIELDS: dict[str, Callable[[object], object]] = {
    "session": _or_unsaid(_name),
    "tenant": _or_unsaid(_name),
    "priority": _or_unsaid(_whole(_MIN_PRIORITY, _MAX_PRIORITY)),
    "deadline_s": _or_unsaid(_number(_MIN_DEADLINE_S, _MAX_DEADLINE_S)),
    "ttl_s": _or_unsaid(_number(0, _MAX_TTL_S)),
}
_FIELDS: dict[str, Callable[[object], object]] = {
    **_INTENT_FIELDS,
    "skip_save": _or_unsaid(_flag),
    "skip_load": _or_unsaid(_flag),
    "min_hit_tokens": _or_unsaid(_whole(0, _MAX_TOKENS)),
    "wait_s": _or_unsaid(_number(0, _MAX_WAIT_S)),
    "fetch": _or_unsaid(_mode),
}
FIELDS = tuple(_FIELDS)
"""The keys of our object. Times are Unix time (`deadline_s`) and seconds after the last use (`ttl_s`)."""
