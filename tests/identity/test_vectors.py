"""The published vectors hold: here, in other processes, hashed by hashlib and by the kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.identity import chain, is_warm, warm
from tests.identity import check_vectors


def test_vectors_with_hashlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "_bulk", None)
    check_vectors.check_all()


def test_vectors_with_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert warm()
    assert is_warm()
    monkeypatch.setattr(chain, "_KERNEL_FROM", 1)
    check_vectors.check_all()


@pytest.mark.parametrize("arguments", [[], ["--warm"]], ids=["hashlib", "kernel"])
@pytest.mark.parametrize("seed", ["0", "1", "4242"])
def test_vectors_in_other_processes(seed: str, arguments: list[str]) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.identity.check_vectors", *arguments],
        cwd=root,
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_wrong_vector_is_noticed() -> None:
    vectors = check_vectors.load()
    spoilt = json.loads(json.dumps(vectors))
    spoilt["chains"][0]["keys"][2] = "00" * 16
    with pytest.raises(AssertionError, match="three full blocks"):
        check_vectors.check_chains(spoilt)


def test_the_published_recipe_gives_the_same_keys() -> None:
    """The few lines of Python in the documentation, run as they stand."""
    docs = Path(__file__).parents[2] / "docs"
    path = docs / "formats.md"
    text = path.read_text() if path.exists() else ""
    if "def keys(space_digest" not in text:
        text = (docs / "_identity.md").read_text()
    blocks = [part.partition("\n```")[0] for part in text.split("```python\n")[1:]]
    recipe = next(block for block in blocks if "def keys(space_digest" in block)
    names: dict[str, object] = {}
    exec(recipe, names)
    vectors = check_vectors.load()
    space = check_vectors.space_of(vectors["spaces"][0]["fields"])
    found = names["keys"](space.digest(), list(range(55)), 16)  # type: ignore[operator]
    assert [key.hex() for key in found] == vectors["chains"][0]["keys"]
