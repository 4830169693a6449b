"""The brain's facts, their own checks, and the decoded form of events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from penstock.core.actions import Committed, Event, Evicted, Kept, Touched, decode, encode
from penstock.core.brain import Brain, ConsistencyError
from penstock.errors import ConfigError
from penstock.policies.facts import (
    EVENT_CLASS,
    EVENT_INTENT,
    EVENT_KIND,
    EVENT_PARENT,
    EVENT_UNIT,
    EVENT_WORDS,
    INTENT_WORDS,
    ROW_CHILDREN,
    ROW_CLASS,
    ROW_FLAGS,
    ROW_HITS,
    ROW_LAST_USE,
    ROW_OPEN,
    ROW_PARENT,
    ROW_WORDS,
    Facts,
    intent_dtype,
    row_dtype,
)
from penstock.types import NO_UNIT, event_dtype


def test_word_numbers_are_the_columns() -> None:
    """The kernels' constants against the dtypes, so that a column can be moved only together with them."""

    def word(dtype: np.dtype[Any], name: str) -> int:
        fields = dtype.fields
        assert fields is not None
        return int(fields[name][1]) // 4

    rows = {"flags": ROW_FLAGS, "slot_class": ROW_CLASS, "parent": ROW_PARENT, "children": ROW_CHILDREN}
    rows |= {"open": ROW_OPEN, "hits": ROW_HITS, "last_use": ROW_LAST_USE}
    assert {name: word(row_dtype, name) for name in row_dtype.names or ()} == rows
    events = {"kind": EVENT_KIND, "unit": EVENT_UNIT, "parent": EVENT_PARENT, "slot_class": EVENT_CLASS}
    assert {name: word(event_dtype, name) for name in events} == events
    for name in intent_dtype.names or ():
        assert word(event_dtype, name) == EVENT_INTENT + word(intent_dtype, name)
        assert event_dtype[name] == intent_dtype[name]
    assert EVENT_INTENT + INTENT_WORDS == EVENT_WORDS
    assert ROW_WORDS == 8


def test_rows_never_straddle_a_cache_line() -> None:
    for n_units in (1, 3, 1000):
        facts = Facts.empty(n_units, 1)
        assert facts.row_words.ctypes.data % 64 == 0
        facts.rows["hits"][n_units - 1] = 7
        assert facts.row_words[n_units - 1, ROW_HITS] == 7


def test_decoding_is_the_inverse_of_encoding() -> None:
    events: list[Event] = [
        Committed(3, None, 1, -5, 2, 2**64 - 1, 9, 1_700_000_000_000, 60_000),
        Committed(4, 3),
        Touched(3),
        Evicted(4),
        Kept(3),
    ]
    assert decode(encode(events)) == events
    assert encode(events[:1])["parent"][0] == NO_UNIT
    assert decode(encode([])) == []
    with pytest.raises(ValueError, match="0 is not a valid"):
        decode(np.zeros(1, event_dtype))


def test_what_was_said_and_what_happened_is_recorded() -> None:
    brain = Brain(8, 2)
    said = Committed(5, None, 1, priority=-(2**31), space=4, session=2**63 + 1, tenant=6, deadline_ms=7, ttl_ms=8)
    brain.observe(encode([said]), 2**33 + 1.9)
    assert brain.facts.rows[5].item() == (1, 1, NO_UNIT, 0, 0, 0, 2**33 + 1)
    assert brain.facts.intents[5].item() == (-(2**31), 4, 2**63 + 1, 6, 7, 8)
    brain.observe(encode([Touched(5), Touched(5), Touched(6), Kept(5)]), 2**33 + 9)
    assert brain.facts.rows[5].item() == (1, 1, NO_UNIT, 0, 0, 2, 2**33 + 9)
    assert brain.facts.totals.tolist() == [1, 1, 3, 0, 1]
    assert brain.facts.counts.tolist() == [[0, 0], [1, 0]]


def test_restore_takes_intents_and_forgets_the_old() -> None:
    brain = Brain(8, 1)
    brain.observe(encode([Committed(5, session=9), Committed(1, 5)]), 3)
    units, parents = np.array([1, 2], np.uint32), np.array([NO_UNIT, 1], np.uint32)
    said = np.zeros(2, intent_dtype)
    said["tenant"] = [3, 4]
    brain.restore(units, parents, np.zeros(2, np.uint32), np.array([10, 20]), said)
    brain.assert_consistent()
    assert np.flatnonzero(brain.facts.resident()).tolist() == [1, 2]
    assert brain.facts.intents["tenant"][[1, 2]].tolist() == [3, 4]
    assert brain.facts.rows["last_use"][[1, 2]].tolist() == [10, 20]
    none = np.zeros(0, np.uint32)
    brain.restore(none, none, none, np.zeros(0, np.int64))
    brain.assert_consistent()
    assert brain.evictable(0) == 0


@pytest.mark.parametrize(("n_units", "n_classes"), [(0, 1), (8, 0), (2**32 - 1, 1), (8, 2**15 + 1)])
def test_sizes_that_cannot_be(n_units: int, n_classes: int) -> None:
    with pytest.raises(ConfigError, match="1 to 32768 classes"):
        Brain(n_units, n_classes)


def test_an_event_of_no_kind_and_one_of_no_unit() -> None:
    brain = Brain(8, 1)
    unknown = encode([Touched(1)])
    unknown["kind"] = 77
    for events, text in ((unknown, "of unknown kind of unit 1"), (encode([Touched(8)]), "has 8 units")):
        with pytest.raises(ConsistencyError, match=text):
            brain.observe(events, 0)


Damage = Callable[[Facts], object]


def put(column: str, unit: int, value: int) -> Damage:
    def damage(facts: Facts) -> None:
        facts.rows[column][unit] = value

    return damage


def miscount(facts: Facts) -> None:
    facts.counts[0, 0] += 1


def circle(facts: Facts) -> None:
    facts.rows["parent"][0] = 1
    facts.rows["children"][1] = facts.rows["open"][1] = 1
    facts.rows["parent"][2] = NO_UNIT


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (put("flags", 7, 2), "unit 7: picked but not resident"),
        (put("flags", 2, 0), "blocks per class"),
        (put("slot_class", 2, 9), "unit 2: class out of range"),
        (put("parent", 2, 99), "unit 2: parent out of range"),
        (put("parent", 2, 5), "unit 2: parent not resident"),
        (put("parent", 2, 3), "unit 2: parent of another class"),
        (put("children", 0, 2), "unit 0: children miscounted"),
        (put("open", 1, 0), "unit 1: open children miscounted"),
        (miscount, "blocks per class"),
        (circle, "unit 0: its own ancestor"),
    ],
)
def test_damaged_facts_are_noticed(damage: Damage, text: str) -> None:
    brain = Brain(8, 2)
    chain: list[Event] = [Committed(0), Committed(1, 0), Committed(2, 1), Committed(3, None, 1)]
    brain.observe(encode(chain), 0)
    brain.assert_consistent()
    damage(brain.facts)
    with pytest.raises(ConsistencyError, match=text):
        brain.facts.assert_consistent()
