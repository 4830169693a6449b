"""`penstock.open`: attached, embedded, or an error that says what to do."""

from __future__ import annotations

import gc
import logging
from pathlib import Path

import pytest

import penstock
from penstock.errors import ConfigError, NoKeeper, NoSpaceLeft
from penstock.pool import segment as segments
from penstock.testing.pool import (
    TINY,
    Site,
    assert_consistent,
    chain,
    embedded_keeper,
    make_space,
    resident_keys,
    source,
)
from tests.support import own_segments, unique_name


def test_without_a_keeper() -> None:
    name = unique_name("o")
    with pytest.raises(NoKeeper, match=f"penstock serve --name {name}"):
        penstock.open(name)


def test_embedded_says_so_and_leaves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    name = unique_name("o")
    before = own_segments()
    with caplog.at_level(logging.INFO, "penstock.client"), penstock.open(name, embedded=48 << 20) as pool:
        assert pool.mode == "embedded" and pool.name == name and not pool.closed
        assert "embedded" in repr(pool)
        assert own_segments() != before
    assert [record.getMessage() for record in caplog.records if name in record.getMessage()] == [
        f"pool {name}: embedded, {pool._at.geometry.total_bytes >> 20} MiB"
    ]
    assert pool.closed and "closed" in repr(pool)
    assert own_segments() == before


def test_a_forgotten_pool_leaves_nothing() -> None:
    before = own_segments()
    pool = penstock.open(unique_name("o"), geometry=TINY)
    assert own_segments() != before
    del pool
    gc.collect()
    assert own_segments() == before


def test_at_a_path(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    with penstock.open(unique_name("o"), geometry=TINY, path=path) as pool:
        assert path.exists()
        with pytest.raises(ConfigError, match="a file of its own"):
            penstock.open(unique_name("o"), geometry=TINY, path=path)
        assert_consistent(pool)
    assert not path.exists() and not segments.lock_path(path).exists()


def test_two_embedded_pools_of_one_name_in_two_processes_would_not_meet() -> None:
    """The file carries the process's number; in one process the second is refused."""
    name = unique_name("o")
    with penstock.open(name, geometry=TINY), pytest.raises(ConfigError, match="a file of its own"):
        penstock.open(name, geometry=TINY)


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 41])
def test_names_are_checked_first(name: str) -> None:
    with pytest.raises(ConfigError, match="pool name"):
        penstock.open(name, embedded=64 << 20)


@pytest.mark.parametrize(("size", "error"), [(1 << 20, ConfigError), (1 << 50, NoSpaceLeft)])
def test_sizes_that_cannot_be(size: int, error: type[Exception]) -> None:
    before = own_segments()
    with pytest.raises(error, match=r"MiB"):
        penstock.open(unique_name("o"), embedded=size)
    assert own_segments() == before


def test_the_bells_sleep_numbers_never_repeat_after_a_restart() -> None:
    """A client rings once for each sleep; a number it knows already would not be rung for."""
    from penstock.pool.cells import peek
    from penstock.pool.layout import H_SLEEPING

    with Site.opened(unique_name("o")) as site:
        seen = set()
        for _ in range(3):
            for _ in range(5):
                authority = embedded_keeper(site.pool).authority
                number = peek(authority.header(H_SLEEPING))
                assert number not in seen and number != 0
                seen.add(number)
                site.link.ring()
            site.crash_keeper()
            site.hear()


def test_what_was_published_to_a_dead_keeper_is_taken_in_by_the_next() -> None:
    space = make_space()
    with Site.opened(unique_name("o")) as site:
        pool = site.client()
        handle, keys = pool.space(space), chain(space, [1, 2, 3])
        reservation = pool.reserve(handle, 3, wait_s=5)
        site.deaf = True
        assert reservation.commit(keys, source(handle, keys)) == 3
        assert resident_keys(site.pool) == {}
        site.crash_keeper()
        assert len(resident_keys(site.pool)) == 3
        site.crash_keeper()
        assert len(resident_keys(site.pool)) == 3
        assert_consistent(site.pool)
        site.hear()


def test_recovery_of_a_half_written_directory() -> None:
    """Entries that point nowhere, blocks that are not listed, blocks on their way out: all put right."""
    from penstock.pool.layout import R_STATE, SlotState

    space = make_space()
    with Site.opened(unique_name("o")) as site:
        handle, keys = site.pool.space(space), chain(space, [1, 2, 3, 4])
        assert site.pool.store(handle, keys, source(handle, keys), wait_s=5).n_blocks == 4
        assert site.pool.flush()
        authority = embedded_keeper(site.pool).authority
        geometry = authority.geometry
        cells = authority.mapping.array[geometry.directory_offset : geometry.lanes_offset].view("<u8")
        used = [int(cell) for cell in cells.nonzero()[0]]
        free = [cell for cell in range(len(cells)) if cell not in used]
        entries = cells[used].copy()
        cells[used[0]] = 0
        cells[free[0]], cells[free[1]] = entries[1], 12345 << 32 | geometry.n_units + 7
        cells[free[2]] = entries[2] ^ (1 << 40)
        unit = int(entries[3] & 0xFFFFFFFF) - 1
        authority.records()[unit, R_STATE // 8] += int(SlotState.LEAVING) - int(SlotState.READY)
        del cells
        site.crash_keeper()
        assert_consistent(site.pool)
        assert set(resident_keys(site.pool)) == {bytes(key) for key in keys}
        site.hear()
