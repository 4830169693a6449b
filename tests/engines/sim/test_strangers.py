"""What must not be found: blocks of another adapter, salt, image or of before a reset; and pools that come late, go and
come back."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from penstock import KeyChain, Pool
from penstock.connectors.vllm.messages import Variant
from penstock.connectors.vllm.requests import chain_extras
from penstock.connectors.vllm.spaces import Adapters
from penstock.errors import NoKeeper
from tests.engines.sim.engine import Engine
from tests.engines.sim.house import House, prompt
from tests.engines.sim.model import answer
from tests.engines.sim.runner import BLOCK
from tests.support import Keeper, until

P = [*prompt(12, 6 * BLOCK), 1, 2]
HIT = 6 * BLOCK


# ---- adapters, salts, images, embeddings


def adapter(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def depends_on_adapter(data: Any) -> list[int]:
    """What the model of arithmetic takes from an adapter: its weights' bytes, not its name."""
    request = data.lora_request
    if request is None:
        return []
    return [zlib.crc32((Path(request.lora_path) / "adapter_model.safetensors").read_bytes())]


def wait_known(engine: Engine, variant: Variant) -> None:
    """Until every half has the spaces of a variant; before that its requests are misses, and are not stored."""
    for half in (engine.half, *engine.workers):
        for space in engine.half._ranks.spaces(variant).values():
            until(lambda half=half, space=space: half._tie.handle(space), "the space is registered")


def ask_adapter(house: House, engine: Engine, folder: Path, name: str, number: int) -> int:
    """Hit tokens of P with an adapter; its tokens are checked."""
    request = LoRARequest(name, number, str(folder))
    extras = [zlib.crc32((folder / "adapter_model.safetensors").read_bytes())] * len(P)
    right = answer(P, 9, extras)
    extras += extras[:1] * len(right)
    variant = Variant(Adapters().digest(request))
    house.expect(engine, [*P, *right], extras, variant)
    wait_known(engine, variant)
    before = engine.counter("hit_tokens")
    engine.runner.extras_of = depends_on_adapter
    asked = engine.add(P, 9, lora_request=request)
    house.asked.append((engine, asked, right))
    engine.settle()
    return engine.counter("hit_tokens") - before


def test_adapters_are_told_apart_by_their_weights(house: House, tmp_path: Path) -> None:
    a, same = adapter(tmp_path / "a", b"weights of a"), adapter(tmp_path / "other folder", b"weights of a")
    b = adapter(tmp_path / "b", b"weights of b")
    assert house.hit(house.engine(), P) == 0
    assert ask_adapter(house, house.engine(), a, "chat", 1) == 0
    assert ask_adapter(house, house.engine(), b, "chat", 1) == 0
    # What the adapter is called where does not matter.
    assert ask_adapter(house, house.engine(), same, "another name", 7) == HIT
    assert house.hit(house.engine(), P) == HIT
    house.finish()


def test_an_adapter_that_cannot_be_read_is_left_alone(house: House, tmp_path: Path) -> None:
    house.ask(house.engine(), P)
    engine = house.engine()
    engine.add(P, 4, lora_request=LoRARequest("gone", 1, str(tmp_path / "gone")))
    engine.settle()
    assert engine.counter("hit_tokens") == 0 and engine.counter("left_alone.unknown_adapter") == 1
    assert engine.counter("save.blocks") == 0
    house.finish()


def salted(house: House, engine: Engine, salt: str) -> int:
    right = answer(P, 3)
    name = engine.add(P, 3, cache_salt=salt)
    house.expect(engine, [*P, *right], block_extras=chain_extras(engine.requests[name], BLOCK))
    house.asked.append((engine, name, right))
    before = engine.counter("hit_tokens")
    engine.settle()
    return engine.counter("hit_tokens") - before


