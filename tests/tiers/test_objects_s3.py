"""The object tier over S3: the conformance suite, and what an S3 server, a network and other clients can do to it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from penstock.testing.tiers import TierSuite
from penstock.tiers.base import Tier
from penstock.tiers.registry import open_tier, parse_tier
from tests.tiers.objects_servers import BUCKET, KEY_ID, SECRET, WeedServer, need_weed

pytest.importorskip("obstore", reason="obstore is not installed (extra `objects`)")

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WeedServer]:
    need_weed()
    server = WeedServer(tmp_path_factory.mktemp("weed"))
    with server:
        yield server


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


def s3_tier(endpoint: str, prefix: str = "", *, bucket: str = BUCKET, **options: object) -> Tier:
    """A tier of that prefix, by default one that nobody else uses."""
    more = "".join(f"&{name}={value}" for name, value in options.items())
    prefix = prefix or f"tier-{next(NUMBERS)}"
    return open_tier(parse_tier(f"s3://{bucket}/{prefix}?endpoint={endpoint}&insecure=true{more}"))


class TestS3(TierSuite):
    survives_reopen = True
    examples = 3

    @pytest.fixture(autouse=True)
    def _place(self, weed: WeedServer) -> None:
        self.endpoint = weed.endpoint
        self.prefixes: dict[int, str] = {}

    def open_tier(self) -> Tier:
        return self._open(f"suite-{next(NUMBERS)}")

    def reopen(self, tier: Tier) -> Tier:
        return self._open(self.prefixes[id(tier)])

    def _open(self, prefix: str) -> Tier:
        tier = s3_tier(self.endpoint, prefix)
        self.prefixes[id(tier)] = prefix
        return tier
