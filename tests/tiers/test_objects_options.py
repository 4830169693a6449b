"""What the addresses of object stores may say, and where their credentials come from. No server."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.tiers.base import Tier
from penstock.tiers.objects import ObjectTier
from penstock.tiers.objects_secrets import read_secrets
from penstock.tiers.registry import open_tier, parse_tier

pytest.importorskip("obstore", reason="obstore is not installed (extra `objects`)")

SECRET = "the-secret"


@pytest.fixture
def private(tmp_path: Path) -> Path:
    path = tmp_path / "secrets.ini"
    path.write_text(f"[default]\naws_access_key_id = me\naws_secret_access_key = {SECRET}\n")
    path.chmod(0o600)
    return path


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)


def opened(address: str) -> ObjectTier:
    tier: Tier = open_tier(parse_tier(address))
    assert isinstance(tier, ObjectTier)
    tier.close()
    return tier


def refused(address: str) -> str:
    with pytest.raises(ConfigError) as raised:
        open_tier(parse_tier(address))
    assert SECRET not in str(raised.value)
    return str(raised.value)


def test_credentials_come_from_a_file_of_its_owner(private: Path) -> None:
    tier = opened(f"s3://bucket/a/b?credentials={private}&region=eu-west-1")
    config = tier._place.store.config
    assert (config["access_key_id"], config["secret_access_key"]) == ("me", SECRET)
    assert config["region"] == "eu-west-1"
    assert tier._place.store.prefix == "a/b"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_file_that_others_may_read_is_refused(private: Path, mode: int) -> None:
    private.chmod(mode)
    assert "chmod 600" in refused(f"s3://bucket?credentials={private}")
    assert "chmod 600" in refused(f"gs://bucket?credentials={private}")


@pytest.mark.parametrize(
    "content", [f"aws_secret_access_key = {SECRET}", f"[other]\nx = {SECRET}", f"[default]\n{SECRET}", "\xff"]
)
def test_files_that_make_no_sense_are_refused_without_quoting_them(private: Path, content: str) -> None:
    private.write_text(content, encoding="latin-1")
    assert "[default]" in refused(f"s3://bucket?credentials={private}")


def test_unknown_settings_are_refused_without_quoting_them(private: Path) -> None:
    private.write_text(f"[default]\n{SECRET} = 1\n")
    with pytest.raises(ConfigError, match="may set one") as raised:
        read_secrets(str(private), "s3", ("one",))
    assert SECRET not in str(raised.value)


def test_no_file_is_told(tmp_path: Path) -> None:
    assert "No such file" in refused(f"s3://bucket?credentials={tmp_path / 'none'}")
    assert "not a file" in refused(f"s3://bucket?credentials={tmp_path}")


@pytest.mark.parametrize("scheme", ["s3", "az"])
def test_an_endpoint_without_tls_has_to_be_allowed(scheme: str) -> None:
    assert "insecure=true" in refused(f"{scheme}://bucket?endpoint=http://127.0.0.1:1")
    assert "not an http or https URL" in refused(f"{scheme}://bucket?endpoint=ftp://127.0.0.1:1")


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_addresses_that_name_no_bucket(scheme: str) -> None:
    for location in ("", "//", "bucket", "/bucket", "///prefix"):
        assert f"{scheme}://bucket" in refused(f"{scheme}:{location}")


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_how_many_requests_at_once(scheme: str) -> None:
    for wanted in ("0", "257", "-1"):
        more = "&account=somebody" if scheme == "az" else ""
        assert "1 to 256" in refused(f"{scheme}://bucket?parallel={wanted}{more}")
    assert "did you mean 'parallel'" in refused(f"{scheme}://bucket?paralel=4")


def test_an_account_of_azure(private: Path) -> None:
    private.write_text("[default]\naccount_key = c2VjcmV0\n")
    config = opened(f"az://container/p?account=somebody&credentials={private}")._place.store.config
    assert (config["account_name"], config["account_key"]) == ("somebody", "c2VjcmV0")


def test_no_account_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_USE_EMULATOR"):
        monkeypatch.delenv(name, raising=False)
    assert "account=..." in refused("az://container")


@pytest.mark.parametrize("content", ["", SECRET, f'{{"private_key": "{SECRET}"}}', f'{{"type": "{SECRET}"'])
def test_a_service_account_that_is_none_is_refused_without_quoting_it(private: Path, content: str) -> None:
    private.write_text(content)
    assert "service account" in refused(f"gs://bucket?credentials={private}")