def test_salts(house: House) -> None:
    assert house.hit(house.engine(), P) == 0
    assert salted(house, house.engine(), "blue") == 0
    assert salted(house, house.engine(), "green") == 0
    assert salted(house, house.engine(), "blue") == HIT
    assert house.hit(house.engine(), P) == HIT
    house.finish()


def picture(content: str, offset: int, length: int = 20) -> MultiModalFeatureSpec:
    place = PlaceholderRange(offset=offset, length=length)
    return MultiModalFeatureSpec(data=None, modality="image", identifier=content, mm_position=place, mm_hash=content)


def trusting(house: House) -> Engine:
    """An engine that takes vLLM's hashes of items for their content."""
    engine = house.engine()
    engine.half._config = msgspec.structs.replace(engine.half._config, trust_item_hashes=True)
    return engine


def keys_with(engine: Engine, *pictures: MultiModalFeatureSpec) -> list[bytes]:
    """Keys of P's blocks with these pictures in it. The scheduler of a text model cannot run them."""
    name = f"p{len(engine.requests)}"
    engine.add(P, 1, name=name, mm_features=list(pictures))
    tracked = engine.half._tracked[name]
    engine.half._lookup(tracked, 0)
    keys = [key.tobytes() for key in next(iter(tracked.chains.values())).array] if tracked.chains else []
    engine.abort(name)
    return keys


def test_images_by_content_and_place(house: House) -> None:
    engine = trusting(house)
    cat, dog = "c" * 64, "d" * 64
    plain, one = keys_with(engine), keys_with(engine, picture(cat, 20))
    assert one[:1] == plain[:1], "before the image nothing depends on it"
    assert not set(one[1:]) & set(plain)
    assert keys_with(engine, picture(cat, 20)) == one
    for other in (picture(dog, 20), picture(cat, 21), picture(cat, 20, 21)):
        assert not set(keys_with(engine, other)[1:]) & set(one)
    engine.scheduler.finished_req_ids.clear()


def test_an_image_is_left_alone_unless_its_hash_is_trusted(house: House) -> None:
    engine = house.engine()
    name = engine.add(P, 1, mm_features=[picture("c" * 64, 20)])
    tracked = engine.half._tracked[name]
    assert not tracked.may_load and not tracked.may_save
    assert engine.counter("left_alone.multimodal") == 1
    engine.abort(name)


def test_an_image_without_a_content_hash_is_left_alone(house: House) -> None:
    engine = trusting(house)
    name = engine.add(P, 1, mm_features=[picture("named-by-the-client", 20)])
    tracked = engine.half._tracked[name]
    assert not tracked.may_load and not tracked.may_save
    assert engine.counter("left_alone.item_without_content_hash") == 1
    engine.abort(name)


def test_prompt_embeddings_are_left_alone(house: House) -> None:
    """All their token ids are zero: by tokens they would all be the same."""
    zeros = [0] * len(P)
    house.ask(house.engine(), zeros)
    one, other = house.engine(), house.engine()
    for engine, seed in ((one, 1), (other, 2)):
        engine.runner.extras_of = lambda data, seed=seed: [seed * 1000 + at for at in range(len(P))]
        name = engine.add([], 1, prompt_embeds=torch.ones(len(P), 8) * seed, no_tokens=True)
        engine.settle()
        assert engine.tokens[name] == answer(zeros, 1, [seed * 1000 + at for at in range(len(P))])
        assert engine.counter("left_alone.prompt_embeds") == 1
        assert engine.counter("hit_tokens") == engine.counter("save.blocks") == 0
    house.finish()


# ---- resets


def test_after_a_reset_blocks_of_before_are_not_found(house: House) -> None:
    engine, other = house.engine(), house.engine()
    house.ask(engine, P)
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    variant = Variant(epoch=engine.half._epoch)
    wait_known(engine, variant)
    house.expect(engine, [*P, *answer(P, 60)], variant=variant)
    assert house.hit(engine, P) == 0
    assert engine.scheduler.reset_prefix_cache()
    assert house.hit(engine, P) == HIT, "its own of after the reset"
    assert house.hit(other, P) == HIT, "others did not reset"
    house.finish()


