"""The Valkey tier against real servers: the suite of all tiers over TCP, Unix socket and TLS, and on a cluster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from penstock.testing.tiers import TierSuite
from penstock.tiers.base import Tier
from penstock.tiers.registry import open_tier, parse_tier
from tests.support import unique_name
from tests.tiers.servers import LOOPBACK, ValkeyCluster, ValkeyServer, make_certificates, need_valkey


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    need_valkey()
    with ValkeyServer(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    need_valkey()
    folder = tmp_path_factory.mktemp("tls")
    with ValkeyServer(folder, tls=make_certificates(folder)) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    need_valkey()
    with ValkeyCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


class ValkeySuite(TierSuite):
    """Each tier has a prefix of its own on one server, so it starts empty."""

    survives_reopen = True
    counts_presence = False  # small blocks are written without a look
    frees_at_once = False  # the server frees in the background, and is asked every few seconds

    address: str
    options = ""

    def open_tier(self) -> Tier:
        return self._open(f"{unique_name()}:")

    def reopen(self, tier: Tier) -> Tier:
        return self._open(tier.name)

    def _open(self, prefix: str) -> Tier:
        return open_tier(parse_tier(f"{self.address}?name={prefix}&prefix={prefix}{self.options}"))


class TestTcp(ValkeySuite):
    @pytest.fixture(autouse=True)
    def _place(self, server: ValkeyServer) -> None:
        self.address = f"valkey://{LOOPBACK}:{server.port}/3"


class TestUnix(ValkeySuite):
    options = "&db=2&ttl=600"

    @pytest.fixture(autouse=True)
    def _place(self, server: ValkeyServer) -> None:
        self.address = f"valkey+unix://{server.unix}"


class TestTls(ValkeySuite):
    @pytest.fixture(autouse=True)
    def _place(self, tls_server: ValkeyServer) -> None:
        assert tls_server.tls is not None
        self.address = f"redis://localhost:{tls_server.port}"
        self.options = f"&tls=true&ca={tls_server.tls[0]}"


class TestCluster(ValkeySuite):
    options = "&cluster=true"

    @pytest.fixture(autouse=True)
    def _place(self, cluster: ValkeyCluster) -> None:
        self.address = f"valkey:{cluster.location}"
