"""Report file and function sizes by folder; exit 1 where one is over its hard limit.

Usage: python .ci/size_report.py [ROOT]
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

FOLDERS = ("export", "engines", "kernels", "runtime", "perf", "demo", "tests")


@dataclass(frozen=True)
class Limits:
    """Most lines of a file and of a function (first to last line, docstring included)."""

    file: int
    function: int


SOURCE_LIMITS = Limits(file=400, function=60)
TEST_LIMITS = Limits(file=700, function=90)


@dataclass(frozen=True)
class SourceFile:
    """One file: its lines, and (line, name, length) of every function in it."""

    path: Path
    num_lines: int
    functions: tuple[tuple[int, str, int], ...]


def measure(path: Path) -> SourceFile:
    """Count the lines of a Python file and of its functions."""
    source = path.read_text(encoding="utf-8")
    functions = tuple(
        (node.lineno, node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(ast.parse(source, str(path)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return SourceFile(path, source.count("\n"), functions)


def overlong(file: SourceFile, limits: Limits) -> Iterator[str]:
    """Yield one line for every hard limit that `file` breaks."""
    if file.num_lines > limits.file:
        yield f"{file.path}: {file.num_lines} lines, at most {limits.file}"
    for line, name, length in file.functions:
        if length > limits.function:
            yield f"{file.path}:{line} {name}: {length} lines, at most {limits.function}"


def table_row(folder: str, files: list[SourceFile]) -> str:
    """Format one line of the table: files and functions, median, 90th percentile, longest."""
    file_lines = [file.num_lines for file in files]
    lengths = [length for file in files for _, _, length in file.functions] or [0]
    p90 = quantiles(lengths, n=10)[-1] if len(lengths) > 1 else lengths[0]
    return (
        f"{folder:8} {len(files):5} {sum(file_lines):6} {median(file_lines):7.0f} "
        f"{max(file_lines):5} | {len(lengths):5} {median(lengths):7.1f} {p90:5.0f} "
        f"{max(lengths):5}"
    )


def main(root: Path) -> int:
    """Print the report for the tree at `root`; return the exit status."""
    print("folder   files  lines  median   max |  defs  median   p90   max")
    faults: list[str] = []
    sources: list[SourceFile] = []
    for folder in (".", *FOLDERS):
        paths = (root / folder).glob("*.py") if folder == "." else (root / folder).rglob("*.py")
        files = [measure(path) for path in sorted(paths)]
        if not files:
            continue
        print(table_row(folder, files))
        limits = TEST_LIMITS if folder == "tests" else SOURCE_LIMITS
        faults += [fault for file in files for fault in overlong(file, limits)]
        sources += files if folder != "tests" else []
    if sources:
        print(table_row("source", sources))
    print("\n".join(faults) if faults else "no file or function over its limit")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path()))