def test_a_reset_while_requests_run(house: House) -> None:
    """What they computed before is of the old weights: nothing of it may be stored as new."""
    engine = house.engine()
    name = house.add(engine, P, 60)
    for _ in range(5):
        engine.step()
    engine.scheduler.reset_connector_cache()
    wait_known(engine, Variant(epoch=engine.half._epoch))
    house.finish()
    (space,) = engine.half._ranks.spaces(Variant(epoch=engine.half._epoch)).values()
    handle = engine.pools[0].space(space)
    chain = KeyChain(space)
    chain.extend([*P, *engine.tokens[name]][: 9 * BLOCK])
    assert not engine.pools[0].resident(handle, chain.array).any()


# ---- pools that come late, go and come back


class Late:
    """Opens the pool, once it is said to be there."""

    def __init__(self, house: House) -> None:
        self.house, self.there = house, False

    def __call__(self, name: str, **options: Any) -> Pool:
        if not self.there:
            raise NoKeeper(f"no keeper serves {name!r}")
        return self.house.open(name, **options)


def quick(engine: Engine) -> None:
    for half in (engine.half, *engine.workers):
        half._tie._retry_s = 0.01
        with half._tie._changed:
            half._tie._asked = True
            half._tie._changed.notify_all()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_keeper_that_comes_late(house: House, ranks: int) -> None:
    late = Late(house)
    engine = house.engine(open_pool=late, ranks=ranks, prefix_caching=False)
    assert house.hit(engine, P) == 0
    assert not engine.pools and engine.counter("no_keeper") > 0
    quick(engine)
    late.there = True
    until(lambda: len(engine.pools) == 1 + ranks, "all halves are attached")
    until(lambda: all(not half._tie._wanted for half in (engine.half, *engine.workers)), "the spaces are there")
    # The first one's reports tell the scheduler that the workers are attached.
    house.ask(engine, prompt(1, 5))
    house.ask(engine, P)
    assert house.hit(engine, P) == HIT
    house.finish()


@pytest.mark.parametrize("kind", [{}, {"overlap": True}, {"ranks": 2}], ids=str)
def test_a_keeper_that_dies_and_comes_back(house: House, keeper: Keeper, kind: dict[str, Any]) -> None:
    engine = house.engine(prefix_caching=False, **kind)
    house.ask(engine, P)
    keeper.kill()
    until(lambda: not any(pool._link.alive for pool in engine.pools), "they know")
    names = [house.add(engine, [*P, *prompt(seed, 80)], 20) for seed in range(3)]
    engine.run(*names)
    house.tokens_right()
    assert engine.counter("hit_tokens") == 3 * HIT, "reads go on without a keeper"
    keeper.start()
    for pool in (*engine.pools, house.keeper_pool):
        until(lambda pool=pool: pool._link.alive, "back")
    house.ask(engine, [*P, *prompt(1, 80)], 20)
    assert house.hit(engine, [*P, *prompt(1, 80)]) > HIT
    house.finish()


def test_a_pool_that_was_replaced(house: House, keeper: Keeper) -> None:
    """Another segment under the same name: nothing in it yet, and nothing of the old one is taken for it."""
    engine = house.engine(prefix_caching=False)
    house.ask(engine, P)
    uuid = engine.pools[0].uuid
    keeper.kill()
    os.unlink(keeper.path)
    keeper.start()
    everybody = [*engine.pools, house.keeper_pool]
    for pool in everybody:
        until(lambda pool=pool: pool._link.alive and pool.uuid != uuid, "back on the new one")
    house.ask(engine, prompt(1, 5))
    before = engine.counter("hit_tokens")
    house.ask(engine, P)
    assert engine.counter("hit_tokens") == before
    house.ask(engine, P)
    assert engine.counter("hit_tokens") == before + HIT
    house.finish()
