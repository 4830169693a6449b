"""Policies by name. Importing this compiles nothing; `find` imports (and compiles or loads) the one asked
for.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module

from penstock.errors import ConfigError
from penstock.policies.base import Policy

__all__ = ["find", "names"]

_WHERE = {"lru": ("penstock.policies.lru", "Lru")}


def names() -> list[str]:
    """Every policy's name, sorted."""
    return sorted(_WHERE)


def find(name: str) -> type[Policy]:
    """The policy of that name; ConfigError naming the nearest one if there is none."""
    if name not in _WHERE:
        near = get_close_matches(name, _WHERE, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names())}."
        raise ConfigError(f"no policy is called {name!r}; {hint}")
    module, attribute = _WHERE[name]
    policy: type[Policy] = getattr(import_module(module), attribute)
    return policy
