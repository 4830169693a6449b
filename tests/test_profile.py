"""The profile's file: where it is, that it is whole, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.profile import Direction, Model, Point, Profile, TierProfile, load_profile, profile_path, save_profile
from tests.test_public import loaded

MODEL = Model(Direction.READ, 1e-4, 2e9, 0.05, 0.2)
POINT = Point(Direction.READ, 4096, 100.5, 120.25, 0.04, 17)
PROFILE = Profile("2025-01-01T00:00:00+00:00", {"cpu": "one"}, [TierProfile("dir:/x", "dir", [MODEL], [POINT])])


def test_it_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE_DIR", str(tmp_path / "new"))
    path = save_profile(PROFILE)
    assert path == profile_path() == tmp_path / "new" / "profile.json"
    assert load_profile() == PROFILE
    tier = load_profile().tier("dir:/x")
    assert tier is not None and tier.model(Direction.WRITE) is None
    assert tier.model(Direction.READ) == MODEL and MODEL.seconds(2_000_000) == pytest.approx(1.1e-3)


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert profile_path() == tmp_path / "penstock" / "profile.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somewhere")
    assert profile_path() == Path("/somewhere/.cache/penstock/profile.json")


def test_a_failed_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_profile(PROFILE, tmp_path / "profile.json")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(ConfigError, match=r"No space left.*--out"):
            save_profile(Profile("later", {}, []), path)
    assert load_profile(path) == PROFILE
    assert os.listdir(tmp_path) == ["profile.json"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is no profile"),
        ("[]", "is no profile"),
        ('{"version": 2, "made_at": 1}', "has version 2, not 1"),
        ('{"version": 1}', "is no profile"),
    ],
)
def test_what_is_refused(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=why) as caught:
        load_profile(path)
    assert "penstock probe" in str(caught.value)


def test_an_unknown_field_is_refused(tmp_path: Path) -> None:
    path = save_profile(PROFILE, tmp_path / "profile.json")
    document = json.loads(path.read_text())
    document["tiers"][0]["models"][0]["latency_ms"] = 3
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="latency_ms"):
        load_profile(path)


def test_without_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no profile at .*penstock probe"):
        load_profile(tmp_path / "none.json")


def test_it_is_light() -> None:
    assert not loaded("import penstock.profile") & {"numba", "matplotlib", "rich", "typer", "torch"}
