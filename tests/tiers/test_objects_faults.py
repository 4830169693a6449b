"""The object tier when the server, the network, other clients or the credentials are wrong."""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.errors import TierError, TierTimeout, TierUnavailable
from penstock.testing.tier_blocks import Buffers, assert_right, block_keys, empty, filled, tier_space
from penstock.tiers.base import Batch, Found, Placed, Tier
from penstock.tiers.envelope import HEADER_BYTES, header_at, object_name, pack
from penstock.tiers.objects import ObjectTier
from penstock.tiers.registry import open_tier, parse_tier
from tests.support import until
from tests.tiers.objects_servers import (
    BUCKET,
    KEY_ID,
    READER_ID,
    READER_SECRET,
    SECRET,
    Relay,
    WeedServer,
    need_weed,
    store,
)
from tests.tiers.servers import make_certificates

obstore = pytest.importorskip("obstore", reason="obstore is not installed (extra `objects`)")

SPACE = tier_space(0, 16, 4096)
KEYS = block_keys(SPACE, 0, 8)
LATE_S = 0.1
"""How far past a deadline a tier behind a network may answer; the tests allow the machine ten times that."""
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WeedServer]:
    need_weed()
    server = WeedServer(tmp_path_factory.mktemp("weed"))
    with server:
        yield server


@pytest.fixture
def relay(weed: WeedServer) -> Iterator[Relay]:
    with Relay(weed.port) as between:
        yield between


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    # An explicit endpoint wins, and TLS is not given up because of a variable.
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")


@pytest.fixture
def prefix() -> str:
    return f"faults-{next(NUMBERS)}"


def s3_tier(endpoint: str, prefix: str, bucket: str = BUCKET, parallel: int = 4) -> Tier:
    address = f"s3://{bucket}/{prefix}?endpoint={endpoint}&insecure=true&parallel={parallel}"
    return open_tier(parse_tier(address))


def soon() -> float:
    return time.monotonic() + 20.0


def calls_of(tier: Tier, within_s: float) -> list[Callable[[], object]]:
    return [
        lambda: tier.holds(SPACE, KEYS, time.monotonic() + within_s),
        lambda: tier.read(empty(SPACE, KEYS), time.monotonic() + within_s),
        lambda: tier.write(filled(SPACE, KEYS), time.monotonic() + within_s),
        lambda: tier.remove(SPACE, KEYS, time.monotonic() + within_s),
    ]


def refused(call: Callable[[], object]) -> str:
    """What TierUnavailable says; nothing of it, the traceback included, holds a secret or a signature."""
    with pytest.raises(TierUnavailable) as raised:
        call()
    told = "".join(traceback.format_exception(raised.value))
    for secret in (SECRET, READER_SECRET, KEY_ID, READER_ID, "AWS4-HMAC", "Signature="):
        assert secret not in told
    return str(raised.value)


def must_write(tier: Tier) -> None:
    assert tier.write(filled(SPACE, KEYS), soon()).tolist() == [Placed.STORED] * len(KEYS)


def must_read(tier: Tier) -> None:
    batch = empty(SPACE, KEYS)
    assert_right(batch, tier.read(batch, soon()))


def drained(tier: Tier) -> None:
    """Wait until no request of earlier batches runs any more."""
    assert isinstance(tier, ObjectTier)
    until(lambda: tier._crew.left == 0, "requests that were left behind ended")


def test_a_server_that_was_killed(weed: WeedServer, prefix: str) -> None:
    """Told at once, with what to do; back with everything it had when it is started again."""
    tier = s3_tier(weed.endpoint, prefix)
    must_write(tier)
    weed.kill()
    for call in calls_of(tier, 5.0):
        before = time.monotonic()
        assert "check the endpoint, that the server runs" in refused(call)
        assert time.monotonic() - before < 5.0
    weed.start()
    must_read(tier)
    tier.close()


