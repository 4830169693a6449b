"""The public surface: what it lists, what each name is, and what importing it costs."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest

import penstock
from penstock import errors
from penstock.types import Drop, Eviction, Miss
from tests.support import ROOT, environment


def test_all_is_sorted_and_complete() -> None:
    assert penstock.__all__ == sorted(penstock.__all__)
    assert dir(penstock) == penstock.__all__
    for name in penstock.__all__:
        assert getattr(penstock, name) is not None
    public = {name for name, value in vars(penstock).items() if not name.startswith("_")}
    modules = {name for name in public if isinstance(getattr(penstock, name), types.ModuleType)}
    assert public - modules - {"annotations", "TYPE_CHECKING", "Any"} <= set(penstock.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = penstock.no_such_name


def test_everything_public_says_what_it_is() -> None:
    for name in set(penstock.__all__) - {"__version__"}:
        value = getattr(penstock, name)
        if isinstance(value, type | types.FunctionType):
            assert value.__doc__ and len(value.__doc__) > 20, name


def test_every_method_a_caller_may_use_is_documented() -> None:
    for owner in (penstock.Pool, penstock.Lease, penstock.Reservation, penstock.TensorMap, penstock.KeyChain):
        for name, member in vars(owner).items():
            if callable(member) and not name.startswith("_"):
                assert member.__doc__, f"{owner.__name__}.{name}"


def test_version_is_the_packages() -> None:
    try:
        installed = version("penstock")
    except PackageNotFoundError:
        pytest.skip("this checkout is not installed")
    assert penstock.__version__ == installed


def loaded(code: str) -> set[str]:
    """The top-level modules that are there after running this in a fresh interpreter."""
    report = "; import sys, json; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code + report], env=environment(), cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


HEAVY = {"llvmlite", "matplotlib", "numba", "sglang", "torch", "transformers", "typer", "rich", "vllm"}


@pytest.mark.parametrize(
    "code",
    [
        "import penstock",
        "from penstock import Miss, Drop, Intent, errors",
        "import penstock.cli",
    ],
)
def test_importing_loads_nothing_heavy(code: str) -> None:
    assert not loaded(code) & (HEAVY - ({"typer", "rich"} if "cli" in code else set()))


def test_a_pool_loads_no_engine() -> None:
    assert not loaded("from penstock import Pool, Lease, open, Space, chain_keys") & {
        "torch", "transformers", "vllm", "sglang",
    }  # fmt: skip


def test_errors_are_one_tree() -> None:
    assert errors.__all__ == sorted(errors.__all__)
    drawn = errors.__doc__ or ""
    for name in errors.__all__:
        error = getattr(errors, name)
        assert issubclass(error, errors.PenstockError) and error.__doc__
        assert name in drawn, f"{name} is not in the drawing"
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined == set(errors.__all__)


def test_reasons_keep_their_numbers() -> None:
    """They are in segments and counters: part of the format."""
    assert [(reason.name, reason.value) for reason in Miss] == [
        ("NONE", 0), ("ABSENT", 1), ("BUSY", 2), ("LEASE_TABLE_FULL", 3), ("CHECKSUM", 4), ("CHANGED", 5),
        ("SPACE", 6), ("FORKED", 7), ("NO_KEEPER", 8), ("SKIPPED", 9), ("CLOSED", 10),
    ]  # fmt: skip
    assert [(reason.name, reason.value) for reason in Drop] == [
        ("NONE", 0), ("NO_ROOM", 1), ("ORPHAN", 2), ("DUPLICATE", 3), ("STALE", 4), ("BAD_LENGTH", 5),
        ("BAD_SPACE", 6), ("BAD_SLOT", 7), ("NOT_OWNER", 8), ("RING_FULL", 9), ("DIRECTORY_FULL", 10),
        ("FORKED", 11), ("NO_KEEPER", 12), ("SKIPPED", 13), ("CLOSED", 14), ("BAD_ENTRY", 15), ("ABORTED", 16),
    ]  # fmt: skip
    assert [(reason.name, reason.value) for reason in Eviction] == [
        ("CAPACITY", 0), ("SLAB", 1), ("DUPLICATE", 2), ("CHECKSUM", 3), ("FORGOTTEN", 4),
    ]  # fmt: skip


def test_every_reason_has_a_counter_and_its_room() -> None:
    from penstock.pool import context, keeper_context, layout
    from penstock.pool.counting import keeper_report, lane_report

    lane, keeper = (np.arange(n, dtype=np.uint64) for n in (layout.LANE_COUNTERS, layout.N_COUNTERS))
    counted = lane_report(lane)
    assert len(set(counted.values())) == len(counted), "two names for one cell"
    assert {f"miss.{why.name.lower()}" for why in Miss if why} | {
        f"drop.{why.name.lower()}" for why in Drop if why
    } <= {*counted}
    kept = keeper_report(keeper)
    assert len(set(kept.values())) == len(kept)
    assert context.K_MISS + max(Miss) < context.K_DROP and context.K_DROP + max(Drop) < layout.LANE_COUNTERS
    assert keeper_context.G_DROP + max(Drop) < keeper_context.G_EVICTION
    assert keeper_context.G_EVICTION + max(Eviction) < keeper_context.G_DEPARTED
    assert keeper_context.G_DEPARTED + layout.LANE_COUNTERS <= layout.N_COUNTERS
