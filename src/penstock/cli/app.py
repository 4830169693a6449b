"""The commands and their options; each does its work in a module of its own."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="penstock",
    help="One pool of memory under every inference engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class DemoEngine(StrEnum):
    """What serves the demo's model."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


Name = Annotated[str, typer.Option("--name", "-n", help="The pool's name.")]
PathOption = Annotated[Path | None, typer.Option("--path", help="The segment's file; default: in /dev/shm, by name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def serve(
    name: Name = "default",
    size: Annotated[str, typer.Option("--size", help="Bytes, or 512M, 20G; default: what can be spared.")] = "",
    path: PathOption = None,
    slab: Annotated[str, typer.Option("--slab", help="Slab size; at least the largest block.")] = "",
    tier: Annotated[
        list[str] | None,
        typer.Option(
            "--tier", "-t", help="A tier below the pool, such as disk:/var/cache/penstock?size=64G; repeatable."
        ),
    ] = None,
    replicas: Annotated[
        list[str] | None,
        typer.Option("--replicas", help="Tiers that blocks are written to: N, or TENANT=N; repeatable."),
    ] = None,
    tenant_cap: Annotated[
        list[str] | None,
        typer.Option("--tenant-cap", help="TENANT=SIZE: bytes a second for a tenant's moves; repeatable."),
    ] = None,
    coherent: Annotated[
        bool,
        typer.Option(help="Whether all hosts that map the memory see each other's stores; fixed when it is created."),
    ] = True,
    verbose: Annotated[bool, typer.Option("--verbose", "-v")] = False,
    numa: Annotated[int, typer.Option("--numa", hidden=True, help="Take the memory from this NUMA node.")] = -1,
    parent: Annotated[int, typer.Option("--parent", hidden=True, help="Stop when this process, the parent, ends.")] = 0,
) -> None:
    """Serve a pool in the foreground, until Ctrl-C. An existing pool goes on with what it holds."""
    from penstock.cli.serve import serve as run

    run(
        name, size, path, slab, verbose, tiers=tier or (), replicas=replicas or (), tenant_caps=tenant_cap or (),
        coherent=coherent, numa=None if numa < 0 else numa, parent=parent or None,
    )  # fmt: skip


@app.command()
def stat(name: Name = "default", json: AsJson = False) -> None:
    """Show a pool's size, use, clients and counters."""
    from penstock.cli.stat import stat as run

    run(name, json)


@app.command(name="ls")
def list_(name: Name = "default", json: AsJson = False) -> None:
    """List spaces and chains with their ages and hits."""
    from penstock.cli.ls import ls as run

    run(name, json)


@app.command()
def fsck(
    name: Name = "default",
    path: PathOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tables only; do not verify the blocks' bytes.")] = False,
    json: AsJson = False,
) -> None:
    """Check that a pool agrees with itself. Exit status 1 if it does not."""
    from penstock.cli.fsck import fsck as run

    run(name, path, quick, json)


@app.command()
def demo(
    model: Annotated[str, typer.Option("--model", help="Directory or hub id of a causal language model.")] = "",
    size: Annotated[str, typer.Option("--size", help="The pool's size.")] = "512M",
    conversations: Annotated[int, typer.Option(min=2, max=50)] = 5,
    turns: Annotated[int, typer.Option(min=2, max=50)] = 4,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens to generate in each turn.")] = 24,
    out: Annotated[Path | None, typer.Option("--out", help="Write what was measured here, as JSON.")] = None,
    engine: Annotated[
        DemoEngine, typer.Option("--engine", help="What serves the model; vllm needs vLLM installed.")
    ] = DemoEngine.TRANSFORMERS,
) -> None:
    """Two engine processes share a model's KV through one pool, whose keeper is killed in between."""
    from penstock.cli.demo import demo as run

    run(model, size, conversations, turns, new_tokens, out, engine.value)


@app.command()
def rm(name: Name = "default", path: PathOption = None) -> None:
    """Delete a pool that no keeper serves."""
    from penstock.cli.rm import rm as run

    run(name, path)


@app.command()
def kick(
    lane: Annotated[int, typer.Argument(help="The client's lane, as `penstock stat` shows it.")], name: Name = "default"
) -> None:
    """Kill a client and take back what it holds."""
    from penstock.cli.kick import kick as run

    run(name, lane)


@app.command()
def vllm(
    model: Annotated[str, typer.Argument(help="Directory or hub id, as vLLM takes it.")],
    extra: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGS]...", help="Further arguments for vLLM, after `--`.")
    ] = None,
    pool: Annotated[str, typer.Option("--pool", "-n", help="The pool's name.")] = "default",
    run: Annotated[bool, typer.Option("--run/--print", help="Become the server, or print its command.")] = False,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Default: vLLM's, 8000.")] = None,
    block_size: Annotated[
        int | None, typer.Option("--block-size", min=1, help="Tokens in a block; default: vLLM's.")
    ] = None,
    kv_cache_memory: Annotated[
        str,
        typer.Option(
            "--kv-cache-memory",
            help="vLLM's own KV cache: bytes, or 512M, 4G; default: a quarter of what is free now, at most 16G.",
        ),
    ] = "",
    intent_headers: Annotated[
        bool, typer.Option("--intent-headers", help="Let clients say their intent in X-Penstock-* headers.")
    ] = False,
) -> None:
    """vLLM's OpenAI server on top of a pool: print the whole command for this machine, or run it."""
    from penstock.cli.vllm import vllm as start

    start(
        model, extra or [], pool, run=run, port=port, block_size=block_size, kv_cache_memory=kv_cache_memory,
        intent_headers=intent_headers,
    )  # fmt: skip


