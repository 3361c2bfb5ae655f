"""Hashes of code by its statements, with which a test notices that a versioned function changed."""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from types import ModuleType


def statements_hash(*sources: Callable | type | ModuleType) -> str:
    """One hash of all that these functions, classes and modules state.

    Comments, docstrings and layout are left out, so that only a change of what runs changes it.
    """
    trees = [ast.parse(textwrap.dedent(inspect.getsource(source))) for source in sources]
    return hashlib.sha256(repr([_plain(tree) for tree in trees]).encode()).hexdigest()[:16]


def _plain(node: object) -> object:
    """A syntax tree as nested tuples: without strings that stand alone, and without empty fields,
    which differ between versions of Python."""
    if isinstance(node, list):
        return tuple(_plain(item) for item in node if not _is_text(item))
    if not isinstance(node, ast.AST):
        return node
    values = {name: _plain(value) for name, value in ast.iter_fields(node)}
    filled = {name: value for name, value in values.items() if value not in (None, ())}
    return type(node).__name__, *filled.items()


def _is_text(node: object) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
