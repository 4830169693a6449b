"""What the machine really executes where processes publish to each other: the assembly of every such kernel, for x86
and (cross-emitted from the same IR) for 64-bit Arm.

On x86 an acquire load and a release store are plain moves, so there the fences are what can be seen; on Arm all of it
can. The checks are shown to fail where a fence is taken out of the kernel's own source.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import threading
from types import ModuleType
from typing import Any
from unittest import mock

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest

from penstock.pool import atomics
from penstock.pool.atomics import load
from penstock.pool.cells import poke
from tests.stress.mutants import MUTANTS, NO_WRITE_BACK, compile_with, no_fence

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"

# Kernel -> what it must contain. full: a full fence; nt: the fence that ends non-temporal stores; acquire, release: at
# least one such load or store.
POINTS = {
    ("reader", "match"): {"full", "acquire", "release"},
    ("reader", "adopt"): {"full", "acquire", "release"},
    ("reader", "release"): {"release"},
    ("reader", "unchanged"): {"full"},
    ("writer", "publish"): {"full", "nt", "acquire", "release"},
    ("writer", "take_grants"): {"acquire", "release"},
    ("writer", "must_ring"): {"full"},
    ("writer", "set_waiting"): {"full", "acquire", "release"},
    ("writer", "want"): {"release"},
    ("apply", "apply_commits"): {"full", "acquire", "release"},
    ("apply", "take_hits"): {"acquire", "release"},
    ("evict", "evict"): {"full", "acquire", "release"},
    ("evict", "grant"): {"acquire", "release"},
    ("survey", "survey"): {"full", "acquire"},
    ("cells", "peek"): {"acquire"},
    ("cells", "poke"): {"release"},
    ("cells", "poke_and_fence"): {"full", "release"},
}
_MNEMONICS = {
    X86: {"full": r"\tmfence\b|\tlock\W+orl\t\$0, ", "nt": r"\tsfence\b"},
    ARM: {"full": r"\tdmb\tish\n", "nt": r"\tdmb\tish\n", "acquire": r"\tldar\b|\tldapr\b", "release": r"\tstlr\b"},
}


def atomics_for(machine: str) -> ModuleType:
    """`penstock.pool.atomics` as it is on another machine."""
    spec = importlib.util.spec_from_file_location(f"atomics_{machine}", atomics.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch("platform.machine", return_value=machine):
        spec.loader.exec_module(module)
    return module


def target_machine(triple: str) -> Any:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        return llvm.Target.from_triple(triple).create_target_machine(opt=2)
    except RuntimeError:
        pytest.skip(f"this llvmlite emits nothing for {triple}")


def emit(kernel: Any, triple: str) -> str:
    """A compiled kernel's optimised IR as assembly for `triple`."""
    (ir,) = kernel.inspect_llvm().values()
    target = target_machine(triple)
    ir = re.sub(r'target (triple|datalayout) = ".*"\n', "", ir)
    # numba's own reference counting, already in the host's instructions; no kernel's business.
    ir = re.sub(r"^define [^\n]*@(NRT_\w+)\(.*?^\}\n", r"declare void @\1(ptr)\n", ir, flags=re.M | re.S)
    ir = re.sub(r"^declare [^\n]*@llvm\.x86\.atomic\.[^\n]*\n", "", ir, flags=re.M)
    assert triple == X86 or "@llvm.x86." not in ir, "an instruction of x86 in what Arm would run"
    module = llvm.parse_assembly(ir)
    module.triple = triple
    module.data_layout = str(target.target_data)
    return str(target.emit_assembly(module))


@functools.cache
def compiled(module: str, name: str, triple: str) -> Any:
    """A kernel compiled here (what comes from the cache cannot be looked at), as it is on that machine."""
    if (module, name) != ("writer", "publish"):
        # Nothing else in these kernels depends on the machine.
        return _compiled_once(module, name)
    there = atomics_for(triple.partition("-")[0])
    (kernel,) = compile_with(f"penstock.pool.{module}", {"store_fence_nt": there.store_fence_nt}, name)
    return kernel


@functools.cache
def _compiled_once(module: str, name: str) -> Any:
    (kernel,) = compile_with(f"penstock.pool.{module}", NO_WRITE_BACK.get(module, {}), name)
    return kernel


def check(assembly: str, triple: str, wanted: set[str]) -> None:
    """Raise AssertionError unless everything wanted is there that can be seen on this kind of machine."""
    patterns = _MNEMONICS[triple]
    for what in wanted & patterns.keys():
        assert re.search(patterns[what], assembly), f"no {what} ({patterns[what]!r})"
    if "nt" in wanted:
        _check_publication(assembly, triple)


def _check_publication(assembly: str, triple: str) -> None:
    """The stores are ended before the head is published, and the full fence comes after it."""
    kinds = _MNEMONICS[triple]
    ends = [found.start() for found in re.finditer(kinds["nt"], assembly)]
    fulls = [found.start() for found in re.finditer(kinds["full"], assembly)]
    assert fulls and ends and ends[0] < fulls[-1]
    stores = r"\tmovq\t%\w+, .*\(%\w+" if triple == X86 else r"\tstlr\b"
    assert re.search(stores, assembly[ends[0] : fulls[-1]]), "nothing is published between the two fences"


@pytest.mark.parametrize("triple", [X86, ARM])
@pytest.mark.parametrize(("module", "name"), list(POINTS))
def test_publish_and_subscribe_points(module: str, name: str, triple: str) -> None:
    check(emit(compiled(module, name, triple), triple), triple, POINTS[module, name])


FENCES = [
    ("reader", "match", "fence_full", {"full"}),
    ("evict", "evict", "fence_full", {"full"}),
    ("apply", "apply_commits", "fence_full", {"full"}),
    ("writer", "must_ring", "fence_full", {"full"}),
    ("writer", "publish", "store_fence_nt", {"full", "nt"}),
    ("writer", "publish", "fence_full", {"full", "nt"}),
]


@pytest.mark.parametrize(("module", "name", "fence", "wanted"), FENCES)
def test_a_missing_fence_is_seen(module: str, name: str, fence: str, wanted: set[str]) -> None:
    for triple in (X86, ARM):
        replaced = {fence: no_fence} | NO_WRITE_BACK.get(module, {})
        if name == "publish" and fence != "store_fence_nt":
            replaced["store_fence_nt"] = atomics_for(triple.partition("-")[0]).store_fence_nt
        (kernel,) = compile_with(f"penstock.pool.{module}", replaced, name)
        assembly = emit(kernel, triple)
        with pytest.raises(AssertionError):
            check(assembly, triple, wanted)


def test_orders_are_seen_on_arm() -> None:
    """Relaxed loads and stores in place of acquire and release would not pass."""
    for module, name, replaced in [
        ("cells", "peek", {"load_acquire": atomics.load}),
        ("cells", "poke", {"store_release": atomics.store}),
        ("writer", "take_grants", {"load_acquire": atomics.load}),
    ]:
        (kernel,) = compile_with(f"penstock.pool.{module}", replaced, name)
        assembly = emit(kernel, ARM)
        with pytest.raises(AssertionError):
            check(assembly, ARM, POINTS[module, name])


def test_every_mutant_of_the_stress_test_removes_something() -> None:
    assert {module for module, _ in MUTANTS.values()} <= {f"penstock.pool.{module}" for module, _ in POINTS}
    with pytest.raises(AssertionError, match="removes nothing"):
        compile_with("penstock.pool.cells", {"no_such_fence": no_fence}, "peek")


# ---- loops

# A block that does nothing but go to itself.
_ENDLESS = re.compile(r"^(?P<label>[\w.]+):[^\n]*\n\s*br label %\"?(?P=label)\"?[ ,!\w.]*$", re.MULTILINE)


@numba.njit("void(int64)", nogil=True)
def wait_for_cell(address: int) -> None:
    while load(address) == 0:
        pass


@numba.njit("void(int64[::1])", nogil=True)
def wait_for_array(cells: Any) -> None:
    while cells[0] == 0:
        pass


def test_a_loop_reads_its_cell_again() -> None:
    (ir,) = wait_for_cell.inspect_llvm().values()
    assert not _ENDLESS.search(ir)
    cells = np.zeros(1, np.int64)
    waiting = threading.Thread(target=wait_for_cell, args=(cells.ctypes.data,), daemon=True)
    waiting.start()
    poke(cells.ctypes.data, 1)
    waiting.join(60)
    assert not waiting.is_alive()


def test_a_loop_over_a_plain_array_would_not() -> None:
    """Why control words are touched through intrinsics only."""
    (ir,) = wait_for_array.inspect_llvm().values()
    assert _ENDLESS.search(ir)
