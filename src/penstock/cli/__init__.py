"""The command line: one file per command, loaded when it is called."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run `penstock`. Errors that Penstock raises on purpose end it with status 1 and one line on stderr."""
    from penstock.cli.app import app
    from penstock.errors import PenstockError

    try:
        app()
    except PenstockError as error:
        print(f"penstock: {error}", file=sys.stderr)
        sys.exit(1)