def test_a_server_that_hangs(weed: WeedServer, prefix: str) -> None:
    """Every call ends at its deadline, then is refused at once; the requests end once the server goes on."""
    tier = s3_tier(weed.endpoint, prefix)
    must_write(tier)
    weed.pause()
    try:
        for call in calls_of(tier, 0.15):
            before = time.monotonic()
            with pytest.raises(TierTimeout):
                call()
            assert time.monotonic() - before < 0.15 + 10 * LATE_S
        assert "hang" in refused(calls_of(tier, 5.0)[0])
    finally:
        weed.resume()
    drained(tier)
    assert set(tier.write(filled(SPACE, KEYS), soon()).tolist()) <= {Placed.STORED, Placed.PRESENT}
    must_read(tier)
    tier.close()


def test_a_slow_network(relay: Relay, prefix: str) -> None:
    """Each answer takes 200 ms: right within a generous deadline, TierTimeout within a tight one."""
    tier = s3_tier(relay.endpoint, prefix, parallel=8)
    relay.delay_s = 0.2
    must_write(tier)
    must_read(tier)
    before = time.monotonic()
    with pytest.raises(TierTimeout):
        tier.read(empty(SPACE, KEYS), before + 0.1)
    assert time.monotonic() - before < 0.1 + 10 * LATE_S
    drained(tier)
    must_read(tier)
    tier.close()


def test_a_read_that_was_given_up_leaves_the_callers_memory_alone(relay: Relay, prefix: str) -> None:
    tier = s3_tier(relay.endpoint, prefix)
    must_write(tier)
    buffers = Buffers(SPACE, len(KEYS))
    batch = empty(SPACE, KEYS, buffers=buffers)
    relay.flowing.clear()
    with pytest.raises(TierTimeout):
        tier.read(batch, time.monotonic() + 0.3)
    buffers.scribble()
    before, roots = buffers.snapshot(), batch.roots.tobytes()
    relay.flowing.set()
    drained(tier)
    assert (buffers.snapshot(), batch.roots.tobytes()) == (before, roots)
    tier.close()


def test_a_write_that_was_given_up_stores_what_was_there_or_nothing(relay: Relay, prefix: str) -> None:
    """The caller uses its memory for something else while the request is still under way."""
    tier = s3_tier(relay.endpoint, prefix)
    buffers = Buffers(SPACE, len(KEYS))
    batch = filled(SPACE, KEYS, buffers=buffers)
    relay.flowing.clear()
    with pytest.raises(TierTimeout):
        tier.write(batch, time.monotonic() + 0.3)
    buffers.scribble()
    relay.flowing.set()
    drained(tier)
    batch = empty(SPACE, KEYS)
    found = tier.read(batch, soon())
    assert Found.HERE in found.tolist(), "no request was under way, so this shows nothing"
    assert_right(batch, found, found == Found.HERE)
    tier.close()


@pytest.mark.parametrize("after", [100, 600, 5000])
def test_an_answer_that_is_cut(relay: Relay, prefix: str, after: int) -> None:
    """In its head, behind it, in its middle: never HERE."""
    tier = s3_tier(relay.endpoint, prefix)
    must_write(tier)
    relay.cut_after = after
    with Relay(relay._server_port) as cutting:
        cutting.cut_after = after
        cut = s3_tier(cutting.endpoint, prefix)
        try:
            found = cut.read(empty(SPACE, KEYS), soon()).tolist()
        except TierUnavailable:
            found = [Found.FAILED]
        assert set(found) == {Found.FAILED}
        cut.close()
    relay.cut_after = None
    must_read(tier)
    tier.close()


