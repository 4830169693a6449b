"""The pool's own kernels with one part taken out: compiled from the module's own source, in the process that asks.

Nothing is cached, and the module that everybody else imports stays as it is.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from numba import types
from numba.extending import intrinsic

from penstock import jit
from penstock.jit import inline_kernel

_numbers = itertools.count()


def _nothing(typing_context: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_dummy_value()

    return types.void(), codegen


# In the place of a fence: no instruction at all.
no_fence = intrinsic(_nothing)


@inline_kernel
def always_valid(ctx: int, cell: int, n: int) -> int:
    """In the place of the reader's second look: everything is still as it was found."""
    return n


@inline_kernel
def no_scan(ctx: int, marks: Any) -> None:
    """In the place of the keeper's scan of the lanes: nobody holds anything."""


@inline_kernel
def no_block_back(ctx: int, unit: int, length: int) -> None:
    """A payload that is not written back."""


@inline_kernel
def no_published_back(ctx: int, unit: int, lo: int, hi: int) -> None:
    """A record and its directory entry that are not written back."""


@inline_kernel
def no_record_back(ctx: int, unit: int) -> None:
    """A record that is not written back."""


NO_WRITE_BACK: dict[str, dict[str, Any]] = {
    "apply": {"write_back_block": no_block_back, "write_back_published": no_published_back},
    "evict": {"write_back_record": no_record_back},
}
"""Modules without what they do for memory that is not coherent: those instructions are this machine's."""


# name -> module, what is replaced in it, and by what.
MUTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "reader's fence": ("penstock.pool.reader", {"fence_full": no_fence}),
    "reader's second look": ("penstock.pool.reader", {"_validate": always_valid}),
    "keeper's fence": ("penstock.pool.evict", {"fence_full": no_fence}),
    "keeper's scan": ("penstock.pool.evict", {"_scan_lanes": no_scan}),
    "writer's sfence": ("penstock.pool.writer", {"store_fence_nt": no_fence}),
}


def kernels(module_name: str, mutant: str, *names: str) -> list[Any]:
    """Those kernels of a module: its own, or compiled without what `mutant` removes where that is in this module."""
    where, replaced = MUTANTS.get(mutant, ("", {}))
    if where != module_name:
        module: ModuleType | dict[str, Any] = importlib.import_module(module_name)
        return [getattr(module, name) for name in names]
    return compile_with(module_name, replaced, *names)


def compile_with(module_name: str, replaced: dict[str, Any], *names: str) -> list[Any]:
    """Those kernels, compiled from the module's source with each replaced function bound to its replacement."""
    original = importlib.import_module(module_name)
    path = Path(str(original.__file__))
    tree = ast.parse(path.read_text(), str(path))
    body: list[ast.stmt] = []
    bound = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and (node.name in replaced or _unwanted(node, set(names))):
            bound |= {node.name} & set(replaced)
            continue
        body.append(node)
        if isinstance(node, ast.ImportFrom):
            for name in {alias.name for alias in node.names} & set(replaced):
                body.append(ast.parse(f"{name} = _replaced[{name!r}]").body[0])
                bound.add(name)
    assert bound == set(replaced), f"{module_name} has no {set(replaced) - bound} any more: this removes nothing"
    used = any(_uses(node, set(replaced)) for node in body if isinstance(node, ast.FunctionDef))
    assert used or not replaced, f"nothing of {names} uses {set(replaced)}: this removes nothing"
    tree.body = body
    copy = ModuleType(f"{module_name}_mutant_{next(_numbers)}")
    copy.__dict__.update(_replaced=replaced, **replaced)
    sys.modules[copy.__name__] = copy  # numba looks a function's module up by its name
    with mock.patch.object(jit, "cache_dir", return_value=None):
        exec(compile(ast.fix_missing_locations(tree), str(path), "exec"), copy.__dict__)
    return [getattr(copy, name) for name in names]


def _unwanted(node: ast.FunctionDef, wanted: set[str]) -> bool:
    is_kernel = any(isinstance(mark, ast.Call) for mark in node.decorator_list)
    return is_kernel and node.name not in wanted


def _uses(node: ast.FunctionDef, names: set[str]) -> bool:
    return any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node))
