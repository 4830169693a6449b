"""What the demo asks for and what the pool must answer: prompts turn by turn, and the hit that has to be there.

The expectation comes from the tokens alone, not from the pool: a block is expected to hit if a request before this one
had the same tokens up to that block's end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from penstock.demo.model import Conversations
from penstock.errors import ConfigError

__all__ = ["Expectation", "Story", "Turn"]


@dataclass(slots=True)
class Turn:
    """One request: `conversation`'s turn number `number`, to be answered by engine `engine`."""

    conversation: str
    number: int
    engine: int
    prompt: list[int]


@dataclass(slots=True)
class Story:
    """The conversations, told turn by turn, round-robin; who answers alternates, also within a conversation."""

    tokenizer: Any
    texts: Conversations
    new_tokens: int
    max_positions: int | None
    n_conversations: int
    n_turns: int
    _history: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = list(self.texts.turns)[: self.n_conversations]
        system = self._encode(self.texts.system)
        longest = max(sum(len(self._user(text)) + self.new_tokens for text in self._turns(name)) for name in names)
        room = (self.max_positions or 1 << 30) - longest
        if room < 32:
            raise ConfigError(f"a model with {self.max_positions} positions is too short for these conversations")
        self._history = {name: list(system[:room]) for name in names}

    def turns(self) -> Iterator[Turn]:
        """Each turn's prompt is made when it is asked for, from what was answered before."""
        count = 0
        for number in range(self.n_turns):
            for name in self._history:
                texts = self._turns(name)
                if number >= len(texts):
                    continue
                self._history[name] += self._user(texts[number])
                yield Turn(name, number, count % 2, list(self._history[name]))
                count += 1
            # An odd number of conversations alternates by itself; an even one would give each to one engine.
            count += len(self._history) % 2 == 0

    def again(self) -> Iterator[Turn]:
        """Every conversation once more as it stands, in turns to the two engines."""
        for count, (name, history) in enumerate(self._history.items()):
            yield Turn(name, self.n_turns, count % 2, list(history))

    def longest(self) -> list[int]:
        """The longest of the first prompts."""
        return max(self._history.values(), key=len)

    def answered(self, turn: Turn, tokens: list[int]) -> None:
        """The conversation goes on after these tokens."""
        self._history[turn.conversation] += tokens

    @property
    def n_requests(self) -> int:
        return sum(min(self.n_turns, len(self._turns(name))) for name in self._history)

    def _turns(self, name: str) -> list[str]:
        return self.texts.turns[name][: self.n_turns]

    def _user(self, text: str) -> list[int]:
        return self._encode(f"\n\nQuestion: {text}\n\nAnswer:")

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


@dataclass(slots=True)
class Expectation:
    """Which prefixes were seen, by whom: {tokens up to a block's end: engine}."""

    block_tokens: int
    _seen: dict[tuple[int, ...], int] = field(default_factory=dict)

    def hit(self, prompt: list[int]) -> tuple[int, int | None]:
        """Tokens that must hit (all full blocks but the last token's), and who computed the last of those blocks."""
        hit, owner, step = 0, None, self.block_tokens
        for end in range(step, len(prompt), step):
            found = self._seen.get(tuple(prompt[:end]))
            if found is None:
                break
            hit, owner = end, found
        return hit, owner

    def saw(self, prompt: list[int], answer: list[int], engine: int) -> None:
        """A request went through `engine`. Its last token's KV was never computed."""
        tokens = (prompt + answer)[:-1]
        for end in range(self.block_tokens, len(tokens) + 1, self.block_tokens):
            self._seen.setdefault(tuple(tokens[:end]), engine)