@pytest.mark.parametrize("wrong", ["garbage", "another key's", "another space's", "short", "long", "empty", "header"])
def test_objects_that_are_not_the_block(weed: WeedServer, prefix: str, wrong: str) -> None:
    tier = s3_tier(weed.endpoint, prefix)
    must_write(tier)
    right, other = objects_of(filled(SPACE, KEYS))[3:5]
    content = {
        "garbage": bytes(len(right)),
        "another key's": other,
        "another space's": objects_of(filled(tier_space(1, 16, 4096), KEYS))[3],
        "short": right[:-1],
        "long": right + b"x",
        "empty": b"",
        "header": right[: HEADER_BYTES // 2],
    }[wrong]
    name = object_name(SPACE, KEYS[3].tobytes())
    obstore.put(store(weed.endpoint, prefix=prefix), name, content)
    found = tier.read(empty(SPACE, KEYS), soon())
    assert found.tolist() == [Found.FAILED if i == 3 else Found.HERE for i in range(len(KEYS))]
    if len(content) == len(right):  # a write sees the length only: whoever reads it removes it
        tier.remove(SPACE, KEYS[3:4], soon())
    else:
        assert tier.holds(SPACE, KEYS, soon()).tolist() == [i != 3 for i in range(len(KEYS))]
    placed = tier.write(filled(SPACE, KEYS), soon()).tolist()
    assert placed == [Placed.STORED if i == 3 else Placed.PRESENT for i in range(len(KEYS))]
    must_read(tier)
    tier.close()


def objects_of(batch: Batch) -> list[bytes]:
    """Each block as the store holds it."""
    return [pack(header_at(batch, i)) + bytes(payload) for i, payload in enumerate(batch.payloads)]


def test_wrong_credentials(weed: WeedServer, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong secret, a key that nobody has, and one that may only read."""
    right = s3_tier(weed.endpoint, prefix)
    must_write(right)
    for key_id, secret in ((KEY_ID, READER_SECRET), ("penstock-nobody", SECRET)):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key_id)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        tier = s3_tier(weed.endpoint, prefix)
        for call in calls_of(tier, 20.0):
            told = refused(call)
            assert "403" in told and "check the credentials" in told
        tier.close()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
    reader = s3_tier(weed.endpoint, prefix)
    must_read(reader)
    assert "check the credentials" in refused(lambda: reader.write(filled(SPACE, block_keys(SPACE, 1, 2)), soon()))
    assert "check the credentials" in refused(lambda: reader.remove(SPACE, KEYS, soon()))
    reader.close()
    must_read(right)
    right.close()


def test_a_bucket_that_is_not_there(weed: WeedServer, prefix: str) -> None:
    tier = s3_tier(weed.endpoint, prefix, bucket="nobody-made-this")
    told = refused(lambda: tier.read(empty(SPACE, KEYS), soon()))
    assert "NoSuchBucket" in told and "create it" in told
    tier.close()


def test_closing_ends_calls_that_hang(relay: Relay, prefix: str) -> None:
    import threading

    tier = s3_tier(relay.endpoint, prefix)
    relay.flowing.clear()
    raised: list[TierError] = []

    def read() -> None:
        try:
            tier.read(empty(SPACE, KEYS), soon())
        except TierError as error:
            raised.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    assert relay.taken.acquire(timeout=20.0)
    tier.close()
    thread.join(20.0)
    assert [type(each) for each in raised] == [TierUnavailable]


# ---- TLS


def test_tls_needs_a_known_authority(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_weed()
    certificates = make_certificates(tmp_path)
    (tmp_path / "other").mkdir()
    other, *_ = make_certificates(tmp_path / "other")
    with WeedServer(tmp_path_factory.mktemp("weed"), tls=certificates) as server:
        address = f"s3://{BUCKET}/tls?endpoint={server.tls_endpoint}"
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates[0]))
        known = open_tier(parse_tier(address))
        must_write(known)
        must_read(known)
        monkeypatch.setenv("SSL_CERT_FILE", str(other))
        unknown = open_tier(parse_tier(address))
        assert all("SSL_CERT_FILE" in refused(call) for call in calls_of(unknown, 10.0))
        must_read(known)
