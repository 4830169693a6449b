"""What a keeper writes back for hosts without coherence, on a memory that shows nothing else.

The kernels are the pool's own, compiled here with write-backs that copy the lines into a second file: that file is what
another host finds where not one line reached memory by chance. That each part is needed is shown by leaving it out.
"""

from __future__ import annotations

import functools
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from penstock.errors import ConfigError
from penstock.jit import inline_kernel
from penstock.pool import authority, coherence, layout
from penstock.pool import segment as segments
from penstock.pool.atomics import load, store
from penstock.pool.layout import LINE, Geometry
from penstock.pool.remote import Copied, RemoteReader
from penstock.testing.pool import Site, block_bytes, chain, make_space, source
from penstock.types import EventKind, Eviction, Miss
from tests.stress.mutants import compile_with, no_block_back, no_published_back, no_record_back
from tests.support import unique_name

SMALL = Geometry(unit_bytes=4096, slab_bytes=128 << 10, n_slabs=4, n_lanes=4, leases=48, ring=32, max_spaces=8)
SPACE = make_space("written back", n_segments=2, segment_bytes=16 << 10)
OTHER = make_space("of another size", n_segments=3, segment_bytes=4 << 10)
TO_THE_FILE = np.zeros(1, np.int64)
"""What has to be added to an address of the segment to come to that of the other file."""
_CELL = int(TO_THE_FILE.ctypes.data)


