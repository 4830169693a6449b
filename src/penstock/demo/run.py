"""The demo's plot: keeper, two engines, conversations, a killed keeper, a verdict."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from penstock.demo.model import load_conversations, load_tokenizer
from penstock.demo.processes import EngineProcess, KeeperProcess
from penstock.demo.story import Expectation, Story, Turn
from penstock.pool import segment as segments

__all__ = ["PHASES", "Outcome", "Result", "Settings", "run_demo"]

# Where a request's prefix came from, in the order of the table.
PHASES = (
    "first time seen",
    "seen by the same process",
    "seen by the other process",
    "keeper dead",
    "keeper restarted",
    "back from disk",
)
KEEPER_BACK_S = 30.0


class AnyEngine(Protocol):
    """One engine: a process of ours, or a server."""

    label: str
    facts: dict[str, Any]

    def ready(self) -> AnyEngine:
        """Wait until it answers."""

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One request."""

    def stop(self) -> None:
        """End it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request, with the pool and alone."""

    conversation: str
    turn: int
    engine: str
    phase: str
    prompt_tokens: int
    hit_tokens: int
    expected_tokens: int
    miss: str
    ttft_s: float
    ttft_alone_s: float
    fetched_blocks: int = 0
    """Blocks that came from the disk for it."""


@dataclass(slots=True)
class Result:
    """Everything the demo saw."""

    model: dict[str, Any]
    outcomes: list[Outcome] = field(default_factory=list)
    equality: dict[str, float] = field(
        default_factory=lambda: {"equal": 0, "near_ties": 0, "violations": 0, "widest": 0.0}
    )
    problems: list[str] = field(default_factory=list)

    def median_ms(self, phase: str | None) -> float | None:
        """Median time to first token in milliseconds: of a phase, or (None) without the pool."""
        if phase is None:
            return 1e3 * statistics.median(one.ttft_alone_s for one in self.outcomes)
        values = [one.ttft_s for one in self.outcomes if one.phase == phase]
        return 1e3 * statistics.median(values) if values else None


@dataclass(frozen=True, slots=True)
class Settings:
    """What `penstock demo` takes."""

    model_id: str
    size: str
    n_conversations: int
    n_turns: int
    new_tokens: int
    engine: str = "transformers"
    """Or "vllm", where it is installed: two real servers."""


def run_demo(settings: Settings, progress: Callable[[str, int, int], None]) -> Result:
    """Run it. `progress(text, done, total)` is called as it goes on. Leaves no process and no segment behind."""
    name = f"demo-{os.getpid()}"
    with contextlib.ExitStack() as cleanup:
        logs = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="penstock-demo-")))
        cleanup.callback(_remove_segment, name)
        progress("starting the keeper", 0, 1)
        disk = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="penstock-demo-disk-"))
        tier = f"disk:{disk}?size={settings.size}&write=through"
        keeper = KeeperProcess(name, settings.size, cleanup.enter_context((logs / "keeper.log").open("w")), tier)
        cleanup.callback(keeper.stop)
        engines: list[AnyEngine] = []
        start = _starter(settings, name)
        for label in "AB":
            log = cleanup.enter_context((logs / f"engine-{label}.log").open("w"))
            engines.append(start(label, log))
            cleanup.callback(engines[-1].stop)
        progress("loading the model in two engines", 0, 1)
        try:
            return _converse(settings, keeper, [engine.ready() for engine in engines], progress)
        except Exception:
            for log_file in sorted(logs.glob("*.log")):
                print(f"--- {log_file.name}\n{log_file.read_text()[-4000:]}")
            raise


def _starter(settings: Settings, pool_name: str) -> Callable[[str, Any], AnyEngine]:
    if settings.engine == "vllm":
        from penstock.demo.servers import ServerEngine, Stored

        stored = Stored(pool_name)
        return lambda label, log: ServerEngine(label, settings.model_id, pool_name, log, stored)
    return lambda label, log: EngineProcess(label, settings.model_id, pool_name, log)


def _remove_segment(name: str) -> None:
    path = segments.default_path(name)
    path.unlink(missing_ok=True)
    segments.lock_path(path).unlink(missing_ok=True)


