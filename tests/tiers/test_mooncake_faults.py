"""The Mooncake tier when its master is away, hangs or forgets, and when calls outlive their deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from penstock.errors import ConfigError, TierTimeout, TierUnavailable
from penstock.testing.tier_blocks import Buffers, assert_right, block_keys, empty, filled, tier_space
from penstock.tiers.base import Batch, Found, Placed, Tier
from penstock.tiers.envelope import header_at, object_name, pack
from penstock.tiers.mooncake import MooncakeTier
from penstock.tiers.registry import open_tier, parse_tier
from tests.support import until
from tests.tiers.mooncake_servers import Lender, MooncakeMaster, need_mooncake

SPACE = tier_space()
KEYS = block_keys(SPACE, 0, 10)
LATE_S = 0.1
"""How far past a deadline a tier behind a network may answer; the tests allow the machine ten times that."""


@pytest.fixture
def master(tmp_path: Path) -> Iterator[MooncakeMaster]:
    need_mooncake()
    server = MooncakeMaster(tmp_path)
    with server:
        yield server


def lending(master: MooncakeMaster, **options: object) -> Tier:
    """A tier that lends memory itself, under the names of the lender process."""
    chosen = {"segment": "64M", "buffer": "8M", "prefix": "lender/", **options}
    return open_tier(parse_tier(master.address + "?" + "&".join(f"{name}={each}" for name, each in chosen.items())))


def soon() -> float:
    return time.monotonic() + 20.0


def stored(tier: Tier, batch: Batch) -> bool:
    """Whether all of it is there now; False while the tier is still joining."""
    try:
        return set(tier.write(batch, soon()).tolist()) <= {Placed.STORED, Placed.PRESENT}
    except TierUnavailable:
        return False


def timed_out(call: Callable[[float], object], within_s: float) -> None:
    """The call raises TierTimeout about when its deadline comes."""
    deadline = time.monotonic() + within_s
    with pytest.raises(TierTimeout):
        call(deadline)
    assert time.monotonic() - deadline < 10 * LATE_S


def objects_of(batch: Batch) -> list[bytes]:
    """Each block as the store holds it."""
    return [pack(header_at(batch, i)) + bytes(payload) for i, payload in enumerate(batch.payloads)]


def test_two_processes_share_and_what_was_lent_goes_with_its_process(master: MooncakeMaster, tmp_path: Path) -> None:
    lender = Lender(tmp_path, master, "64M", 10)
    with lender:
        tier = lending(master, segment=0)
        batch = empty(SPACE, KEYS)
        assert_right(batch, tier.read(batch, soon()))
        assert tier.write(filled(SPACE, KEYS), soon()).tolist() == [Placed.PRESENT] * len(KEYS)
    # Its process was killed: the master still knows the blocks for a while, and nobody has their bytes.
    batch = empty(SPACE, KEYS)
    assert Found.HERE not in tier.read(batch, soon())
    tier.close()


def test_no_master_is_told_at_once_and_one_that_comes_later_is_joined(master: MooncakeMaster) -> None:
    master.kill()
    tier = lending(master)
    with pytest.raises(TierUnavailable, match="check that mooncake_master runs"):
        tier.holds(SPACE, KEYS, soon())
    master.start()
    batch = filled(SPACE, KEYS)
    until(lambda: stored(tier, batch), "the tier joined")
    assert tier.holds(SPACE, KEYS, soon()).all()
    tier.close()


def test_a_master_that_was_killed(master: MooncakeMaster) -> None:
    """Bounded while it is away; a new one knows no blocks, and they can be stored again."""
    tier = lending(master)
    until(lambda: stored(tier, filled(SPACE, KEYS)), "stored")
    master.kill()
    for call in (
        lambda: tier.holds(SPACE, KEYS, time.monotonic() + 0.3),
        lambda: tier.read(empty(SPACE, KEYS), time.monotonic() + 0.3),
        lambda: tier.write(filled(SPACE, KEYS), time.monotonic() + 0.3),
        lambda: tier.remove(SPACE, KEYS, time.monotonic() + 0.3),
    ):
        before = time.monotonic()
        with pytest.raises((TierUnavailable, TierTimeout)):
            call()
        assert time.monotonic() - before < 0.3 + 10 * LATE_S
    master.start()
    until(lambda: stored(tier, filled(SPACE, KEYS)), "stored again")
    batch = empty(SPACE, KEYS)
    assert_right(batch, tier.read(batch, soon()))
    tier.close()


def test_a_master_that_hangs(master: MooncakeMaster) -> None:
    """Calls end at their deadlines; calls that hang are bounded; what they do later reaches no caller's memory."""
    tier = lending(master)
    until(lambda: stored(tier, filled(SPACE, KEYS)), "stored")
    master.pause()
    buffers = Buffers(SPACE, len(KEYS))
    batch = empty(SPACE, KEYS, buffers=buffers)
    timed_out(lambda deadline: tier.read(batch, deadline), 0.2)
    buffers.scribble()
    before = buffers.snapshot()
    for _ in range(40):
        with pytest.raises((TierTimeout, TierUnavailable)) as raised:
            tier.holds(SPACE, KEYS, time.monotonic() + 0.02)
        if raised.type is TierUnavailable:
            break
    else:
        pytest.fail("calls pile up without end")
    assert "hang" in str(raised.value)
    master.resume()
    assert isinstance(tier, MooncakeTier)
    until(lambda: tier._crew.left == 0, "the calls that hung have ended")
    assert buffers.snapshot() == before
    assert tier._in.free == tier._in.n
    until(lambda: stored(tier, filled(SPACE, KEYS)), "usable again")
    batch = empty(SPACE, KEYS)
    assert_right(batch, tier.read(batch, soon()))
    tier.close()


