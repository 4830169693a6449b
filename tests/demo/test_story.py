"""The demo's script and its expectation, without processes; and that the demo can fail."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.demo.model import Conversations, load_conversations
from penstock.demo.run import Result, _one_turn
from penstock.demo.story import Expectation, Story, Turn
from penstock.errors import ConfigError


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


TEXTS = Conversations("system " * 10, {"a": ["one", "two"], "b": ["three", "four"], "c": ["five", "six"]})


def story(n_conversations: int, max_positions: int | None = None) -> Story:
    return Story(Letters(), TEXTS, 4, max_positions, n_conversations, 2)


@pytest.mark.parametrize("n_conversations", [2, 3])
def test_turns_of_a_conversation_alternate_between_the_engines(n_conversations: int) -> None:
    told = story(n_conversations)
    engines: dict[str, list[int]] = {}
    for turn in told.turns():
        engines.setdefault(turn.conversation, []).append(turn.engine)
        told.answered(turn, [0])
    assert all(sorted(who) == [0, 1] for who in engines.values())
    assert {who[0] for who in engines.values()} == {0, 1}


def test_a_prompt_goes_on_where_the_answer_ended() -> None:
    told = story(2)
    prompts: dict[str, list[int]] = {}
    for turn in told.turns():
        before = prompts.get(turn.conversation)
        if before is not None:
            assert turn.prompt[: len(before) + 2] == [*before, 7, 8]
        prompts[turn.conversation] = turn.prompt
        told.answered(turn, [7, 8])


def test_a_short_model_gets_a_shorter_system_prompt_or_a_reason() -> None:
    assert max(len(turn.prompt) for turn in story(2, 120).turns()) <= 120
    with pytest.raises(ConfigError, match="too short"):
        story(2, 40)


def test_expected_hits_are_whole_blocks_that_somebody_computed() -> None:
    expectation = Expectation(block_tokens=4)
    assert expectation.hit(list(range(12))) == (0, None)
    # 11 tokens went in and 2 came out; the KV of the last was never computed: 12 tokens, three blocks.
    expectation.saw(list(range(11)), [11, 12], engine=0)
    assert expectation.hit(list(range(13))) == (12, 0)
    # The last token of a prompt is always computed, so its block cannot hit.
    assert expectation.hit(list(range(12))) == (8, 0)
    assert expectation.hit([0, 1, 2, 3, 4, 5, 6, 99, 8]) == (4, 0)


def test_the_shipped_texts_are_long_enough_to_show_something() -> None:
    texts = load_conversations()
    assert len(texts.turns) >= 5
    assert len(texts.system.split()) > 1000


class FakeEngine:
    """Answers as told."""

    label = "A"

    def __init__(self, hit: int, violations: int = 0, stored: bool = True) -> None:
        self.facts: dict[str, Any] = {}
        self._answer = {"tokens": [1], "hit_tokens": hit, "miss": "absent", "ttft_s": 0.1, "stored": stored}
        self._equality = {"equal": 1, "near_ties": 0, "violations": violations, "widest": 0.0}

    def ask(self, do: str, **_: Any) -> dict[str, Any]:
        return self._answer if do == "generate" else self._equality


@pytest.mark.parametrize(
    ("engine", "problem"),
    [
        (FakeEngine(8), None),
        (FakeEngine(4), "hit 4 of 8 tokens"),
        (FakeEngine(8, violations=2), "2 tokens differ"),
        (FakeEngine(8, stored=False), "not stored"),
    ],
)
def test_what_is_wrong_is_a_problem(engine: FakeEngine, problem: str | None) -> None:
    expectation, result = Expectation(4), Result({})
    expectation.saw(list(range(8)), [0], engine=1)
    turn = Turn("a", 0, 0, list(range(9)))
    _one_turn(turn, engine, expectation, "", result, new_tokens=1, pool_first=True)  # type: ignore[arg-type]
    assert bool(result.problems) == (problem is not None)
    if problem:
        assert problem in result.problems[0]
    assert result.outcomes[0].phase == "seen by the other process"
