"""LoRA adapters: what is computed with one is shared with whoever has the same one, whatever it is called."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engines.blocks import ALONE, forget, hit_of
from tests.engines.client import Completion, complete
from tests.engines.fleet import Fleet
from tests.engines.models import prompt_tokens, tiny_llama
from tests.engines.server import ServerConfig, VllmServer, penstock_transfer
from tests.engines.variants import lora_adapter
from tests.support import Keeper, until


@dataclass
class Pair:
    """`one` knows the adapter as "poet" and another as "other"; `two` knows the first, in another folder, as "bard"."""

    one: VllmServer
    two: VllmServer
    folder: Path


@pytest.fixture(scope="module")
def pair(fleet: Fleet, models: Path, shared_keeper: Keeper) -> Pair:
    folder = models / "adapters"
    model = tiny_llama(models / "tiny-float32")

    def config(*names: str) -> ServerConfig:
        arguments = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--max-cpu-loras", "4")
        modules = ("--lora-modules", *(f"{name}={folder / name}" for name in names))
        variables = (("VLLM_SERVER_DEV_MODE", "1"), ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1"))
        transfer = penstock_transfer(shared_keeper.name)
        return ServerConfig(model, kv_transfer=transfer, arguments=(*arguments, *modules), variables=variables)

    for name, seed in {"poet": 1, "other": 2, "bard": 1}.items():
        lora_adapter(folder / name, seed=seed)
    return Pair(*fleet.get(config("poet", "other"), config("bard")), folder)


def ask(server: VllmServer, prompt: list[int], model: str, *, pool: bool = True) -> Completion:
    """An answer by an adapter of this name. The server's own cache, where adapters are told apart too, is empty."""
    forget(server)
    extra = {} if pool else {"kv_transfer_params": ALONE}
    return complete(server, prompt, model=model, **extra)


def adapters(server: VllmServer, what: str, **body: object) -> None:
    """Load or unload an adapter of a running server."""
    url, headers = f"{server.url}/v1/{what}_lora_adapter", {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=60) as answer:
        assert answer.status == 200


def test_adapters_never_share_but_with_themselves(pair: Pair) -> None:
    prompt = prompt_tokens(900, 1)
    expected = {name: ask(pair.one, prompt, name, pool=False).tokens for name in ("model", "poet", "other")}
    assert len(set(expected.values())) == 3, "the adapters change the answer"
    for name, tokens in expected.items():
        first = ask(pair.one, prompt, name)
        assert (first.cached_tokens, first.tokens) == (0, tokens), name
        again = until(lambda name=name: (a := ask(pair.one, prompt, name)).cached_tokens and a, "it is found")
        assert again.tokens == tokens, name
    # The other server: the same adapter by another name and path, and no adapter.
    for name, same in (("bard", "poet"), ("model", "model")):
        answer = ask(pair.two, prompt, name)
        # Its own handle of the adapter's space is asked for by the first request that needs it.
        answer = until(lambda name=name: (a := ask(pair.two, prompt, name)).cached_tokens and a, "it is found")
        assert (answer.cached_tokens, answer.tokens) == (hit_of(prompt), expected[same]), name


def test_files_that_changed_are_left_alone(pair: Pair) -> None:
    folder = lora_adapter(pair.folder / "moving", seed=5)
    adapters(pair.one, "load", lora_name="moving", lora_path=str(folder))
    prompt = prompt_tokens(500, 2)
    expected = ask(pair.one, prompt, "moving", pool=False).tokens
    until(lambda: ask(pair.one, prompt, "moving").cached_tokens == hit_of(prompt), "it is stored and found")
    lora_adapter(folder, seed=6)
    answer = ask(pair.one, prompt, "moving")
    assert (answer.cached_tokens, answer.tokens) == (0, expected), "the engine still has the first ones"
    pair.one.wait_log("the files of adapter 'moving' changed after it was first used")
    # Loaded again, it is another adapter, of which the pool has nothing.
    adapters(pair.one, "unload", lora_name="moving")
    adapters(pair.one, "load", lora_name="moving", lora_path=str(folder))
    fresh = ask(pair.one, prompt, "moving", pool=False).tokens
    assert fresh != expected
    answer = ask(pair.one, prompt, "moving")
    assert (answer.cached_tokens, answer.tokens) == (0, fresh)