def test_a_master_that_hangs_while_joining_stops_nothing_else(master: MooncakeMaster) -> None:
    master.pause()
    tier = lending(master)
    gaps, last = [], time.monotonic()
    end = last + 1.5
    with pytest.raises((TierUnavailable, TierTimeout)):
        tier.holds(SPACE, KEYS, time.monotonic() + 0.3)
    while last < end:
        time.sleep(0.005)
        now = time.monotonic()
        gaps.append(now - last)
        last = now
    assert max(gaps) < 5.0, "joining held the interpreter"
    tier.close()


@pytest.mark.parametrize("wrong", ["garbage", "another key's", "short", "long"])
def test_objects_that_are_not_the_block(master: MooncakeMaster, wrong: str) -> None:
    tier = lending(master)
    until(lambda: stored(tier, filled(SPACE, KEYS)), "stored")
    names = ["lender/" + object_name(SPACE, key.tobytes()) for key in KEYS]
    assert isinstance(tier, MooncakeTier)
    right, other = objects_of(filled(SPACE, KEYS))[3:5]
    content = {"garbage": bytes(len(right)), "another key's": other, "short": right[:-1], "long": right + b"x"}[wrong]
    client, bay = tier._link.client(), tier._out.lend()
    assert client.remove(names[3], True) == 0
    bay.bay.memory[: len(content)] = np.frombuffer(content, np.uint8)
    assert client.put_from(names[3], bay.bay.address, len(content)) == 0
    bay.release()
    batch = empty(SPACE, KEYS)
    found = tier.read(batch, soon())
    assert found.tolist() == [Found.FAILED if i == 3 else Found.HERE for i in range(len(KEYS))]
    if wrong in ("short", "long"):
        placed = tier.write(filled(SPACE, KEYS), soon()).tolist()
        assert placed == [Placed.STORED if i == 3 else Placed.PRESENT for i in range(len(KEYS))]
    else:
        tier.remove(SPACE, KEYS[3:4], soon())
        assert tier.write(filled(SPACE, KEYS), soon())[3] == Placed.STORED
    batch = empty(SPACE, KEYS)
    assert_right(batch, tier.read(batch, soon()))
    tier.close()


def test_more_blocks_than_bays(master: MooncakeMaster) -> None:
    tier = lending(master, buffer="1M")
    space = tier_space(1, 8, 1 << 13)
    keys = block_keys(space, 0, 12)
    until(lambda: stored(tier, filled(space, keys)), "stored")
    batch = empty(space, keys)
    assert_right(batch, tier.read(batch, soon()))
    tier.close()


def test_no_room(master: MooncakeMaster) -> None:
    """Nobody lends memory."""
    tier = lending(master, segment=0)
    until(lambda: _joined(tier), "joined")
    assert set(tier.write(filled(SPACE, KEYS), soon()).tolist()) == {Placed.NO_ROOM}
    assert not tier.holds(SPACE, KEYS, soon()).any()
    tier.close()


def _joined(tier: Tier) -> bool:
    try:
        return not tier.holds(SPACE, KEYS, soon()).any()
    except TierUnavailable:
        return False


def test_blocks_larger_than_a_buffer_name_the_option(master: MooncakeMaster) -> None:
    tier = lending(master, buffer="1M")
    space = tier_space(1, 8, 1 << 16)
    keys = block_keys(space, 0, 1)
    with pytest.raises(TierUnavailable, match="buffer="):
        tier.read(empty(space, keys), soon())
    tier.close()


@pytest.mark.parametrize(
    "address", ["mooncake:", "mooncake://", "mooncake://host", "mooncake:host:1", "mooncake://h:p"]
)
def test_addresses_that_are_none(address: str) -> None:
    need_mooncake()
    with pytest.raises(ConfigError, match="mooncake://host:port"):
        open_tier(parse_tier(address))


def test_an_option_that_it_does_not_have() -> None:
    with pytest.raises(ConfigError, match="did you mean 'segment'"):
        open_tier(parse_tier("mooncake://127.0.0.1:1?segmnt=1G"))


def test_memory_is_what_was_asked_for(master: MooncakeMaster) -> None:
    tier = lending(master, buffer="8M")
    assert isinstance(tier, MooncakeTier)
    assert tier._link.memory.nbytes == 8 << 20
    assert np.all(np.array([tier._in.bay_bytes, tier._out.bay_bytes]) == (4 << 20) // 3 // 64 * 64)
    tier.close()
