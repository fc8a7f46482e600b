"""Base and head side by side: two trees of sources, each of which a process can import as `edje`.

    .cache/perf-gate/base/edje     the base's product code, with the head's `perf/` laid over it
    .cache/perf-gate/head/edje     the checkout as it is, changes that are not committed included

Both run the same benchmarks on their own product code, by the same interpreter and libraries.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import EdjeError

PACKAGE, PERF = "edje", "perf"
DEFAULT_REFS = ("origin/main", "HEAD~1")
PINS = ("pyproject.toml", "constraints.txt")
CACHED = Path(".cache") / "perf"  # where perf keeps the exported model: both use one


@dataclass(frozen=True, slots=True)
class Tree:
    """One side.

    Attributes:
        name: `base` or `head`: of equal length, for environment and paths move a process's memory.
        folder: what holds the package.
        commit: it was taken from, with `+` where files differ from it.
    """

    name: str
    folder: Path
    commit: str

    @property
    def package(self) -> Path:
        """Folder of the sources."""
        return self.folder / PACKAGE

    def environment(self, outer: Mapping[str, str]) -> dict[str, str]:
        """Return the environment in which a process imports this tree."""
        fixed = {"PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false"}
        return {**outer, **fixed, "PYTHONPATH": str(self.folder)}


@dataclass(frozen=True, slots=True)
class Trees:
    """Both sides, and what is to be said of how they differ.

    Attributes:
        base, head: the sides.
        notes: what a reader of the figures must know.
    """

    base: Tree
    head: Tree
    notes: tuple[str, ...] = ()


def lay_out(root: Path, work: Path, ref: str | None = None) -> Trees:
    """Lay both trees out in `work`; what was there is replaced.

    Args:
        root: the checkout: a git work tree.
        ref: of the base; None: the first of `DEFAULT_REFS` that is there and is not the head.

    Raises:
        EdjeError: `root` is no checkout, or there is no such commit.
    """
    head_commit = _git(root, "rev-parse", "HEAD")
    changed = bool(_git(root, "status", "--porcelain"))
    base_commit = _commit(root, ref, head_commit, changed)
    base = Tree("base", work / "base", base_commit[:12])
    head = Tree("head", work / "head", head_commit[:12] + "+" * changed)
    for tree in (base, head):
        shutil.rmtree(tree.folder, ignore_errors=True)
        tree.package.mkdir(parents=True)
    _extract(root, base_commit, base.package)
    _copy_checkout(root, head.package)
    shutil.rmtree(base.package / PERF, ignore_errors=True)
    shutil.copytree(head.package / PERF, base.package / PERF)
    cached = (root / CACHED).absolute()
    cached.mkdir(parents=True, exist_ok=True)
    for tree in (base, head):
        place = tree.package / CACHED
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(cached)
    return Trees(base, head, tuple(_notes(base, head)))


def _commit(root: Path, ref: str | None, head: str, changed: bool) -> str:
    """Return the base's commit."""
    for name in DEFAULT_REFS if ref is None else (ref,):
        try:
            found = _git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
        except EdjeError:
            continue
        if ref is not None or found != head or changed:
            return found
    raise EdjeError(
        f"{root} has no commit to compare with, expected {ref or ' or '.join(DEFAULT_REFS)}",
        hint="make perf-gate BASE=REF; a shallow clone lacks most: git fetch --unshallow",
    )


def _extract(root: Path, commit: str, folder: Path) -> None:
    """Write a commit's files."""
    archive = subprocess.Popen(
        ["git", "-C", str(root), "archive", "--format=tar", commit], stdout=subprocess.PIPE
    )
    with archive:
        done = subprocess.run(["tar", "-x", "-C", str(folder)], stdin=archive.stdout)
    if archive.returncode or done.returncode:
        raise EdjeError(f"cannot write the files of {commit} into {folder}")


def _copy_checkout(root: Path, folder: Path) -> None:
    """Copy what git tracks, and what it would: everything that it does not ignore."""
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in listed.split("\0"):
        source, target = root / name, folder / name
        if name and source.is_file():  # not what was deleted
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def _notes(base: Tree, head: Tree) -> list[str]:
    """Say what else differs: both run with the libraries that are installed."""
    differing = [
        name for name in PINS if _bytes(base.package / name) != _bytes(head.package / name)
    ]
    if not differing:
        return []
    return [f"{' and '.join(differing)} differ: both sides ran with the libraries installed here"]


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _git(root: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], check=True, capture_output=True, text=True
        )
    except OSError as error:
        raise EdjeError(f"git cannot be run: {error}") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip() or f"exit code {error.returncode}"
        raise EdjeError(f"git {' '.join(words)} in {root}: {said}") from error
    return done.stdout.strip("\n")