@inline_kernel
def copy_lines(address: int, n_bytes: int) -> None:
    """In the place of write-backs."""
    line, distance = address & -LINE, load(_CELL)
    while line < address + n_bytes:
        for word in range(LINE // 8):
            store(line + distance + 8 * word, load(line + 8 * word))
        line += LINE


@functools.cache
def kernels(missing: str = "") -> dict[str, Any]:
    """`apply_commits`, `grant` and `evict` as they are, but for where lines go and for what is missing."""
    names = ("write_back_block", "write_back_published", "write_back_record")
    block, record, granted = compile_with("penstock.pool.publishing", {"write_back_lines": copy_lines}, *names)
    applying = {
        "write_back_block": no_block_back if missing == "block" else block,
        "write_back_published": no_published_back if missing == "record" else record,
    }
    granting = {"write_back_record": no_record_back if missing == "grant" else granted}
    return {
        "apply_commits": compile_with("penstock.pool.apply", applying, "apply_commits")[0],
        **dict(zip(("grant", "evict"), compile_with("penstock.pool.evict", granting, "grant", "evict"), strict=True)),
    }


@dataclass
class Hosts:
    """A pool, and what another host has of its memory."""

    site: Site
    reader: RemoteReader
    there: npt.NDArray[np.uint8]

    def store(self, seed: int, n: int = 4, space: Any = SPACE) -> Any:
        """A chain, which its keeper has taken in."""
        handle, keys = self.site.pool.space(space), chain(space, [100 * seed + i for i in range(n)])
        assert self.site.pool.store(handle, keys, source(handle, keys), wait_s=2).n_blocks == n
        assert self.site.pool.flush(10)
        self.site.pool.return_idle_grants()  # they would keep slabs in their class
        return keys

    def read(self, keys: Any, space: Any = SPACE) -> Copied:
        """What the other host gets of it: right, or not at all."""
        handle = self.site.pool.space(space)
        out = np.zeros((len(keys), handle.block_bytes), np.uint8)
        copied = self.reader.read(space.digest(), keys.array, out)
        for i in range(copied.n_blocks):
            assert np.array_equal(out[i], block_bytes(bytes(keys[i]), handle.block_bytes))
        return copied

    def resident(self, keys: Any, space: Any = SPACE) -> int:
        return int(self.site.pool.resident(self.site.pool.space(space), keys.array).sum())

    def seen_states(self, units: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
        """States of slots as the other host has them."""
        at, size = SMALL.records_offset, SMALL.n_units * layout.RECORD_BYTES
        records = self.there[at : at + size].view(np.uint64).reshape(SMALL.n_units, -1)
        states: npt.NDArray[np.uint64] = records[units, layout.R_STATE // 8] & 0xFF
        return states


@pytest.fixture
def missing(request: pytest.FixtureRequest) -> str:
    return str(getattr(request, "param", ""))


@pytest.fixture
def hosts(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    path = tmp_path / "there"
    monkeypatch.setattr(segments, "create", functools.partial(segments.create, writes_back=True))
    with path.open("w+b") as file:
        file.truncate(SMALL.total_bytes)
        mapped = mmap.mmap(file.fileno(), SMALL.total_bytes)
    there = np.frombuffer(mapped, np.uint8)

    def arrived(self: authority.Authority, address: int, n_bytes: int) -> None:
        TO_THE_FILE[0] = there.ctypes.data - self.mapping.address
        first, last = (address - self.mapping.address) & -LINE, address - self.mapping.address + n_bytes
        there[first:last] = self.mapping.array[first:last]

    monkeypatch.setattr(authority.Authority, "_written", arrived)
    for kernel, compiled in kernels(missing).items():
        monkeypatch.setattr(authority, kernel, compiled)
    with Site.opened(unique_name(), SMALL) as site:
        assert site.link._segment.writes_back
        yield Hosts(site, RemoteReader(path), there)


def test_what_is_stored_is_found(hosts: Hosts) -> None:
    for seed in range(3):
        keys = hosts.store(seed)
        assert hosts.read(keys) == Copied(4, Miss.NONE)


def test_what_left_is_gone_or_right(hosts: Hosts) -> None:
    """Sixteen slots, forty blocks."""
    chains = []
    for seed in range(10):
        chains.append(hosts.store(seed))
        for keys in chains:
            assert hosts.read(keys).n_blocks == hosts.resident(keys)


def test_slabs_that_change_their_class(hosts: Hosts) -> None:
    chains = []
    for seed in range(8):
        space = SPACE if seed < 6 else OTHER
        chains.append((hosts.store(seed, 4 if space is SPACE else 8, space), space))
        for keys, of in chains:
            assert hosts.read(keys, of).n_blocks == hosts.resident(keys, of)
    assert len(set(hosts.site.link.keeper.authority.slab_classes().tolist())) > 1


def test_nothing_is_seen_in_a_slab_that_is_taken_from_its_class(hosts: Hosts) -> None:
    """Else a key that was there would be looked for where its slot does not lie any more."""
    hosts.store(1)
    taker = hosts.site.link.keeper.authority
    [slab] = [slab for slab in range(SMALL.n_slabs) if len(taker.slab_blocks(slab)) == 3]
    units = taker.slab_blocks(slab)
    taker.evict(units, Eviction.SLAB)
    assert (hosts.seen_states(units) == layout.SlotState.READY).all(), "eviction itself tells nobody"
    taker.unassign_slab(slab)
    assert (hosts.seen_states(units) == layout.SlotState.FREE).all()
    row = SMALL.slabs_offset + slab * layout.SLAB_ROW_BYTES + layout.B_CLASS
    assert not hosts.there[row : row + 8].any()


def test_a_block_that_stays_is_found_again(hosts: Hosts) -> None:
    """While its leases are looked for it is leaving, which memory may come to see by itself."""
    keys = hosts.store(1)
    taker = hosts.site.link.keeper.authority
    handle = hosts.site.pool.space(SPACE)
    with hosts.site.pool.match(handle, keys) as lease:
        assert len(lease) == 4
        units = taker.units_of(handle.id, keys.array)
        at = SMALL.records_offset + units.astype(np.int64) * layout.RECORD_BYTES + layout.R_STATE
        hosts.there[at] = layout.SlotState.LEAVING
        assert hosts.read(keys).n_blocks == 0
        assert (taker.evict(units[::-1].copy(), Eviction.CAPACITY)["kind"] == EventKind.KEPT).all()
    assert hosts.read(keys) == Copied(4, Miss.NONE)


def test_half_a_space_is_not_kept(hosts: Hosts) -> None:
    """Its row has two lines, of which memory may see the first one first."""
    keys = hosts.store(1)
    row = slice(SMALL.spaces_offset + LINE, SMALL.spaces_offset + 2 * LINE)
    whole, nothing = hosts.there[row].copy(), np.zeros((0, hosts.site.pool.space(SPACE).block_bytes), np.uint8)
    hosts.there[row] = 0
    assert hosts.reader.read(SPACE.digest(), keys.array[:0], nothing).n_blocks == 0
    hosts.there[row] = whole
    assert hosts.read(keys) == Copied(4, Miss.NONE)


def test_a_grant_is_there_before_anybody_writes_to_its_slot(hosts: Hosts) -> None:
    assert grants_that_are_there(hosts)


@pytest.mark.parametrize("missing", ["grant"], indirect=True)
def test_without_that_it_is_not(hosts: Hosts) -> None:
    assert not grants_that_are_there(hosts)


def grants_that_are_there(hosts: Hosts) -> bool:
    """Whether the other host sees every granted slot as granted."""
    for seed in range(6):
        hosts.store(seed)
    with hosts.site.pool.reserve(hosts.site.pool.space(SPACE), 3, 2.0) as reserved:
        assert len(reserved) == 3
        states = hosts.site.link.keeper.authority.records()[:, layout.R_STATE // 8] & 0xFF
        granted = np.flatnonzero(states == layout.SlotState.GRANTED)
        assert len(granted) >= 3
        return bool((hosts.seen_states(granted) == layout.SlotState.GRANTED).all())


@pytest.mark.parametrize("missing", ["block"], indirect=True)
def test_without_its_payload_a_block_is_damaged(hosts: Hosts) -> None:
    assert hosts.read(hosts.store(1)) == Copied(0, Miss.CHECKSUM)


@pytest.mark.parametrize("missing", ["record"], indirect=True)
def test_without_its_record_a_block_is_missed_until_a_keeper_recovers(hosts: Hosts) -> None:
    keys = hosts.store(1)
    assert hosts.read(keys) == Copied(0, Miss.ABSENT)
    hosts.site.crash_keeper()
    assert hosts.read(keys) == Copied(4, Miss.NONE)
    hosts.site.hear()


def test_a_segment_remembers_that_it_is_written_back(tmp_path: Path) -> None:
    for writes_back in (False, True):
        path = tmp_path / str(writes_back)
        segments.create(path, SMALL, writes_back=writes_back).close()
        segment = segments.open_existing(path)
        segment.close()
        assert segment.writes_back is writes_back


def test_a_processor_that_cannot_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(machine: str, features: str) -> None:
        raise ConfigError(f"{machine}: no such instructions")

    monkeypatch.setattr(coherence, "line_instructions", cannot)
    segment = segments.create(tmp_path / "segment", SMALL, writes_back=True)
    with pytest.raises(ConfigError, match="no such instructions"):
        authority.Authority(segment)
    segment.close()
