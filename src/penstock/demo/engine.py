"""One engine process of the demo: a transformers model behind a connector, requests as JSON lines on stdin.

Run as `python -m penstock.demo.engine MODEL POOL`. Answers each line with one line on stdout; anything else that the
libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import penstock
from penstock.connectors.equality import compare_tokens
from penstock.connectors.transformers import Connector, FetchMode, RequestOptions
from penstock.demo.model import load_model
from penstock.types import Intent

__all__ = ["Engine", "main"]


class Engine:
    """A model and its connector; one method for each request the parent sends."""

    def __init__(self, model_id: str, pool_name: str) -> None:
        self._model = load_model(model_id)
        self._pool = penstock.open(pool_name, client=f"demo-engine-{os.getpid()}")
        self._dropped = 0
        # The demo must not lose a block to a busy machine: it lets saving wait longer than a server would.
        self._connector = Connector(self._model, self._pool, label="demo", save_wait_s=10.0)

    def facts(self) -> dict[str, Any]:
        """What the parent needs to know of the model. Digests the weights, so that no request has to."""
        space = self._connector.space
        return {
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in self._model.parameters()),
            "max_positions": getattr(self._model.config, "max_position_embeddings", None),
            "block_tokens": space.block_tokens,
            "block_bytes": space.block_bytes,
        }

    def generate(self, tokens: list[int], new_tokens: int, alone: bool, session: str) -> dict[str, Any]:
        """Greedy tokens after a prompt, with the pool or (`alone`) without it."""
        # What is on disk is to come from there, also where a model this small would be computed sooner.
        options = RequestOptions(
            skip_load=alone, skip_save=alone, fetch=FetchMode.ALWAYS, intent=Intent(session=session)
        )
        result = self._connector.generate(tokens, new_tokens, options=options, do_sample=False)
        stored = alone or (self._connector.flush(30.0) and not self._newly_dropped())
        return {
            "tokens": result.tokens,
            "hit_tokens": result.hit_tokens,
            "miss": result.miss.name.lower(),
            "ttft_s": result.ttft_s,
            "stored": stored,
            "fetched_blocks": result.fetched_blocks,
        }

    def _newly_dropped(self) -> int:
        """Blocks that the connector asked to store in vain since this was last asked."""
        dropped = sum(n for name, n in self._connector.counters().items() if name.startswith("save_dropped"))
        before, self._dropped = self._dropped, dropped
        return dropped - before

    def compare(self, prompt: list[int], reference: list[int], candidate: list[int]) -> dict[str, Any]:
        """The equality rule of `penstock.connectors.equality`."""
        equality = compare_tokens(self._model, prompt, reference, candidate)
        return {
            "equal": equality.equal,
            "near_ties": equality.near_ties,
            "violations": equality.violations,
            "widest": equality.widest,
        }

    def wait_for_keeper(self, timeout_s: float) -> dict[str, Any]:
        """Until this engine is back with a keeper, by itself; nothing here makes it come back."""
        deadline = time.monotonic() + timeout_s
        while not self._pool.keeper_alive and time.monotonic() < deadline:
            time.sleep(0.02)
        return {"alive": self._pool.keeper_alive}

    def counters(self) -> dict[str, Any]:
        return {"pool": self._pool.counters(), "connector": self._connector.counters()}

    def close(self) -> dict[str, Any]:
        self._connector.close()
        self._pool.close()
        return {}


def main(model_id: str, pool_name: str) -> None:
    """Serve requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_grad_enabled(False)
    engine = Engine(model_id, pool_name)
    print(json.dumps(engine.facts()), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        method: Callable[..., dict[str, Any]] = getattr(engine, request.pop("do"))
        print(json.dumps(method(**request)), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
