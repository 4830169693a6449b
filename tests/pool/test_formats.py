"""docs/formats.md says what the code does: every offset, size, reason and signature in it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.pool import layout
from penstock.pool.below import Fetch
from penstock.pool.client import Pool
from penstock.pool.lease import Lease
from penstock.pool.removals import Removals
from penstock.pool.reservation import Reservation
from penstock.runtime.opening import open_pool
from penstock.types import Drop, Eviction, FetchEnd, Miss

TEXT = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
ROWS = re.findall(r"^\| (\d+) \| `([HSBRLC]_[A-Z_]+)` \|", TEXT, re.MULTILINE)


@pytest.mark.parametrize(("offset", "name"), ROWS)
def test_offsets(offset: str, name: str) -> None:
    assert getattr(layout, name) == int(offset)


def test_every_offset_of_the_layout_is_documented() -> None:
    named = {name for name in vars(layout) if re.fullmatch(r"[HSBRLC]_[A-Z_]+", name)}
    assert {name for _, name in ROWS} == named


@pytest.mark.parametrize(
    ("title", "size"),
    [
        ("Space row", layout.SPACE_BYTES),
        ("Slab row", layout.SLAB_ROW_BYTES),
        ("Slot record", layout.RECORD_BYTES),
        ("Commit ring entry", layout.COMMIT_BYTES),
    ],
)
def test_row_sizes(title: str, size: int) -> None:
    assert f"### {title}, {size} bytes" in TEXT


def test_removals() -> None:
    assert f"An entry has\n{layout.REMOVAL_BYTES} bytes" in TEXT
    assert f"at most {layout._MAX_REMOVALS:,}" in TEXT


def test_magic_and_version() -> None:
    assert layout.MAGIC.to_bytes(8, "little") == b"PENSTOCK"
    assert f"Format version {layout.FORMAT_VERSION}." in TEXT


def test_reasons() -> None:
    rows = re.findall(r"^\| (\d+) \| (?:`(\w+)`)? ?\| (?:`(\w+)`)? ?\| (?:`(\w+)`)? ?\|$", TEXT, re.MULTILINE)
    for column, reasons in ((1, Miss), (2, Drop), (3, Eviction)):
        assert {row[column]: int(row[0]) for row in rows if row[column]} == {why.name: int(why) for why in reasons}


def test_ends_of_fetches() -> None:
    assert all(f"{int(end)} `{end.name}`" in TEXT for end in FetchEnd)


def _signature(owner: type, name: str) -> str:
    text = _plain(getattr(owner, name)).replace("npt.", "").replace("numpy.", "")
    return f"{owner.__name__}.{name}{text.replace('(self, ', '(').replace('(self)', '()')}"


def _plain(function: Callable[..., object]) -> str:
    """A signature whose annotations are not quoted and whose defaults are."""
    return re.sub(r"= '(\w*)'", r'= "\1"', str(inspect.signature(function))).replace("'", "")


def test_client_api() -> None:
    documented = set(TEXT.rsplit("```text\n", 1)[1].split("\n```")[0].split("\n"))
    owners = {"Pool": Pool, "Fetch": Fetch, "Lease": Lease, "Reservation": Reservation, "Removals": Removals}
    actual = {"open" + _plain(open_pool)}
    for line in documented:
        owner, _, rest = line.partition(".")
        if owner in owners and rest:
            actual.add(_signature(owners[owner], rest.partition("(")[0]))
    assert documented == actual
