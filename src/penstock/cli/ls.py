"""`penstock ls`."""

from __future__ import annotations

import json as json_module

from rich.console import Console
from rich.table import Table

from penstock.cli.ask import ask

__all__ = ["ls"]


def ls(name: str, json: bool) -> None:
    """Print a pool's spaces and its chains, newest first."""
    report = ask(name, "ls")
    if json:
        print(json_module.dumps(report, indent=2))
        return
    console = Console(markup=False)  # names are their owners', and may look like markup
    spaces = Table(title="Spaces", title_justify="left")
    for column in ("id", "label", "digest", "block", "tokens", "blocks"):
        spaces.add_column(column)
    for row in report["spaces"]:
        size = f"{row['block_bytes'] / 1024:g} KiB"
        spaces.add_row(
            str(row["id"]), row["label"], row["digest"][:16], size, str(row["block_tokens"]), str(row["blocks"])
        )
    console.print(spaces)
    shown, total = len(report["chains"]), report["n_chains"]
    chains = Table(title=f"Chains ({shown} of {total}, newest first)", title_justify="left")
    for column in ("space", "last block", "blocks", "idle s", "hits", "session", "tenant", "priority"):
        chains.add_column(column)
    for row in report["chains"]:
        idle = "before restart" if row["idle_s"] is None else str(row["idle_s"])
        chains.add_row(
            str(row["space"]), row["tail"][:16], str(row["blocks"]), idle, str(row["hits"]), row["session"],
            row["tenant"], str(row["priority"]),
        )  # fmt: skip
    console.print(chains)
