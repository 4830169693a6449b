"""Addresses of tiers: what they say, what is refused, and that no secret is in a refusal."""

from __future__ import annotations

import sys
from types import ModuleType

import msgspec
import pytest

from penstock.errors import ConfigError
from penstock.testing.dict_tier import DictTier
from penstock.tiers import registry
from penstock.tiers.registry import TierConfig, open_tier, options_of, parse_tier, register, schemes
from penstock.tiers.wrap import Slow
from penstock.types import WriteRule


class Options(msgspec.Struct, forbid_unknown_fields=True):
    size: int = 1 << 20
    strict: bool = False


@pytest.fixture(autouse=True)
def _scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    """`test:` is a dict, in a module that this process alone knows."""
    monkeypatch.setattr(registry, "_TIERS", dict(registry._TIERS))
    module = ModuleType("penstock_test_tier")
    vars(module).update(DEFAULT_WRITE=WriteRule.SECOND_USE, open_tier=open_dict)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    register("test", module.__name__)


def open_dict(location: str, options: dict[str, str], name: str) -> DictTier:
    return DictTier(name, options_of(Options, options, "test").size)


def test_everything_has_a_default() -> None:
    assert parse_tier("test:") == TierConfig("test", "", "test", WriteRule.SECOND_USE)
    assert parse_tier("test://h:1/a/b").location == "//h:1/a/b"


def test_everything_can_be_said() -> None:
    address = "test:/x?name=n&write=through&cap=2M&timeout=0.5&latency=0.02&bandwidth=50M&size=7&strict=true"
    assert parse_tier(address) == TierConfig(
        "test", "/x", "n", WriteRule.THROUGH, 2.0 * (1 << 20), 0.5, 0.02, 50.0 * (1 << 20),
        {"size": "7", "strict": "true"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("tset:/x", "did you mean 'test'"),
        ("/x", "is unknown"),
        ("test:/x?size", "name=value"),
        ("test:/x?size=1&size=2", "twice"),
        ("test:/x?write=now", "one of through"),
        ("test:/x?timeout=0", "more than 0"),
        ("test:/x?timeout=nan", "more than 0"),
        ("test:/x?latency=-1", "more than 0"),
        ("test:/x?bandwidth=fast", "bandwidth|size"),
        ("test:/x?cap=0", "size"),
        ("test://user:hunter2@host", "credentials"),
    ],
)
def test_what_is_refused(address: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        parse_tier(address)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("query", "says"), [("siez=1", "did you mean 'size'"), ("bandwith=1", "'bandwidth'"), ("size=many", "size")]
)
def test_options_that_a_tier_does_not_have(query: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        open_tier(parse_tier(f"test:/x?{query}"))


def test_opening() -> None:
    tier = open_tier(parse_tier("test:/x?size=4096&name=mine"))
    assert type(tier) is DictTier and (tier.name, tier.capacity_bytes) == ("mine", 4096)


@pytest.mark.parametrize("option", ["latency=0.001", "bandwidth=1M", "latency=0.001&bandwidth=1M"])
def test_a_tier_slowed_by_its_address(option: str) -> None:
    tier = open_tier(parse_tier(f"test:/x?{option}&name=mine"))
    assert type(tier) is Slow and type(tier.tier) is DictTier
    assert (tier.name, tier.kind, tier.local) == ("mine", "dict", True)


def test_schemes_are_taken_once() -> None:
    assert "test" in schemes() and schemes() == sorted(schemes())
    register("test", "penstock_test_tier")
    with pytest.raises(ConfigError, match="taken by penstock_test_tier"):
        register("test", "another")