@app.command()
def tiers(name: Name = "default", json: AsJson = False) -> None:
    """Show what is below a pool: each tier's capacity, use, speed, queue and errors."""
    from penstock.cli.tiers import tiers as run

    run(name, json)


@app.command()
def probe(
    dir_: Annotated[
        list[Path] | None,
        typer.Option("--dir", help="A folder to measure; again for more. Default: /dev/shm and the user's cache."),
    ] = None,
    tier: Annotated[
        list[str] | None, typer.Option("--tier", metavar="ADDRESS", help="A tier to measure, as `serve` takes it.")
    ] = None,
    sizes: Annotated[str, typer.Option("--sizes", help="64,4K,1M; default: powers of four, 64 B to 64 MiB.")] = "",
    seconds_per_point: Annotated[
        float | None, typer.Option("--seconds-per-point", min=0.001, max=60, help="Default: about a minute for all.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The profile's file; default: profile.json in the user's cache.")
    ] = None,
    json: AsJson = False,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw it; needs matplotlib.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Three sizes in a few seconds: rough figures.")] = False,
) -> None:
    """Measure this machine's memories, devices, folders and tiers, and write the profile that decisions are made by."""
    from penstock.cli.probe import probe as run

    run(
        dir_ or [], tier or [], sizes=sizes, point_s=seconds_per_point, out=out, json=json, plot=plot, quick=quick
    )  # fmt: skip


bench = typer.Typer(help="Measure this machine against the targets.", no_args_is_help=True)
app.add_typer(bench, name="bench")


Out = Annotated[Path | None, typer.Option("--out", help="Write the JSON to this file too.")]
Only = Annotated[str | None, typer.Option("--only", help="Run only the group that measures NAME.")]
Scale = Annotated[str, typer.Option("--scale", hidden=True, help="full; tiny shows that all runs.")]


@bench.command(name="pool")
def bench_pool(json: AsJson = False, out: Out = None, only: Only = None, scale: Scale = "full") -> None:
    """Measure the pool: matches, copies, commits, keys, brain. Takes about five minutes and 8 GiB of memory."""
    from penstock.cli.bench import bench as run

    run("pool", json, out, only, scale)


@bench.command(name="tiers")
def bench_tiers(json: AsJson = False, out: Out = None, only: Only = None, scale: Scale = "full") -> None:
    """Measure the tiers: disk, stores, checksums, fetch or recompute, restart. About ten minutes, 12 GiB of disk."""
    from penstock.cli.bench import bench as run

    run("tiers", json, out, only, scale)
