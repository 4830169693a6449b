"""`penstock demo`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from penstock.errors import ConfigError

__all__ = ["demo"]


def demo(model: str, size: str, conversations: int, turns: int, new_tokens: int, out: Path | None, engine: str) -> None:
    """Run the demo and print its table. Exit status 1 if an output differs beyond the rule or a hit is missing."""
    try:
        from penstock.demo.model import SHIPPED_MODEL
        from penstock.demo.run import Result, Settings, run_demo
    except ImportError as error:
        raise ConfigError(f"the demo needs PyTorch and transformers ({error}): pip install 'penstock[demo]'") from error
    if engine == "vllm":
        from penstock.connectors.vllm.versions import check_version

        check_version()
    console = Console()
    settings = Settings(model or SHIPPED_MODEL, size, conversations, turns, new_tokens, engine)
    columns = TextColumn("{task.description:52}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1)
        result: Result = run_demo(
            settings, lambda text, done, total: bar.update(task, description=text, completed=done, total=total)
        )
    _show(console, result)
    if out is not None:
        out.write_text(json.dumps(_as_json(result), indent=1) + "\n")
    raise typer.Exit(1 if result.problems else 0)


def _show(console: Console, result: Any) -> None:
    from penstock.demo.run import PHASES

    model = result.model
    console.print(
        f"model: {model['parameters'] / 1e6:.1f} M parameters, {model['dtype']}; "
        f"a block is {model['block_tokens']} tokens, {model['block_bytes'] / 1024:g} KiB"
    )
    table = Table(title="Time to first token (median)", title_justify="left")
    for column in ("prefix", "requests", "hit", "of tokens", "TTFT ms", "of alone"):
        table.add_column(column, justify="left" if column == "prefix" else "right")
    alone = result.median_ms(None)
    prompts = sum(one.prompt_tokens for one in result.outcomes)
    table.add_row("without the pool", str(len(result.outcomes)), "0", str(prompts), f"{alone:.0f}", "1")
    for phase in PHASES:
        mine = [one for one in result.outcomes if one.phase == phase]
        if not mine:
            continue
        ratio = sum(one.ttft_s for one in mine) / sum(one.ttft_alone_s for one in mine)
        hits, prompt = sum(one.hit_tokens for one in mine), sum(one.prompt_tokens for one in mine)
        table.add_row(phase, str(len(mine)), str(hits), str(prompt), f"{result.median_ms(phase):.0f}", f"{ratio:.2f}")
    console.print(table)
    equality = result.equality
    console.print(
        f"output against the engine alone: {equality['equal']:.0f} tokens equal, {equality['near_ties']:.0f} near-ties "
        f"(top logits within {equality['widest']:.3f}), {equality['violations']:.0f} beyond the rule"
    )
    for problem in result.problems:
        console.print(f"[red]{problem}")
    console.print("[green]every expected hit was there" if not result.problems else "[red]FAILED")


def _as_json(result: Any) -> dict[str, Any]:
    from penstock.bench.machine import describe_machine

    return {
        "machine": describe_machine(),
        "model": result.model,
        "equality": result.equality,
        "problems": result.problems,
        "requests": [asdict(one) for one in result.outcomes],
    }
