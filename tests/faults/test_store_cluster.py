"""A cluster whose slots move, and that loses a primary: the tier follows, without being opened again."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
from redis.crc import key_slot

from penstock.errors import TierError, TierUnavailable
from penstock.testing.tier_blocks import assert_right, block_keys, empty, filled, tier_space
from penstock.tiers.base import Found, Keys, Placed, Tier
from penstock.tiers.envelope import object_name
from penstock.tiers.registry import open_tier, parse_tier
from tests.support import until
from tests.tiers.servers import LOOPBACK, ValkeyCluster, need_valkey

pytestmark = pytest.mark.faults

SPACE = tier_space()
KEYS = block_keys(SPACE, 0, 60)


def soon() -> float:
    return time.monotonic() + 20.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    need_valkey()
    with ValkeyCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def tier(cluster: ValkeyCluster) -> Iterator[Tier]:
    for each in cluster.servers:
        if "role:master" in each.ask("INFO", "replication"):
            each.ask("FLUSHALL")
    tier = open_tier(parse_tier(f"valkey:{cluster.location}?cluster=true"))
    yield tier
    tier.close()


def must_write(tier: Tier, keys: Keys) -> None:
    assert tier.write(filled(SPACE, keys), soon()).tolist() == [Placed.STORED] * len(keys)


def check(tier: Tier, keys: Keys, here: bool = True) -> None:
    assert tier.holds(SPACE, keys, soon()).tolist() == [here] * len(keys)
    batch = empty(SPACE, keys)
    assert_right(batch, tier.read(batch, soon()), here)


def name(key: Keys) -> bytes:
    return object_name(SPACE, key.tobytes()).encode()


def keys_of(cluster: ValkeyCluster, number: int) -> Keys:
    """Those of KEYS whose slots the primary of that number was given at first."""
    return KEYS[[key_slot(name(key)) * 3 // 16384 == number for key in KEYS]]


def test_blocks_lie_on_every_primary(cluster: ValkeyCluster, tier: Tier) -> None:
    must_write(tier, KEYS)
    for number in range(3):
        held = cluster.servers[number].names()
        assert sorted(held) == sorted(name(key).decode() for key in keys_of(cluster, number))
        assert held
    assert tier.counters().get("redirections", 0) == 0
    assert tier.usage().capacity_bytes == 3 * (256 << 20)


def test_one_node_is_enough_to_find_the_others(cluster: ValkeyCluster, tier: Tier) -> None:
    must_write(tier, KEYS)
    other = open_tier(parse_tier(f"valkey://{LOOPBACK}:{cluster.replica.port}?cluster=true"))
    check(other, KEYS)
    other.close()


def test_a_member_alone_is_not_taken_for_a_server(cluster: ValkeyCluster) -> None:
    single = open_tier(parse_tier(f"valkey://{LOOPBACK}:{cluster.servers[0].port}"))
    with pytest.raises(TierUnavailable, match="cluster=true"):
        single.write(filled(SPACE, KEYS), soon())
    single.close()


def test_a_slot_that_moves(cluster: ValkeyCluster, tier: Tier) -> None:
    """ASK while it moves, MOVED once it has moved, and no redirection after that."""
    source, target = cluster.servers[0], cluster.servers[1]
    mine = keys_of(cluster, 0)
    slot, moving = str(key_slot(name(mine[0]))), mine[:1]
    must_write(tier, mine[1:])
    target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", cluster.node_id(source))
    source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", cluster.node_id(target))

    check(tier, moving, False)
    assert tier.counters()["redirections"] == 2
    must_write(tier, mine[:1])
    check(tier, mine)
    assert name(mine[0]).decode() in target.names()
    # A redirection for one question says nothing about the next.
    before = tier.counters()["redirections"]
    check(tier, moving)
    assert tier.counters()["redirections"] == before + 2

    for each in (target, source, cluster.servers[2]):
        each.ask("CLUSTER", "SETSLOT", slot, "NODE", cluster.node_id(target))
    check(tier, mine)
    after = tier.counters()["redirections"]
    assert after == before + 3
    check(tier, mine)
    tier.remove(SPACE, mine, soon())
    check(tier, mine, False)
    assert tier.counters()["redirections"] == after


def test_failover(cluster: ValkeyCluster, tier: Tier) -> None:
    """The primary of a third is killed: calls fail, none hangs, then its replica answers with what it had."""
    must_write(tier, KEYS)
    cluster.servers[0].ask("WAIT", "1", "10000")
    cluster.servers[0].kill()
    with pytest.raises(TierError):
        check(tier, KEYS)
    told = []

    def works() -> bool:
        begin = time.monotonic()
        batch = empty(SPACE, KEYS)
        try:
            found = tier.read(batch, begin + 0.5)
        except TierError as error:
            told.append(error)
            assert time.monotonic() - begin < 5.0
            return False
        assert_right(batch, found, found == Found.HERE)
        return True

    until(works, "the replica has taken over")
    assert told
    check(tier, KEYS)
    tier.remove(SPACE, KEYS, soon())
    must_write(tier, KEYS)

    # The old primary comes back as a replica of the new one.
    cluster.servers[0].start()
    until(cluster.whole, "it follows")
    check(tier, KEYS)
    assert "role:slave" in cluster.servers[0].ask("INFO", "replication")


def test_stopped_primary(cluster: ValkeyCluster, tier: Tier) -> None:
    """A primary without a replica stands still: its blocks cannot be had by the deadline, the others' can."""
    must_write(tier, KEYS)
    cluster.servers[2].pause()
    try:
        theirs = keys_of(cluster, 2)
        begin = time.monotonic()
        with pytest.raises(TierError):
            tier.read(empty(SPACE, theirs), begin + 0.2)
        assert time.monotonic() - begin < 5.0
        rest = keys_of(cluster, 1)
        found = tier.read(batch := empty(SPACE, rest), time.monotonic() + 0.9)
        assert_right(batch, found)
    finally:
        cluster.servers[2].resume()
    until(cluster.whole, "it is whole again")
    until(lambda: _answers(tier), "it answers")
    check(tier, KEYS)


def _answers(tier: Tier) -> bool:
    try:
        return bool(np.all(tier.holds(SPACE, KEYS, soon())))
    except TierError:
        return False
