"""Calls that may be left behind: order, bounds, deadlines, and ends that nobody waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from penstock.errors import TierTimeout, TierUnavailable
from penstock.tiers.crew import Crew, Ended
from tests.support import PATIENCE_S, until


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What calls of a test wait for; opened at its end."""
    event = threading.Event()
    yield event
    event.set()


def soon() -> float:
    return time.monotonic() + PATIENCE_S


def waiting(gate: threading.Event, n: int) -> Iterator[Callable[[], bool]]:
    return iter([lambda: gate.wait(PATIENCE_S)] * n)


def nothing(_: Ended[bool]) -> None:
    raise AssertionError("a call ended that should hang")


def test_every_call_ends_once_in_the_calling_thread() -> None:
    crew, ends, threads = Crew("t", 3, 3), [], set()

    def take(ended: Ended[int]) -> None:
        threads.add(threading.get_ident())
        ends.append((ended.index, ended.value))

    crew.run((lambda i=i: i * i for i in range(50)), soon(), take)
    assert sorted(ends) == [(i, i * i) for i in range(50)]
    assert threads == {threading.get_ident()}
    assert crew.close()


def test_at_most_a_window_of_calls_is_open_and_the_rest_is_not_drawn(gate: threading.Event) -> None:
    crew, drawn = Crew("t", 4, 8), []

    def calls() -> Iterator[Callable[[], bool]]:
        for i in range(10):
            drawn.append(i)
            yield lambda: gate.wait(PATIENCE_S)

    with pytest.raises(TierTimeout):
        crew.run(calls(), time.monotonic() + 0.05, nothing, window=2)
    assert drawn == [0, 1, 2]
    assert crew.left == 2


def test_errors_are_handed_over_and_those_of_take_are_raised() -> None:
    crew, errors = Crew("t", 2, 2), []

    def fail() -> int:
        raise ValueError("mine")

    crew.run(iter([fail]), soon(), lambda ended: errors.append(ended.error))
    assert [type(each) for each in errors] == [ValueError]
    with pytest.raises(ValueError, match="mine"):
        crew.run(iter([fail, fail]), soon(), _raise)
    crew.run(iter([int]), soon(), lambda ended: errors.append(ended.value))
    assert errors[-1] == 0
    assert crew.close()


def _raise(ended: Ended[int]) -> None:
    assert ended.error is not None
    raise ended.error


def test_a_deadline_leaves_calls_behind_and_others_go_on(gate: threading.Event) -> None:
    crew = Crew("t", 2, 10)
    begun = threading.Semaphore(0)

    def hang() -> bool:
        begun.release()
        return gate.wait(PATIENCE_S)

    with pytest.raises(TierTimeout):
        crew.run(iter([hang, hang]), time.monotonic() + 0.2, nothing)
    left = crew.left
    assert left >= 1
    ends: list[int] = []
    crew.run((lambda i=i: i for i in range(5)), soon(), lambda ended: ends.append(ended.index))
    assert sorted(ends) == [0, 1, 2, 3, 4]
    gate.set()
    until(lambda: crew.left == 0, "what was left behind ended")
    assert crew.left_total == left
    assert crew.close()


def test_calls_that_wait_behind_a_hung_batch_get_threads_once_it_is_given_up(gate: threading.Event) -> None:
    crew, ends = Crew("t", 2, 10), []
    other = threading.Thread(
        target=lambda: crew.run((lambda i=i: i for i in range(4)), soon(), lambda ended: ends.append(ended.index))
    )

    def calls() -> Iterator[Callable[[], bool]]:
        yield lambda: gate.wait(PATIENCE_S)
        yield lambda: gate.wait(PATIENCE_S)
        other.start()
        yield lambda: gate.wait(PATIENCE_S)

    with pytest.raises(TierTimeout):
        crew.run(calls(), time.monotonic() + 0.3, nothing)
    other.join(PATIENCE_S)
    assert sorted(ends) == [0, 1, 2, 3]


def test_calls_that_pile_up_are_refused_at_once(gate: threading.Event) -> None:
    crew, refused = Crew("t", 2, 5), None
    for _ in range(10):
        try:
            crew.run(waiting(gate, 2), time.monotonic() + 0.1, nothing)
        except TierTimeout:
            continue
        except TierUnavailable as error:
            refused = error
            break
    assert refused is not None and "hang" in str(refused)
    assert 5 <= crew.left <= 6
    gate.set()
    until(lambda: crew.left == 0, "they ended")
    crew.run(iter([int]), soon(), lambda ended: None)
    assert crew.close()


def test_a_call_that_had_not_begun_never_does(gate: threading.Event) -> None:
    crew, ran = Crew("t", 1, 10), []
    with pytest.raises(TierTimeout):
        crew.run(
            iter([lambda: gate.wait(PATIENCE_S), lambda: bool(ran.append(1))]),
            time.monotonic() + 0.1,
            nothing,
            window=2,
        )
    gate.set()
    until(lambda: crew.left == 0, "the first ended")
    crew.run(iter([int]), soon(), lambda ended: None)
    assert ran == []


def test_a_past_deadline_begins_nothing() -> None:
    crew, ran = Crew("t", 1, 1), []
    with pytest.raises(TierTimeout):
        crew.run(iter([lambda: ran.append(1)]), time.monotonic() - 1.0, lambda ended: None)
    assert ran == []


def test_closing_wakes_who_waits_and_refuses_more(gate: threading.Event) -> None:
    crew, raised = Crew("t", 2, 10), []
    begun = threading.Event()

    def hang() -> bool:
        begun.set()
        return gate.wait(PATIENCE_S)

    def run() -> None:
        try:
            crew.run(iter([hang, hang, hang]), soon(), nothing)
        except TierUnavailable as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(PATIENCE_S)
    assert not crew.close(patience_s=0.05)
    thread.join(PATIENCE_S)
    assert len(raised) == 1
    with pytest.raises(TierUnavailable, match="closed"):
        crew.run(iter([int]), soon(), lambda ended: None)
    gate.set()
    until(lambda: crew.close(patience_s=0.05), "all ended")
