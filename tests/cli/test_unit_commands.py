"""The commands without a keeper: options, refusals, and what is printed of names that somebody else chose."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from penstock.cli import ls as ls_module
from penstock.cli import stat as stat_module
from penstock.cli.app import app
from penstock.errors import ConfigError, KeeperRunning, NoKeeper, NoPool, NotOurs
from penstock.pool import segment as segments
from penstock.pool.locks import KEEPER_BYTE, ByteLock
from penstock.testing.pool import TINY, Site, chain, embedded_keeper, make_space, source
from penstock.types import Intent
from tests.support import unique_name

COMMANDS = ["serve", "stat", "ls", "fsck", "rm", "kick", "demo", "bench"]
runner = CliRunner()


def test_every_command_has_help() -> None:
    listed = runner.invoke(app, ["--help"])
    assert listed.exit_code == 0
    for command in COMMANDS:
        assert command in listed.output
        assert runner.invoke(app, [command, "--help"]).exit_code == 0


@pytest.mark.parametrize("command", [["stat"], ["ls"], ["kick", "0"]])
def test_without_a_keeper(command: list[str]) -> None:
    done = runner.invoke(app, [*command, "--name", unique_name("c")])
    assert isinstance(done.exception, NoKeeper)


@pytest.mark.parametrize("command", [["stat"], ["ls"], ["rm"], ["fsck"], ["serve"]])
def test_names_are_checked(command: list[str]) -> None:
    done = runner.invoke(app, [*command, "--name", "../x"])
    assert isinstance(done.exception, ConfigError)


@pytest.mark.parametrize("size", ["many", "0", "-5M"])
def test_sizes_are_checked(size: str) -> None:
    name = unique_name("c")
    done = runner.invoke(app, ["serve", "--name", name, f"--size={size}"])
    assert isinstance(done.exception, ConfigError)
    assert not segments.default_path(name).exists()


def test_rm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pool"
    command = ["rm", "--path", str(path)]
    assert isinstance(runner.invoke(app, command).exception, NoPool)
    segments.create(path, TINY).close()
    lock = ByteLock(segments.lock_path(path))
    assert lock.try_acquire(KEEPER_BYTE)
    assert isinstance(runner.invoke(app, command).exception, KeeperRunning) and path.exists()
    lock.close()
    with monkeypatch.context() as patch:
        patch.setattr("os.geteuid", lambda: 4711)
        assert isinstance(runner.invoke(app, command).exception, NotOurs) and path.exists()
    done = runner.invoke(app, command)
    assert done.exit_code == 0 and not path.exists()
    assert segments.lock_path(path).exists(), "a lock file is never unlinked"


def test_fsck_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    segments.create(path, TINY).close()
    done = runner.invoke(app, ["fsck", "--path", str(path), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.output) == {"blocks": 0, "checksums_verified": 0, "problems": []}


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A pool whose label, session, tenant and client are called like markup, and commands that ask it."""
    from penstock.runtime.report import ls_report, stat_report

    name = "[/red] [bold] [x](y)"
    space = make_space()
    with Site.opened(unique_name("c")) as site:
        handle, keys = site.pool.space(space, name), chain(space, [1, 2])
        intent = Intent(session=name, tenant=name)
        site.pool.store(handle, keys, source(handle, keys), wait_s=5, intent=intent)
        assert site.pool.flush()
        keeper = embedded_keeper(site.pool)
        clients = [{"lane": 0, "pid": 1, "name": name}]

        def ask(_: str, what: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return ls_report(keeper) if what == "ls" else stat_report(keeper, clients)

        monkeypatch.setattr(ls_module, "ask", ask)
        monkeypatch.setattr(stat_module, "ask", ask)
        monkeypatch.setenv("COLUMNS", "400")
        yield name


@pytest.mark.parametrize("command", ["ls", "stat"])
def test_names_are_shown_as_they_are(hostile: str, command: str) -> None:
    done = runner.invoke(app, [command])
    assert done.exit_code == 0, done.exception
    assert hostile in done.output
    as_json = runner.invoke(app, [command, "--json"])
    assert hostile in json.dumps(json.loads(as_json.output))
