"""From samples to metrics, JSON and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.engines.documents import Documents
from benchmarks.engines.fresh import Fresh
from benchmarks.engines.loaded import Loaded
from benchmarks.engines.systems import SYSTEMS
from benchmarks.engines.traffic import Turn, ideal_hits
from benchmarks.engines.turns import Turns, hits_elsewhere
from penstock.bench.report import Goal, result
from penstock.bench.stats import Estimate, estimate, paired_ratios

__all__ = ["Report", "as_markdown"]

GOALS = {
    goal.name: goal
    for goal in (
        Goal("ttft_cross_process_over_local_hit", "x", 2.0, at_most=True),
        Goal("ttft_cross_process_over_recompute", "x", 0.06, at_most=True),
        Goal("ttft_cross_process_over_best_peer", "x", 0.5, at_most=True),
        Goal("connector_cpu_us_per_step", "us", 200.0, at_most=True),
        Goal("connector_threads_cpu_us_per_step", "us"),
        Goal("no_reuse_overhead_pct", "%", 2.0, at_most=True),
        Goal("lookup_8k_us_p50", "us", 200.0, at_most=True),
        Goal("trace_hits_of_ideal", "share", 1.0),
        Goal("ttft_hit_under_load_sync_ms", "ms"),
        Goal("ttft_hit_under_load_beside_ms", "ms"),
    )
}
PEERS = ("example", "offload", "lmcache")
# A peer that finds less of a document is not compared by its speed.
_PEER_HIT_SHARE = 0.9
_RESAMPLES, _SEED, _TAIL = 2000, 20, 2.5


class Report:
    """What a run found, piece by piece."""

    def __init__(self) -> None:
        self.results: list[dict[str, Any]] = []
        self.systems: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, str] = {}

    def _add(self, name: str, samples: npt.ArrayLike, *, baseline: float | None = None, note: str = "") -> None:
        row = np.asarray(samples, np.float64)
        self._add_estimate(name, estimate(row), len(row), baseline=baseline, note=note)

    def _add_estimate(
        self, name: str, found: Estimate, n: int, *, baseline: float | None = None, note: str = ""
    ) -> None:
        self.results.append({**asdict(result(GOALS[name], found, baseline=baseline, note=note)), "n": n})

    def _about(self, system: str) -> dict[str, Any]:
        return self.systems.setdefault(system, {"what": SYSTEMS[system]})

    def documents(self, samples: Mapping[str, Documents]) -> None:
        """The repeated document."""
        for name, one in samples.items():
            self._about(name)["document"] = {
                "ttft_recompute_ms": _ms(one.recompute_s),
                "ttft_cross_process_ms": _ms(one.cross_s),
                "ttft_same_server_ms": _ms(one.local_s),
                "hit_tokens_cross_process": int(np.median(one.cross_tokens)),
                "hit_tokens_same_server": int(np.median(one.local_tokens)),
                **_cpu("cross_process", one.cross_cpu_s),
                **_cpu("recompute", one.recompute_cpu_s),
                "answers_begin_alike": f"{sum(one.same_tokens)} of {len(one.same_tokens)}",
            }
        ours, alone = samples.get("penstock"), samples.get("none")
        if ours is None:
            return
        if alone is not None:
            self._ratio("ttft_cross_process_over_local_hit", ours.cross_s, alone.local_s, "vLLM's own prefix hit, ms")
            self._ratio("ttft_cross_process_over_recompute", ours.cross_s, alone.recompute_s, "recomputing, ms")
        for name, one in samples.items():
            if name in PEERS:
                ratios = _as_row(estimate(paired_ratios(ours.cross_s, one.cross_s)))
                self._about(name)["document"]["penstock_cross_process_over_this"] = ratios
        tokens = float(np.median(ours.local_tokens))
        peers = {
            name: samples[name]
            for name in PEERS
            if name in samples and np.median(samples[name].cross_tokens) >= _PEER_HIT_SHARE * tokens
        }
        if peers:
            best = min(peers, key=lambda name: float(np.median(peers[name].cross_s)))
            self._ratio("ttft_cross_process_over_best_peer", ours.cross_s, peers[best].cross_s, f"{best}, ms")

    def _ratio(self, name: str, above: Sequence[float], below: Sequence[float], what: str) -> None:
        self._add(name, paired_ratios(above, below), baseline=1000 * float(np.median(below)), note=f"baseline: {what}")

    def turns(self, samples: Mapping[str, Turns], turns: Sequence[Turn], block_tokens: int) -> None:
        """The conversations."""
        ideal = sum(ideal_hits(turns, block_tokens))
        for name, one in samples.items():
            seconds, tokens = np.asarray(one.total_s), np.asarray(one.tokens, np.float64)
            self._about(name)["conversations"] = {
                "ttft_p50_ms": _percentile_ms(one.ttft_s, 50),
                "ttft_p99_ms": _percentile_ms(one.ttft_s, 99),
                "tokens_per_s": _bootstrap(tokens, seconds),
                "hit_tokens": sum(one.cached_tokens),
                "hit_tokens_of_ideal": round(sum(one.cached_tokens) / ideal, 4) if ideal else None,
                "hit_tokens_from_other_process": hits_elsewhere(turns, one.cached_tokens, block_tokens),
                "prompt_tokens": sum(len(turn.prompt) for turn in turns),
                **_cpu("request", one.cpu_s),
            }
        ours = samples.get("penstock")
        if ours is not None and ideal:
            share = sum(ours.cached_tokens) / ideal
            note = f"{sum(ours.cached_tokens)} of {ideal} tokens that need not be computed; a count, not a sample"
            self._add_estimate("trace_hits_of_ideal", Estimate(share, share, share), len(turns), note=note)

    def fresh(self, samples: Mapping[str, Fresh]) -> None:
        """Traffic without reuse."""
        for name, one in samples.items():
            speeds = estimate(list(one.tokens_per_s.values()))
            self._about(name)["no_reuse"] = {"tokens_per_s": _as_row(speeds), "rounds": len(one.tokens_per_s)}
        alone, ours = samples.get("none"), samples.get("penstock")
        if alone is not None and ours is not None:
            ratios = paired_ratios([*ours.tokens_per_s.values()], [*alone.tokens_per_s.values()])
            tokens_per_s = float(np.median([*alone.tokens_per_s.values()]))
            note = "baseline: tokens/s without a connector"
            self._add("no_reuse_overhead_pct", 100 * (1 - ratios), baseline=tokens_per_s, note=note)
        if ours is not None and ours.times:
            steps = sum(times.steps for times in ours.times)
            note = f"median over batches of CPU time by steps that computed something, {steps:.0f} steps in all"
            per_step = [1e6 * times.engine_s / times.steps for times in ours.times]
            self._add("connector_cpu_us_per_step", per_step, note=f"the engine's own threads; {note}")
            per_step = [1e6 * times.threads_s / times.steps for times in ours.times]
            self._add("connector_threads_cpu_us_per_step", per_step, note=f"saver, loader and tie; {note}")

    def lookups(self, took_us: Sequence[float]) -> None:
        """The scheduler's lookup."""
        self._add("lookup_8k_us_p50", took_us, note=f"p99 {np.percentile(took_us, 99):.0f} us")

    def loaded(self, samples: Loaded) -> None:
        """A hit under load."""
        for name, seconds, tokens in (
            ("ttft_hit_under_load_sync_ms", samples.sync_s, samples.sync_tokens),
            ("ttft_hit_under_load_beside_ms", samples.beside_s, samples.beside_tokens),
        ):
            self._add(name, 1000 * np.asarray(seconds), note=f"{int(np.median(tokens))} tokens found")

    def as_json(self, machine: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
        """The document; `run` says how it was measured."""
        return {
            "machine": dict(machine), "run": dict(run), "results": self.results, "systems": self.systems,
            "left_out": self.left_out,
        }  # fmt: skip


def _as_row(found: Estimate) -> list[float]:
    """[value, low, high], five digits: more is noise."""
    return [float(f"{value:.5g}") for value in (found.value, found.low, found.high)]


def _ms(seconds: Sequence[float]) -> list[float]:
    return _as_row(estimate(1000 * np.asarray(seconds)))


def _cpu(what: str, seconds: Sequence[tuple[float, float]]) -> dict[str, list[float]]:
    answered, rest = zip(*seconds)
    return {f"cpu_ms_{what}_until_answer": _ms(answered), f"cpu_ms_{what}_until_rest": _ms(rest)}


def _percentile_ms(seconds: Sequence[float], q: float) -> list[float]:
    row = 1000 * np.asarray(seconds)
    drawn = row[np.random.default_rng(_SEED).integers(0, len(row), (_RESAMPLES, len(row)))]
    low, high = np.percentile(np.percentile(drawn, q, axis=1), (_TAIL, 100 - _TAIL))
    return _as_row(Estimate(float(np.percentile(row, q)), float(low), float(high)))


def _bootstrap(above: npt.NDArray[np.float64], below: npt.NDArray[np.float64]) -> list[float]:
    """Ratio of sums, over requests drawn again."""
    drawn = np.random.default_rng(_SEED).integers(0, len(above), (_RESAMPLES, len(above)))
    ratios = above[drawn].sum(axis=1) / below[drawn].sum(axis=1)
    low, high = np.percentile(ratios, (_TAIL, 100 - _TAIL))
    return _as_row(Estimate(float(above.sum() / below.sum()), float(low), float(high)))


# ---- the table


def as_markdown(document: Mapping[str, Any]) -> str:
    """The same for people."""
    machine, run = document["machine"], document["run"]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    lines = [
        "# vLLM with Penstock, alone, and with its peers",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_1min']} at the start. {versions}.",
        f"{run['about']} Values are medians with their 95% intervals.",
        "",
        "| metric | value | interval | n | target | met | |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    for row in document["results"]:
        goal = GOALS[row["name"]]
        target = "" if row["target"] is None else f"{'≤' if goal.at_most else '≥'} {row['target']:g}"
        met = "" if row["target"] is None else ("yes" if row["met"] else "**no**")
        base = "" if row["baseline"] is None else f" ({_number(row['baseline'])})"
        lines.append(
            f"| `{row['name']}` | {_number(row['value'])} {row['unit']} | {_number(row['low'])} – "
            f"{_number(row['high'])} | {row['n']} | {target} | {met} | {row['note']}{base} |"
        )
    lines += _systems(document, "document", "A repeated document")
    lines += _systems(document, "conversations", "Conversations, one request at a time, two servers in turn")
    lines += _systems(document, "no_reuse", "Traffic without reuse")
    for name, why in document["left_out"].items():
        lines += ["", f"Left out: {SYSTEMS.get(name, name)}: {why.splitlines()[0]}"]
    return "\n".join(lines) + "\n"


def _systems(document: Mapping[str, Any], part: str, title: str) -> list[str]:
    rows = {name: about[part] for name, about in document["systems"].items() if part in about}
    if not rows:
        return []
    names = [*rows]
    lines = ["", f"## {title}", "", "| | " + " | ".join(SYSTEMS[name] for name in names) + " |"]
    lines.append("|---|" + "---:|" * len(names))
    for key in dict.fromkeys(key for row in rows.values() for key in row):
        lines.append(f"| {key} | " + " | ".join(_cell(rows[name].get(key)) for name in names) + " |")
    return lines


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return f"{_number(value[0])} ({_number(value[1])} – {_number(value[2])})"
    return _number(value) if isinstance(value, (int, float)) else str(value or "")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
