"""Find where tests reach into another module's private names, from syntax trees alone."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Collection, Iterator
from pathlib import Path

# Underscored, yet public: namedtuples' methods, and what only Python's own modules offer so.
PUBLIC = {"_asdict", "_replace", "_fields", "_make", "_exit", "_getframe"}
OWN = {"self", "cls"}
# "file: name" that has no other way, each with its reason; at most 10.
ALLOWED: frozenset[str] = frozenset()
BY_NAME = {"setattr", "getattr", "hasattr", "delattr", "object"}  # `patch.object` too


def private_accesses(folder: Path) -> dict[str, list[str]]:
    """Return {file: ["line: name", ...]} of the tests in `folder` that name others' insides.

    A test file may use private names that it or a file of `support/` defines itself.
    """
    trees = {path: _parsed(path) for path in sorted(folder.rglob("*.py"))}
    support = {
        name for path in trees if path.parent.name == "support" for name in _own(trees[path])
    }
    found: dict[str, list[str]] = {}
    for path, tree in trees.items():
        name = path.relative_to(folder).as_posix()
        for line, private in _accesses(tree, support | set(_own(tree))):
            if f"{name}: {private}" not in ALLOWED:
                found.setdefault(name, []).append(f"{line}: {private}")
    return found


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _own(tree: ast.AST) -> Iterator[str]:
    """Yield the private names that a file defines: functions, classes, fields, variables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and _is_own(node) and isinstance(node.ctx, ast.Store):
            yield node.attr


def _accesses(tree: ast.AST, known: Collection[str]) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of every access to a private name that is not known."""
    for node in ast.walk(tree):
        for name in _named(node):
            if _is_private(name) and name not in known:
                yield getattr(node, "lineno", 0), name
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from ((node.lineno, name) for name in _in_program(node.value, known))


def _named(node: ast.AST) -> Iterator[str]:
    """Yield the names of others that a node reaches for."""
    if isinstance(node, ast.Attribute) and not _is_own(node):
        yield node.attr
    elif isinstance(node, ast.ImportFrom):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.Call):
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if name in BY_NAME:
            texts = [a.value for a in node.args if isinstance(a, ast.Constant)]
            yield from (text.rpartition(".")[2] for text in texts[:1] if isinstance(text, str))


def _in_program(text: str, known: Collection[str]) -> Iterator[str]:
    """Yield what a program in a string, which the test has another process run, reaches for."""
    if "import" not in text:
        return
    try:
        program = ast.parse(textwrap.dedent(text))
    except SyntaxError:
        return
    if not any(isinstance(node, ast.Import | ast.ImportFrom) for node in program.body):
        return
    yield from (name for _, name in _accesses(program, {*known, *_own(program)}))


def _is_own(node: ast.Attribute) -> bool:
    owner = node.value
    if isinstance(owner, ast.Call):
        return isinstance(owner.func, ast.Name) and owner.func.id == "super"
    return isinstance(owner, ast.Name) and owner.id in OWN


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC
