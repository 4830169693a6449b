"""Cache lines written back and dropped, and the reader that relies on it: the machine code, and a pool under churn.

This machine is coherent, so that a missing instruction changes no byte here: that each is needed is shown by the model
(`tests/model/test_incoherent.py`), that each is there by the assembly. What can go wrong on any machine, a slot that is
filled anew while it is copied, is provoked for real.
"""

from __future__ import annotations

import functools
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt
import pytest
from llvmlite import ir

from penstock.errors import ConfigError, Damaged, NoPool
from penstock.jit import inline_kernel
from penstock.pool import coherence, layout
from penstock.pool.layout import Geometry
from penstock.pool.remote import Copied, RemoteReader
from penstock.pool.remote_copy import copy_out
from penstock.testing.pool import Site, block_bytes, chain, make_space, source
from penstock.types import Miss
from tests.pool.test_atomics import X86, target_machine
from tests.stress.mutants import compile_with
from tests.support import PATIENCE_S

# Large blocks in few slots: a copy takes long enough for its slot to be filled anew meanwhile.
SMALL = Geometry(unit_bytes=4096, slab_bytes=128 << 10, n_slabs=4, n_lanes=4, leases=48, ring=32, max_spaces=8)
SPACE = make_space("remote", n_segments=2, segment_bytes=16 << 10)


# ---- which instructions


def test_the_best_that_a_processor_has() -> None:
    best = coherence.line_instructions
    assert best("x86_64", "+sse2,+clflushopt,+clwb")[:2] == ("llvm.x86.clwb", "llvm.x86.clflushopt")
    assert best("x86_64", "+sse2,+clflushopt,-clwb")[:2] == ("llvm.x86.clflushopt", "llvm.x86.clflushopt")
    assert best("amd64", "")[:2] == ("llvm.x86.sse2.clflush", "llvm.x86.sse2.clflush")
    assert best("aarch64", "")[:2] == ("dc cvac, $0", "dc civac, $0")
    with pytest.raises(ConfigError, match="riscv64"):
        best("riscv64", "+v")


def two_functions(machine: str, features: str) -> str:
    """Functions that write a line back and drop one, each with its fence, as that machine's IR."""
    chosen = coherence.line_instructions(machine, features)
    module = ir.Module()
    pointer = ir.IntType(8).as_pointer()
    for name, on_line, fence in (
        ("write_back", chosen.write_back, chosen.fence_stores),
        ("drop", chosen.drop, chosen.fence_all),
    ):
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer]), name)
        builder = ir.IRBuilder(function.append_basic_block())
        coherence._emit(builder, on_line, function.args[0])
        coherence._emit(builder, fence)
        builder.ret_void()
    return str(module)


@pytest.mark.parametrize(
    ("features", "write", "drop"),
    [
        ("+clwb,+clflushopt", r"clwb\s.*sfence", r"clflushopt\s.*mfence"),
        ("+clflushopt", r"clflushopt\s.*sfence", r"clflushopt\s.*mfence"),
        ("", r"clflush\s.*sfence", r"clflush\s.*mfence"),
    ],
)
def test_what_x86_executes(features: str, write: str, drop: str) -> None:
    target_machine(X86)  # skips where llvmlite has no such target
    target = llvm.Target.from_triple(X86).create_target_machine(features=features)
    parsed = llvm.parse_assembly(two_functions("x86_64", features))
    parsed.triple = X86
    first, second = re.split(r"\ndrop:", str(target.emit_assembly(parsed)))
    assert re.search(write, first, re.S), first
    assert re.search(drop, second, re.S), second


def test_what_arm_executes() -> None:
    """As inline assembly in the IR: llvmlite parses that for its own machine only, so none can be emitted from here."""
    text = two_functions("aarch64", "")
    llvm.parse_assembly(text).verify()
    calls = re.findall(r'call void asm sideeffect "([^"]*)", "([^"]*)"', text)
    assert calls == [
        ("dc cvac, $0", "r,~{memory}"), ("dsb sy", "~{memory}"),
        ("dc civac, $0", "r,~{memory}"), ("dsb sy", "~{memory}"),
    ]  # fmt: skip


@functools.cache
def whole_copy() -> Any:
    """The kernel compiled here: what comes from the cache cannot be looked at."""
    (kernel,) = compile_with("penstock.pool.remote_copy", {}, "copy_out")
    return kernel


LINE_DROPS, FULL_FENCE = r"\tclflush(?:opt)?\b", r"\tmfence\b"


def drops_and_fences(kernel: Any) -> list[str]:
    (assembly,) = kernel.inspect_asm().values()
    return [found[0].strip()[:2] for found in re.finditer(f"{LINE_DROPS}|{FULL_FENCE}", assembly)]


needs_x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="reads x86 assembly")


@needs_x86
def test_the_reader_drops_what_it_is_about_to_load() -> None:
    """Both buckets' lines, candidates, the slab's row, payload and table, and the record again: each with a fence."""
    found = drops_and_fences(whole_copy())
    assert found.count("cl") >= 6
    assert found.count("mf") >= 5
    assert found[0] == "cl" and "mf" in found[1:3]


@needs_x86
def test_a_missing_drop_is_seen_in_the_machine_code() -> None:
    (less,) = compile_with("penstock.pool.remote_copy", {"_drop_payload": nothing}, "copy_out")
    assert drops_and_fences(less).count("cl") == drops_and_fences(whole_copy()).count("cl") - 2
    assert drops_and_fences(credulous_copy()).count("cl") == drops_and_fences(whole_copy()).count("cl") - 1


@functools.cache
def credulous_copy() -> Any:
    """Without the second look."""
    (kernel,) = compile_with("penstock.pool.remote_copy", {"_unchanged": believes}, "copy_out")
    return kernel


@inline_kernel
def nothing(payload: int, length: int, sums: int, table_bytes: int) -> None:
    """In the place of the payload's drop."""


@inline_kernel
def believes(record: int, lo: int, hi: int, generation: int) -> bool:
    """In the place of the second look."""
    return True


# ---- what they do to memory


def test_bytes_survive_both() -> None:
    data = np.arange(10_000, dtype=np.uint8)
    for offset, size in ((0, 10_000), (1, 1), (63, 2), (100, 0), (4097, 500)):
        coherence.write_back(data.ctypes.data + offset, size)
        coherence.invalidate(data.ctypes.data + offset, size)
        data[offset : offset + size] += np.uint8(1)
        coherence.invalidate(data.ctypes.data + offset, size)  # a changed line is written back, not lost
        data[offset : offset + size] -= np.uint8(1)
    assert np.array_equal(data, np.arange(10_000, dtype=np.uint8))


# ---- the reader


@pytest.fixture
def site() -> Iterator[Site]:
    with Site.opened(f"remote-{os.getpid()}", SMALL) as site:
        yield site


def path_of(site: Site) -> Path:
    return site.link._files[0]


def test_it_reads_what_is_there(site: Site) -> None:
    handle, keys = site.pool.space(SPACE), chain(SPACE, range(6))
    reader = RemoteReader(path_of(site))
    out = np.zeros((6, handle.block_bytes), np.uint8)
    assert reader.read(SPACE.digest(), keys.array, out) == Copied(0, Miss.ABSENT)
    assert site.pool.store(handle, keys[:4], source(handle, keys[:4]), wait_s=1).n_blocks == 4
    assert reader.read(SPACE.digest(), keys.array, out) == Copied(4, Miss.ABSENT)
    for i in range(4):
        assert np.array_equal(out[i], block_bytes(bytes(keys[i]), handle.block_bytes))
    assert reader.read(make_space("another").digest(), keys.array, out[:, :2048].copy()) == Copied(0, Miss.SPACE)
    with pytest.raises(ValueError, match="out"):
        reader.read(SPACE.digest(), keys.array, out[:5])
    assert site.pool.held()["leases"] == 0


def test_it_says_what_is_damaged(site: Site) -> None:
    handle, keys = site.pool.space(SPACE), chain(SPACE, range(4))
    assert site.pool.store(handle, keys, source(handle, keys), wait_s=1).n_blocks == 4
    with site.pool.match(handle, keys) as lease:
        address = int(lease._located().payloads[2]) - site.pool._at.data.address
    site.pool._at.data.array[address + 17] ^= 1
    out = np.zeros((4, handle.block_bytes), np.uint8)
    assert RemoteReader(path_of(site)).read(SPACE.digest(), keys.array, out) == Copied(2, Miss.CHECKSUM)


def test_it_maps_what_it_reads_and_nothing_else(site: Site) -> None:
    reader = RemoteReader(path_of(site))
    assert not reader._mapping.array.flags.writeable
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path_of(site)))]
    assert any(line.split()[1].startswith("r--s") for line in lines)
    with pytest.raises(NoPool):
        RemoteReader("/dev/shm/no-such-segment")


@pytest.mark.parametrize("what", ["stride", "table", "slots", "unit"])
def test_nonsense_in_the_tables_is_a_miss(site: Site, what: str) -> None:
    """Lines of different moments may say anything: no address is made from a number that was not checked."""
    handle, keys = site.pool.space(SPACE), chain(SPACE, range(3))
    assert site.pool.store(handle, keys, source(handle, keys), wait_s=1).n_blocks == 3
    tables = site.link.keeper.authority.mapping.array
    cell = {"stride": layout.B_STRIDE, "table": layout.B_TABLE, "slots": layout.B_SLOTS}.get(what)
    out = np.zeros((3, handle.block_bytes), np.uint8)
    reader = RemoteReader(path_of(site))
    for value in (0, 1, 1 << 20, 1 << 40, (1 << 63) - 1, -1):
        if cell is not None:
            rows = tables[SMALL.slabs_offset :][: SMALL.n_slabs * layout.SLAB_ROW_BYTES].view(np.int64)
            rows.reshape(SMALL.n_slabs, -1)[:, cell // 8] = value
        else:
            entries = tables[SMALL.directory_offset :][: SMALL.n_buckets * layout.BUCKET_BYTES].view(np.uint64)
            entries[entries != 0] = entries[entries != 0] & ~np.uint64(0xFFFFFFFF) | np.uint64(value & 0xFFFFFFFF)
        assert reader.read(SPACE.digest(), keys.array, out).n_blocks in (0, 3)


class Churn:
    """A thread that stores chain after chain into a pool of a few slots, so that blocks leave all the time."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.handle = site.pool.space(SPACE)
        self.chains = [chain(SPACE, [number * 10 + i for i in range(4)]) for number in range(6)]
        self._sources = [source(self.handle, keys) for keys in self.chains]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.turns = self.blocks = 0

    def _run(self) -> None:
        while not self._stop.is_set():
            number = self.turns % len(self.chains)
            stored = self.site.pool.store(self.handle, self.chains[number], self._sources[number], wait_s=0.01)
            self.turns, self.blocks = self.turns + 1, self.blocks + stored.n_blocks

    def told(self) -> str:
        return f"nothing was hit by {self.turns} stores, {self.blocks} blocks, among {threading.enumerate()}"

    def __enter__(self) -> Churn:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def copies(site: Site, churn: Churn, kernel: Any, rounds: int) -> tuple[int, int, int]:
    """Blocks copied right, wrong, and given up because they changed, without verifying any checksum.

    At least so many rounds, and more until one copy was hit by a store: on which processor the two threads run is the
    kernel's choice, and on one and the same they rarely meet.
    """
    reader = RemoteReader(path_of(site))
    handle, sizes = churn.handle, (4, churn.handle.block_bytes)
    out, tables, roots = np.zeros(sizes, np.uint8), np.zeros((4, 2), np.uint64), np.zeros(4, np.uint64)
    expected = [_blocks(keys.array, handle.block_bytes) for keys in churn.chains]
    right = wrong = changed = turn = 0
    guard = time.monotonic() + PATIENCE_S
    while (turn < rounds or not wrong + changed) and time.monotonic() < guard:
        turn += 1
        number = turn % len(expected)
        keys = churn.chains[number].array.copy()
        packed = kernel(
            reader._cells.ctypes.data, keys, handle.shape, 16, out.ctypes.data, tables.ctypes.data, roots
        )  # fmt: skip
        n = packed & 0xFFFFFF
        same = (out[:n] == expected[number][:n]).all(axis=1)
        right, wrong = right + int(same.sum()), wrong + int((~same).sum())
        changed += packed >> 48 == Miss.CHANGED
        if wrong:
            break
    return right, wrong, changed


def _blocks(keys: npt.NDArray[np.uint64], size: int) -> npt.NDArray[np.uint8]:
    return np.stack([block_bytes(key.tobytes(), size) for key in keys])


def test_no_copy_is_wrong_while_slots_are_filled_anew(site: Site, scale: Any) -> None:
    with Churn(site) as churn:
        right, wrong, changed = copies(site, churn, copy_out, scale.of(3000, 100_000))
    assert wrong == 0
    assert right > 100
    assert changed > 0, churn.told()


def test_without_the_second_look_copies_are_wrong(site: Site) -> None:
    kernel = credulous_copy()
    with Churn(site) as churn:
        _, wrong, _ = copies(site, churn, kernel, 200_000)
    assert wrong, churn.told()


def test_a_segment_that_was_truncated(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"x")
    with pytest.raises(Damaged):
        RemoteReader(path)
