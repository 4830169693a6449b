"""Faults that somebody found who had not written the connector. Each was shown before it was fixed."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from vllm.lora.request import LoRARequest

from penstock.connectors.vllm.messages import Variant
from penstock.connectors.vllm.spaces import Adapters
from penstock.errors import Refused
from tests.engines.sim.engine import Engine
from tests.engines.sim.house import House, prompt
from tests.engines.sim.model import answer
from tests.engines.sim.runner import BLOCK
from tests.engines.sim.test_call_off import Gate
from tests.engines.sim.test_strangers import P, adapter, depends_on_adapter, wait_known
from tests.support import PATIENCE_S

ADAPTER_FILE = "adapter_model.safetensors"


@pytest.mark.parametrize("abort", [False, True])
@pytest.mark.parametrize("reset_connector", [False, True])
def test_preempted_by_a_reset_and_aborted_before_the_next_step(
    house: House, abort: bool, reset_connector: bool
) -> None:
    """Its saves are called off although nobody knows the request any more: its pages go to others."""
    gate = Gate(house)
    engine = house.engine(pages=48, prefix_caching=True)
    saver = engine.workers[0]._saver
    call_off = saver.call_off

    def opened(requests: set[str]) -> None:
        gate.open.set()
        call_off(requests)

    saver.call_off = opened  # type: ignore[method-assign]
    first = house.add(engine, prompt(1, 20 * BLOCK + 3), 40)
    gate.close()
    for _ in range(3):
        engine.step()
    assert gate.reached.wait(PATIENCE_S)
    engine.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=reset_connector)
    if abort:
        engine.abort(first)
    house.before_store = None
    engine.add(prompt(2, 40 * BLOCK), 4)
    for _ in range(4):
        engine.step()
    gate.open.set()
    engine.settle()
    wrong = [one for one in house.poisoned if "clean" in one]
    house.poisoned.clear()
    assert not wrong


def asked_with(house: House, engine: Engine, request: LoRARequest, folder: Path) -> bool:
    """Whether a request with this adapter is answered right."""
    extras = [zlib.crc32((folder / ADAPTER_FILE).read_bytes())] * len(P)
    right = answer(P, 9, extras)
    extras += extras[:1] * len(right)
    variant = Variant(Adapters().digest(request))
    house.expect(engine, [*P, *right], extras, variant)
    wait_known(engine, variant)
    engine.runner.extras_of = depends_on_adapter
    name = engine.add(P, 9, lora_request=request)
    engine.settle()
    return list(engine.tokens[name]) == right


@pytest.mark.parametrize("in_place", [True, False], ids=["load_inplace", "unloaded and loaded"])
def test_new_adapter_files_under_the_same_name_and_path(house: House, tmp_path: Path, in_place: bool) -> None:
    """The engine's own prefix cache goes by name and path, so that it hands out the old adapter's pages: they must not
    be stored as the new one's."""
    folder = adapter(tmp_path / "a", b"version 1")
    engine = house.engine()
    assert asked_with(house, engine, LoRARequest("chat", 1, str(folder)), folder)
    (folder / ADAPTER_FILE).write_bytes(b"version 2!")
    asked_with(house, engine, LoRARequest("chat", 1 if in_place else 2, str(folder), load_inplace=in_place), folder)
    wrong, house.poisoned[:] = list(house.poisoned), []
    assert not wrong
    assert asked_with(house, house.engine(), LoRARequest("other", 5, str(folder)), folder)
    house.poisoned.clear()


def test_adapter_files_that_change_while_they_are_read(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is raised, the request is answered without the pool."""
    folder = adapter(tmp_path / "a", b"version 1")

    def changing(*_: object) -> str:
        raise RuntimeError("changed while it was read")

    monkeypatch.setattr("penstock.connectors.vllm.spaces.weights_digest", changing)
    with pytest.raises(RuntimeError):
        Adapters().digest(LoRARequest("chat", 1, str(folder)))
    engine = house.engine()
    engine.add(P, 3, lora_request=LoRARequest("chat", 1, str(folder)))
    engine.settle()
    assert engine.counter("left_alone.unknown_adapter") == 1
    house.poisoned.clear()


def test_a_load_that_fails_as_a_whole_is_not_asked_for_again(house: House) -> None:
    """vLLM would never give its request pages again, nor anybody behind it."""
    long = prompt(1, 13 * BLOCK + 1)
    house.ask(house.engine(), long)
    engine = house.engine(pages=24, extra={"sync_load_ms": 0.0, "load_deadline_s": 1e-9})
    name = house.add(engine, long, 4)
    for _ in range(2000):
        if engine.is_done(name):
            break
        engine.step()
    assert engine.is_done(name)
    house.finish()


def test_a_reset_while_the_engine_keeps_its_own_cache(house: House) -> None:
    """vLLM refuses to reset its prefix cache while requests run, and resets ours all the same: what it then finds in
    its own is of the old weights, and is not stored."""
    engine = house.engine()
    house.expect(engine, [*P, *answer(P, 200)])
    engine.add(P, 200)
    for _ in range(3):
        engine.step()
    assert not engine.scheduler.reset_prefix_cache(False, True)
    variant = Variant("", engine.half._epoch)
    engine.runner.extras_of = lambda data: [77]
    house.expect(engine, [*P, 5, *answer([*P, 5], 3, [77] * 400)], [77] * 400, variant)
    wait_known(engine, variant)
    engine.add([*P, 5], 3)
    engine.settle()
    wrong = [one for one in house.poisoned if "clean" in one]
    house.poisoned.clear()
    assert not wrong


def test_changed_files_are_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", b"version 1")
    adapters = Adapters()
    adapters.digest(LoRARequest("chat", 1, str(folder)))
    (folder / ADAPTER_FILE).write_bytes(b"version 2!")
    with pytest.raises(Refused, match="changed after"):
        adapters.digest(LoRARequest("chat", 2, str(folder)))
    assert adapters.digest(LoRARequest("chat 2", 2, str(folder)))