def _converse(
    settings: Settings,
    keeper: KeeperProcess,
    engines: list[AnyEngine],
    progress: Callable[[str, int, int], None],
) -> Result:
    facts = engines[0].facts
    result = Result(facts)
    story = Story(
        load_tokenizer(settings.model_id), load_conversations(), settings.new_tokens, facts["max_positions"],
        settings.n_conversations, settings.n_turns,
    )  # fmt: skip
    expectation = Expectation(facts["block_tokens"])
    total = story.n_requests + settings.n_conversations
    for engine in engines:  # the first long prompt is slow for reasons of the model's own
        engine.ask("generate", tokens=story.longest()[::-1], new_tokens=2, alone=True, session="warm-up")
    kill_at = story.n_requests // 2
    restart_at = min(kill_at + 2, story.n_requests - 1)
    for done, turn in enumerate(story.turns()):
        progress(f"conversation {turn.conversation}, turn {turn.number + 1}, engine {'AB'[turn.engine]}", done, total)
        if done == kill_at:
            keeper.kill()
        if done == restart_at:
            keeper.restart()
            _expect_return(engines, result)
        state = "" if done < kill_at else "keeper dead" if done < restart_at else "keeper restarted"
        answer = _one_turn(
            turn, engines[turn.engine], expectation, state, result,
            new_tokens=settings.new_tokens, pool_first=done % 2 == 0,
        )  # fmt: skip
        story.answered(turn, answer)
    _check_keeper(keeper, result)
    progress("the pool is deleted; the conversations are on disk", story.n_requests, total)
    _lose_pool(keeper, engines, result)
    for done, turn in enumerate(story.again(), story.n_requests):
        progress(f"conversation {turn.conversation} again, engine {'AB'[turn.engine]}", done, total)
        _one_turn(
            turn, engines[turn.engine], expectation, "back from disk", result,
            new_tokens=settings.new_tokens, pool_first=done % 2 == 0,
        )  # fmt: skip
    progress("done", total, total)
    _check_keeper(keeper, result)
    _check_disk(keeper, result)
    return result


def _lose_pool(keeper: KeeperProcess, engines: list[AnyEngine], result: Result) -> None:
    """Restart the whole pool with nothing in it but what the disk has."""
    if not keeper.wait_written():
        result.problems.append("the disk did not get everything in time")
    keeper.lose_pool()
    _expect_return(engines, result)


def _check_disk(keeper: KeeperProcess, result: Result) -> None:
    if not any(one.fetched_blocks for one in result.outcomes):
        result.problems.append("no block came back from disk")
    for tier in keeper.tiers()["tiers"]:
        if tier["counters"].get("damaged"):
            result.problems.append(f"{tier['counters']['damaged']} damaged blocks on disk")


def _expect_return(engines: list[AnyEngine], result: Result) -> None:
    for engine in engines:
        if not engine.ask("wait_for_keeper", timeout_s=KEEPER_BACK_S)["alive"]:
            result.problems.append(f"engine {engine.label} did not come back to the restarted keeper")


def _one_turn(
    turn: Turn,
    engine: AnyEngine,
    expectation: Expectation,
    state: str,
    result: Result,
    *,
    new_tokens: int,
    pool_first: bool,
) -> list[int]:
    """One request with the pool and the same one without it, in alternating order; compare, record."""
    expected, owner = expectation.hit(turn.prompt)
    request = {"tokens": turn.prompt, "new_tokens": new_tokens, "session": turn.conversation}
    answers = {}
    for alone in (False, True) if pool_first else (True, False):
        answers[alone] = engine.ask("generate", alone=alone, **request)
    pooled, alone_answer = answers[False], answers[True]
    equality = engine.ask("compare", prompt=turn.prompt, reference=alone_answer["tokens"], candidate=pooled["tokens"])
    for key in ("equal", "near_ties", "violations"):
        result.equality[key] += equality[key]
    result.equality["widest"] = max(result.equality["widest"], equality["widest"])
    outcome = Outcome(
        turn.conversation, turn.number, engine.label, _phase(expected, owner, turn.engine, state),
        len(turn.prompt), pooled["hit_tokens"], expected, pooled["miss"], pooled["ttft_s"], alone_answer["ttft_s"],
        pooled.get("fetched_blocks", 0),
    )  # fmt: skip
    result.outcomes.append(outcome)
    where = f"conversation {turn.conversation}, turn {turn.number + 1}, engine {engine.label}"
    if outcome.hit_tokens < expected:
        result.problems.append(f"{where}: hit {outcome.hit_tokens} of {expected} tokens ({outcome.miss})")
    if equality["violations"]:
        result.problems.append(f"{where}: {equality['violations']} tokens differ beyond the rule")
    if not pooled["stored"] and state != "keeper dead":
        result.problems.append(f"{where}: its blocks were not stored in time")
    # Without a keeper an engine stores into the slots that it has at hand, and drops what is more.
    kept = not pooled.get("dropped_blocks") and not engine.facts.get("drops_without_keeper")
    if pooled["stored"] or kept:
        expectation.saw(turn.prompt, pooled["tokens"], turn.engine)
    return list(pooled["tokens"])


def _phase(expected: int, owner: int | None, engine: int, state: str) -> str:
    if state:
        return state
    if not expected:
        return "first time seen"
    return "seen by the same process" if owner == engine else "seen by the other process"


def _check_keeper(keeper: KeeperProcess, result: Result) -> None:
    counters = keeper.stat()["counters"]
    damaged = counters["keeper"]["damaged"] + counters["clients"]["miss.checksum"]
    if damaged:
        result.problems.append(f"{damaged} damaged blocks")
