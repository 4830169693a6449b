"""Fetch or recompute: time to first token as the cost model decides, over the better of always doing either.

The demo's model behind the transformers connector, its prompts on a disk tier whose reads are slowed to a given speed,
and nothing of them in the pool before each request. The three modes take turns on each prompt. Which of always-fetch
and always-recompute is the better one is said by their medians at that speed: the smaller of two single times would be
smaller than either, by chance alone. The ratio to it is taken for every prompt and round, and the worst speed counts.
Requests store what they compute, as they do by default: only then may the front be computed while the back comes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from penstock.bench.pool.base import Group, Scale
from penstock.bench.report import Result, result
from penstock.bench.stats import estimate
from penstock.bench.tiers.folder import bench_folder
from penstock.bench.tiers.serving import forget, served, wait_written
from penstock.identity import chain_keys

__all__ = ["run"]

_SPEEDS = ("50M", "200M", "1G", "5G")


def run(group: Group, scale: Scale) -> Iterator[Result]:
    full = scale.name == "full"
    ratios, shown = {}, []
    for speed in _SPEEDS if full else _SPEEDS[-1:]:
        times = _measure(speed, *((4, 9) if full else (1, 1)))
        best = min(times["always"], times["never"], key=np.median)
        ratios[speed] = (times["auto"] / best).tolist()
        medians = ", ".join(f"{mode} {1e3 * float(np.median(each)):.0f}" for mode, each in times.items())
        shown.append(f"{speed}B/s: {float(np.median(ratios[speed])):.3f} (ms: {medians})")
    worst = max(ratios, key=lambda speed: float(np.median(ratios[speed])))
    yield result(group.goals[0], estimate(ratios[worst]), note="; ".join(shown))


def _measure(speed: str, n_prompts: int, rounds: int) -> dict[str, npt.NDArray[np.float64]]:
    """Seconds by mode, one for each prompt and round."""
    import torch

    from penstock.connectors.transformers import Connector, FetchMode, RequestOptions
    from penstock.demo.model import SHIPPED_MODEL, load_conversations, load_model, load_tokenizer

    torch.set_grad_enabled(False)
    model, tokenizer, texts = load_model(SHIPPED_MODEL), load_tokenizer(SHIPPED_MODEL), load_conversations()
    system = tokenizer(texts.system)["input_ids"]
    prompts = [tokenizer(f"Case {n}. ")["input_ids"] + system for n in range(n_prompts)]
    times: dict[str, list[float]] = {mode: [] for mode in ("auto", "always", "never")}
    with bench_folder() as folder:
        tier = f"disk:{folder}/d?size=2G&write=through&bandwidth={speed}"
        with (
            served("1G", [tier]) as serving,
            serving.open() as pool,
            Connector(model, pool, save_wait_s=5.0) as connector,
        ):
            handle = pool.space(connector.space, "bench")
            chains = [chain_keys(connector.space, prompt[:-1]) for prompt in prompts]
            for prompt in prompts:
                connector.generate(prompt, 1, do_sample=False)
            connector.flush(60.0)
            wait_written(serving, len({key for chain in chains for key in map(bytes, chain)}))
            for number in range(-1, rounds):
                for prompt, chain in zip(prompts, chains, strict=True):
                    for mode in np.roll(list(times), number):
                        connector.flush(60.0)
                        forget(pool, handle, chain)
                        options = RequestOptions(fetch=FetchMode(str(mode)))
                        took = connector.generate(prompt, 1, options=options, do_sample=False).ttft_s
                        if number >= 0:
                            times[str(mode)].append(took)
    return {mode: np.array(each) for mode, each in times.items()}
