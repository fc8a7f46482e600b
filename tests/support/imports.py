"""Read every import of the package from its syntax trees, without importing anything."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "edje"
FOLDERS = ("export", "engines", "kernels", "runtime", "perf", "demo")


@dataclass(frozen=True)
class Import:
    """One imported module: who imports what, where, and whether it waits for a call.

    `target` is a full module name. `lazy` means inside a function, `typing_only` under
    `if TYPE_CHECKING:`. `relative` is how the source spells it.
    """

    module: str
    target: str
    line: int
    lazy: bool
    typing_only: bool
    relative: bool

    @property
    def eager(self) -> bool:
        """Whether importing `module` runs this import."""
        return not self.lazy and not self.typing_only

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def read_package(root: Path) -> dict[str, str]:
    """Return {module name: source} of the package whose root folder is `root`."""
    paths = [*root.glob("*.py"), *(p for f in FOLDERS for p in (root / f).rglob("*.py"))]
    return {_name(path.relative_to(root)): path.read_text(encoding="utf-8") for path in paths}


def _name(path: Path) -> str:
    parts = [PACKAGE, *path.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder_of(module: str, packages: Collection[str]) -> str:
    """Return the folder that a module lies in, as `runtime.store`; `root` for the root's own."""
    folder = module if module in packages else module.rpartition(".")[0]
    return folder.removeprefix(PACKAGE).removeprefix(".") or "root"


def packages_of(sources: Mapping[str, str]) -> set[str]:
    """Return the modules that are folders: those that others lie in."""
    parts = (name.split(".") for name in sources)
    return {PACKAGE, *(".".join(p[:n]) for p in parts for n in range(1, len(p)))}


def reached(edges: Mapping[str, Collection[str]], start: str) -> set[str]:
    """Return all that is reached from `start` along `edges`, `start` included."""
    found, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += edges.get(name, ())
    return found


def circles(edges: Mapping[str, Collection[str]]) -> list[set[str]]:
    """Return every group of names that reach each other."""
    beyond = {name: reached(edges, name) for name in edges}
    groups: list[set[str]] = []
    for name, those in beyond.items():
        group = {other for other in those if name in beyond.get(other, ())}
        if len(group) > 1 and group not in groups:
            groups.append(group)
    return groups


def find_imports(sources: Mapping[str, str]) -> list[Import]:
    """Return every import of `sources`, those by `import_module("...")` included."""
    packages = packages_of(sources) | {f"{PACKAGE}.{folder}" for folder in FOLDERS}
    return [
        found
        for module, source in sources.items()
        for found in _Reader(module, module in packages, sources).read(source)
    ]


class _Reader(ast.NodeVisitor):
    """Collects the imports of one module."""

    def __init__(self, module: str, is_package: bool, known: Mapping[str, str]):
        self.module, self.known = module, known
        self.package = module if is_package else module.rpartition(".")[0]
        self.lazy = self.typing_only = False
        self.found: list[Import] = []

    def read(self, source: str) -> list[Import]:
        self.visit(ast.parse(source, self.module))
        return self.found

    def add(self, target: str, line: int, *, relative: bool = False) -> None:
        self.found.append(Import(self.module, target, line, self.lazy, self.typing_only, relative))

    def visit_function(self, node: ast.AST) -> None:
        outer, self.lazy = self.lazy, True
        self.generic_visit(node)
        self.lazy = outer

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_function

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self.generic_visit(node)
            return
        outer, self.typing_only = self.typing_only, True
        for child in node.body:
            self.visit(child)
        self.typing_only = outer
        for child in node.orelse:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self.resolve("." * node.level + (node.module or ""))
        for target in dict.fromkeys(self.submodules(base, node)):
            self.add(target, node.lineno, relative=node.level > 0)

    def submodules(self, base: str, node: ast.ImportFrom) -> Iterator[str]:
        """Yield what `from base import names` loads: a submodule where a name is one."""
        for alias in node.names:
            submodule = f"{base}.{alias.name}"
            yield submodule if submodule in self.known else base

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        called = node.func.attr if isinstance(node.func, ast.Attribute) else None
        called = node.func.id if isinstance(node.func, ast.Name) else called
        argument = node.args[0] if node.args else None
        if called in ("import_module", "__import__") and isinstance(argument, ast.Constant):
            name = str(argument.value)
            self.add(self.resolve(name), node.lineno, relative=name.startswith("."))

    def resolve(self, name: str) -> str:
        """Return the full name of a possibly relative module name."""
        level = len(name) - len(name.lstrip("."))
        if level == 0:
            return name
        parts = self.package.split(".")
        return ".".join([*parts[: len(parts) - level + 1], name[level:]]).rstrip(".")
