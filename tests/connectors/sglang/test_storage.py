"""Pages through a real keeper: between processes, layouts and ranks, damaged, orphaned, and with the keeper gone."""

from __future__ import annotations

import ctypes
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.identity.foreign import foreign_chain
from tests.support import PATIENCE_S, Keeper, until

pytest.importorskip("sglang", reason="needs SGLang's wheel (`make test-engines`)")
child = pytest.importorskip("tests.connectors.sglang.child")
pools = pytest.importorskip("tests.connectors.sglang.pools")
storage = pytest.importorskip("penstock.connectors.sglang.storage")

MakeRank = Callable[..., Any]
HASHES = pools.page_hashes(7, 12)
ALL = [True] * 12


@pytest.fixture(scope="module")
def remote() -> Iterator[Any]:
    with child.other_process() as other:
        yield other


@pytest.mark.parametrize("kind", ["mha", "mla"])
@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
def test_another_process_reads_what_one_stored(
    rank: MakeRank, remote: Any, keeper: Keeper, model: Path, layout: str, kind: str
) -> None:
    remote.make(pool=keeper.name, model=model, layout=layout, kind=kind)
    assert remote.set(HASHES, []) == ALL
    mine = rank(layout=layout, kind=kind)
    assert mine.exists(HASHES) == 12
    assert mine.get(HASHES) == ALL
    assert mine.storage.counters()["get.pages"] == 12
    keeper.fsck()


def test_layouts_with_the_same_bytes_share_and_others_do_not(rank: MakeRank) -> None:
    assert rank(layout="layer_first").set(HASHES, []) == ALL
    assert rank(layout="page_first_direct").get(HASHES) == ALL
    assert rank(layout="page_first").get(HASHES) == [False] * 12


def test_a_partial_prefix_is_found_and_continued(rank: MakeRank) -> None:
    one, two = rank(), rank()
    assert one.set(HASHES[:5], []) == [True] * 5
    assert two.exists(HASHES) == 5
    assert two.get(HASHES) == [True] * 5 + [False] * 7
    assert two.set(HASHES[5:], HASHES[:5]) == [True] * 7
    # Asked for from the middle, as SGLang does where it still has the beginning itself.
    assert one.get(HASHES[5:]) == [True] * 7
    assert one.get(HASHES) == ALL


@pytest.mark.parametrize("at_once", [1, 5, 6, 7])
def test_long_lookups_go_in_parts(rank: MakeRank, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(storage, "_FIND_BLOCKS", at_once)
    mine = rank()
    mine.set(HASHES[:6], [])
    assert [mine.exists(HASHES[first:]) for first in (0, 3, 5, 6)] == [6, 3, 1, 0]
    mine.set(HASHES, [])
    assert mine.exists(HASHES) == 12 and mine.exists([]) == 0


def test_pages_that_are_there_are_not_stored_again(rank: MakeRank) -> None:
    mine = rank()
    mine.set(HASHES[:9], [])
    assert mine.set(HASHES, []) == ALL
    counted = mine.storage.counters()
    assert counted["set.known"] == 9 and counted["set.pages"] == 12


def test_a_page_whose_prefix_is_missing_is_not_stored(rank: MakeRank) -> None:
    mine = rank()
    mine.set(HASHES[:3], [])
    assert mine.set(HASHES[6:], HASHES[:6]) == [False] * 6
    assert mine.storage.counters()["set.orphan"] == 6
    assert mine.exists(HASHES[6:]) == 0


def test_the_prefix_may_still_be_on_its_way(rank: MakeRank) -> None:
    """SGLang stores node after node without a pause: the first must not count as missing when the second comes."""
    mine = rank()
    keys, indices = pools.page_hashes(10, 320), mine.indices(16)
    for first in range(0, 320, 16):
        extra = pools.HiCacheStorageExtraInfo(prefix_keys=keys[:first])
        assert mine.storage.batch_set_v1(keys[first : first + 16], indices, extra) == [True] * 16
    assert mine.storage.flush(PATIENCE_S)
    assert mine.exists(keys) == 320


def test_a_missing_middle_page_ends_the_hit(rank: MakeRank, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "penstock.connector")
    mine = rank()
    # Without prefix keys a run hangs from the root, wherever it stands.
    assert mine.set(HASHES[:3], None) == [True] * 3
    assert mine.set(HASHES[4:], None) == [True] * 8
    assert mine.exists(HASHES) == 3
    assert mine.get(HASHES) == [True] * 3 + [False] * 9
    assert mine.get(HASHES[4:]) == [True] * 8
    told = [record.getMessage() for record in caplog.records if "pass_prefix_keys" in record.getMessage()]
    assert len(told) == 1
    assert mine.set(HASHES[:4], []) == [True] * 4
    assert mine.get(HASHES) == ALL


def test_other_hashes_find_nothing(rank: MakeRank) -> None:
    mine = rank()
    mine.set(HASHES, [])
    assert mine.exists(pools.page_hashes(8, 12)) == 0
    assert not mine.host.kv_buffer.any()
    assert mine.get([HASHES[0].upper(), *HASHES[1:]]) == [False] * 12
    assert not mine.host.kv_buffer.any()


OTHERS: dict[str, dict[str, Any]] = {
    "rank": {"tp_rank": 1, "tp_size": 2},
    "size": {"tp_rank": 0, "tp_size": 4},
    "stage": {"tp_size": 2, "pp_rank": 0, "pp_size": 2},
    "context": {"tp_size": 2, "attn_cp_rank": 0, "attn_cp_size": 2},
    "dtype": {"tp_size": 2, "dtype": pools.torch.float16},
    "tenant": {"tp_size": 2, "extra": {"tenant": "another"}},
    "overrides": {"tp_size": 2, "settings": {"json_model_override_args": '{"rope_theta": 20000}'}},
    "quantization": {"tp_size": 2, "settings": {"quantization": "fp8"}},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_what_differs_is_not_shared(rank: MakeRank, changes: dict[str, Any]) -> None:
    rank(tp_size=2).set(HASHES, [])
    assert rank(tp_size=2).exists(HASHES) == 12
    assert rank(**changes).exists(HASHES) == 0


@pytest.mark.parametrize("change", [{"seed": 2}, {"seed": 1, "rope_theta": 5.0}], ids=["weights", "configuration"])
def test_another_model_is_not_shared(rank: MakeRank, tmp_path: Path, change: dict[str, Any]) -> None:
    rank().set(HASHES, [])
    copy, other = pools.make_model(tmp_path / "copy", seed=1), pools.make_model(tmp_path / "other", **change)
    assert rank(model=copy, model_name="another name").exists(HASHES) == 12
    assert rank(model=other).exists(HASHES) == 0


def test_mla_pages_are_those_of_every_rank(rank: MakeRank) -> None:
    rank(kind="mla", tp_rank=0, tp_size=2).set(HASHES, [])
    assert rank(kind="mla", tp_rank=1, tp_size=2).get(HASHES) == ALL


def damage(mine: Any, page: int) -> None:
    """Flip a bit of a stored page in the segment."""
    pool = mine.storage._attachment.pool
    space = mine.storage.space
    with pool.match(pool.space(space), foreign_chain(space, [key.encode() for key in HASHES])) as lease:
        view = lease.views(page)
        address = view.ctypes.data + 100
        ctypes.memset(address, ctypes.c_ubyte.from_address(address).value ^ 0x10, 1)
        del view


def test_a_damaged_page_is_not_returned_and_leaves_the_pool(rank: MakeRank) -> None:
    mine = rank()
    mine.set(HASHES, [])
    damage(mine, 4)
    assert mine.get(HASHES) == [True] * 4 + [False] * 8
    assert mine.storage.counters()["get.checksum"] == 1
    until(lambda: mine.exists(HASHES) == 4, "the keeper dropped it")
    assert mine.set(HASHES, []) == ALL
    assert mine.get(HASHES) == ALL


def test_it_is_the_checksum_that_finds_damage(rank: MakeRank) -> None:
    mine = rank(extra={"verify": False})
    mine.set(HASHES, [])
    damage(mine, 4)
    with pytest.raises(AssertionError):
        mine.get(HASHES)


def test_without_a_keeper_it_runs_warns_once_and_attaches_later(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "penstock.connector")
    keeper = Keeper()
    mine = pools.SglangRank(pool=keeper.name, model=model)
    try:
        for _ in range(3):
            assert mine.exists(HASHES) == 0
            assert mine.get(HASHES) == [False] * 12
            assert mine.set(HASHES, []) == [False] * 12
        assert mine.storage.counters()["no_keeper"] == 9
        assert sum("penstock serve" in record.getMessage() for record in caplog.records) == 1
        with keeper:
            until(lambda: mine.set(HASHES, []) == ALL, "it attached")
            assert mine.get(HASHES) == ALL
            mine.storage.close()
    finally:
        mine.storage.close()
        pools.forget_settings()


def test_a_dead_keeper_costs_stores_only_and_a_new_one_takes_over(rank: MakeRank, keeper: Keeper) -> None:
    mine = rank(extra={"save_wait_s": 60.0})
    mine.set(HASHES[:6], [])
    pool = mine.storage._attachment.pool
    seeds = itertools.count(100)
    keeper.kill()
    until(lambda: not pool.keeper_alive, "its end was noticed")
    assert mine.get(HASHES) == [True] * 6 + [False] * 6
    # The wait that was allowed would run into the test's time limit: nothing waits for a dead keeper.
    # What was granted before may still be filled; after that there is no room.
    until(lambda: not all(mine.set(pools.page_hashes(next(seeds), 16), [])), "no room is left")
    assert mine.storage.counters()["set.no_keeper"] > 0
    keeper.start()
    keeper.wait_back(pool)
    assert mine.get(HASHES[:6]) == [True] * 6
    until(lambda: mine.set(HASHES, []) == ALL, "it stores again")
    assert mine.get(HASHES) == ALL


def test_clear_leaves_what_others_stored_to_others(rank: MakeRank) -> None:
    one, two = rank(), rank()
    one.set(HASHES, [])
    one.storage.clear()
    assert one.exists(HASHES) == 0
    assert two.exists(HASHES) == 12
    assert one.set(HASHES, []) == ALL and one.get(HASHES) == ALL
    two.storage.clear()
    assert two.exists(HASHES) == 0


def test_nothing_is_raised_into_the_engine(rank: MakeRank) -> None:
    mine = rank()
    mine.set(HASHES, [])
    indices = mine.indices(12)
    for wrong in (
        indices[:-1],
        indices + 1,
        indices + 10**6,
        indices - 10**6,
        indices.reshape(12, -1),
        indices.flip(0),
    ):
        assert mine.storage.batch_get_v1(HASHES, wrong) == [False] * 12
        assert mine.storage.batch_set_v1(HASHES, wrong) == [False] * 12
    assert mine.storage.counters()["get.no_whole_pages"] == 72
    assert mine.get([""]) == [False]
    assert mine.storage.batch_get_v1([], indices[:0]) == []
    mine.storage.close()
    mine.storage.close()
    assert mine.exists(HASHES) == 0
    assert mine.get(HASHES) == [False] * 12
    assert mine.set(HASHES, []) == [False] * 12


def test_only_the_interface_that_copies_once_is_served(rank: MakeRank) -> None:
    mine = rank()
    page = mine.host.get_dummy_flat_data_page()
    assert mine.storage.set(HASHES[0], page) is False and mine.storage.get(HASHES[0], page) is None
    assert mine.storage.batch_set(HASHES, [page] * 12) is False
    assert mine.storage.batch_get(HASHES, [page] * 12) == [None] * 12
    other = SimpleNamespace(name="mamba", keys=HASHES)
    assert mine.storage.batch_get_v2([other]) == {"mamba": [False] * 12} == mine.storage.batch_set_v2([other])
    mine.set(HASHES, [])
    assert mine.storage.exists(HASHES[3])
    assert mine.storage.batch_exists_v2(HASHES).kv_hit_pages == 12
    assert mine.storage.batch_exists_v2(HASHES, [other]).kv_hit_pages == 0


def test_sglangs_own_loops_store_find_and_load(rank: MakeRank) -> None:
    """The controller's methods that call a storage backend, on more pages than it passes in one call."""
    from sglang.srt.managers import cache_controller as sglang

    n = sglang.STORAGE_BATCH_SIZE + 40
    mine = rank(pages=n + 4)
    keys, indices = pools.page_hashes(11, n), mine.indices(n)
    tokens = pools.np.random.default_rng(11).integers(0, 32_000, n * pools.PAGE).tolist()
    own = sglang.HiCacheController
    controller = SimpleNamespace(page_size=pools.PAGE, storage_backend=mine.storage, storage_host_pool=mine.host)
    controller.page_set_func = lambda *given: own._page_set_zero_copy(controller, *given)
    controller.page_get_func = lambda *given: own._page_get_zero_copy(controller, *given)
    controller._page_transfer_kv_batch = lambda *given: own._page_transfer_kv_batch(controller, *given)
    controller.prefetch_sync_queue = SimpleNamespace(put=lambda ack: None)
    for i, key in enumerate(keys):
        page = pools.page_content(mine.host.get_dummy_flat_data_page(), key)
        mine.host.set_from_flat_data_page(int(indices[i * pools.PAGE]), page)

    backup = sglang.StorageOperation(indices, tokens, hash_value=keys, prefix_keys=[])
    own._page_backup(controller, backup)
    assert backup.completed_tokens == n * pools.PAGE
    assert mine.storage.flush(PATIENCE_S)

    fetch = sglang.PrefetchOperation("request", tokens + [1] * pools.PAGE, None, [])
    found, n_tokens = own._storage_hit_query(controller, fetch)
    assert found == keys and n_tokens == n * pools.PAGE
    mine.host.kv_buffer.zero_()
    fetch.hash_value, fetch.host_indices = found, indices
    assert own._page_transfer(controller, fetch) == n
    for i, key in enumerate(keys):
        page = mine.host.get_data_page(int(indices[i * pools.PAGE]))
        assert pools.torch.equal(page.view(pools.torch.uint8), pools.page_content(page, key).view(pools.torch.uint8))
