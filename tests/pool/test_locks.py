"""Proof of life: what the kernel says about who holds a byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.pool.locks import ByteLock
from tests.support import environment, wait_stopped

HOLD = """
import sys
from pathlib import Path
from penstock.pool.locks import ByteLock
lock = ByteLock(Path(sys.argv[1]))
print(lock.try_acquire(int(sys.argv[2])), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds byte 3."""
    command = [sys.executable, "-c", HOLD, str(path), "3"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment())
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == b"True\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_one_owner(path: Path) -> None:
    one, other = ByteLock(path), ByteLock(path)
    assert one.try_acquire(5) and one.try_acquire(5)
    assert not other.try_acquire(5) and other.held_by_other(5)
    assert not one.held_by_other(5), "one's own lock is no other's"
    assert other.try_acquire(6) and one.held_by_other(6)
    one.close()
    one.close()
    assert not other.held_by_other(5) and other.try_acquire(5)
    other.close()


def test_other_opens_of_the_file_in_this_process_change_nothing(path: Path) -> None:
    """A POSIX record lock would be lost here: at the first close of any descriptor of the file."""
    one, other = ByteLock(path), ByteLock(path)
    assert one.try_acquire(1)
    os.close(os.open(path, os.O_RDWR))
    assert other.held_by_other(1)
    one.close()
    other.close()


def test_held_by_another_process(path: Path, holder: subprocess.Popen[bytes]) -> None:
    lock = ByteLock(path)
    assert lock.held_by_other(3) and not lock.try_acquire(3)
    assert not lock.held_by_other(2)
    lock.close()


def test_a_stopped_owner_keeps_it_and_a_dead_one_does_not(path: Path, holder: subprocess.Popen[bytes]) -> None:
    lock = ByteLock(path)
    holder.send_signal(signal.SIGSTOP)
    wait_stopped(holder.pid)
    assert lock.held_by_other(3)
    holder.kill()
    holder.wait()
    assert not lock.held_by_other(3) and lock.try_acquire(3)
    lock.close()


def test_a_forked_child_that_abandons_it_leaves_it_with_the_parent(path: Path) -> None:
    lock, other = ByteLock(path), ByteLock(path)
    assert lock.try_acquire(1)
    if (pid := os.fork()) == 0:
        lock.abandon()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert other.held_by_other(1)
    lock.close()
    assert not other.held_by_other(1)
    other.close()


def test_programs_that_are_started_do_not_inherit_it(path: Path) -> None:
    lock, other = ByteLock(path), ByteLock(path)
    assert lock.try_acquire(1)
    command = [sys.executable, "-c", "import sys; print('running', flush=True); sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False) as program:
        # `Popen` returns while the kernel still closes what the program does not inherit.
        assert program.stdout is not None and program.stdout.readline()
        lock.close()
        assert not other.held_by_other(1)
    other.close()


def test_links_are_not_followed(path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"symbolic link|loop|Too many"):
        ByteLock(path)
