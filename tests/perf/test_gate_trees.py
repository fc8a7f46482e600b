"""Base and head side by side: each with its own product code, both with the head's benchmarks."""

from __future__ import annotations

import os
import subprocess

import pytest

from edje.errors import EdjeError
from edje.perf.gate_trees import lay_out


class Checkout:
    """A git repository of a few files."""

    def __init__(self, root):
        self.root = root
        self.git("init", "-q", "-b", "main")

    def git(self, *words):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        done = subprocess.run(
            ["git", "-C", str(self.root), *identity, *words],
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    def write(self, **files):
        for name, text in files.items():
            path = self.root / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def commit(self, **files):
        """Write and commit; return the commit."""
        self.write(**files)
        self.git("add", "-A")
        self.git("commit", "-qm", "x", "--allow-empty")
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    root.mkdir()
    made = Checkout(root)
    made.commit(product="old", perf__bench="old bench", perf__gone="gone", constraints="a==1")
    made.git("rm", "-q", "perf/gone")
    made.write(**{".gitignore": "/.cache/\n"})
    made.commit(product="new", perf__bench="new bench")
    return made


def texts(tree):
    """Return the files of a tree by name, without what git keeps."""
    return {
        str(path.relative_to(tree.package)): path.read_text()
        for path in sorted(tree.package.rglob("*"))
        if path.is_file() and not path.name.startswith(".git")
    }


def test_product_code_of_each_and_the_heads_benchmarks_for_both(checkout, tmp_path):
    trees = lay_out(checkout.root, tmp_path / "work")
    assert texts(trees.base) == {"product": "old", "perf/bench": "new bench", "constraints": "a==1"}
    assert texts(trees.head) == texts(trees.base) | {"product": "new"}
    assert trees.base.commit == checkout.git("rev-parse", "HEAD~1")[:12]
    assert trees.head.commit == checkout.git("rev-parse", "HEAD")[:12]
    assert len(str(trees.base.folder)) == len(str(trees.head.folder))
    assert trees.notes == ()


def test_the_head_is_the_checkout_as_it_is(checkout, tmp_path):
    checkout.write(product="changed", fresh="not added", **{".cache/x": "ignored"})
    (checkout.root / "constraints").unlink()
    trees = lay_out(checkout.root, tmp_path / "work", "HEAD")
    assert texts(trees.head) == {
        "product": "changed",
        "fresh": "not added",
        "perf/bench": "new bench",
    }
    assert texts(trees.base)["product"] == "new"
    assert trees.head.commit == trees.base.commit + "+"


def test_what_was_laid_out_before_is_replaced_and_both_keep_one_cache(checkout, tmp_path):
    first = lay_out(checkout.root, tmp_path / "work")
    (first.head.package / "product").write_text("edited")
    (first.head.package / "rest").write_text("of an earlier run")
    (first.base.package / ".cache" / "perf" / "model").write_text("kept")
    again = lay_out(checkout.root, tmp_path / "work")
    assert texts(again.head)["product"] == "new"
    assert not (again.head.package / "rest").exists()
    assert (again.head.package / ".cache" / "perf" / "model").read_text() == "kept"
    assert (checkout.root / ".cache" / "perf" / "model").read_text() == "kept"


def test_which_base(checkout, tmp_path):
    work, first = tmp_path / "work", checkout.git("rev-parse", "HEAD~1")
    checkout.git("update-ref", "refs/remotes/origin/main", first)
    checkout.commit(product="newer")
    assert lay_out(checkout.root, work).base.commit == first[:12]
    checkout.git("update-ref", "refs/remotes/origin/main", "HEAD")  # the head itself: no base
    assert lay_out(checkout.root, work).base.commit == checkout.git("rev-parse", "HEAD~1")[:12]
    checkout.write(product="not committed")  # then it is one
    assert lay_out(checkout.root, work).base.commit == checkout.git("rev-parse", "HEAD")[:12]
    with pytest.raises(EdjeError, match="expected no-such-ref"):
        lay_out(checkout.root, work, "no-such-ref")


def test_no_checkout_and_no_history(tmp_path):
    with pytest.raises(EdjeError, match="not a git repository"):
        lay_out(tmp_path, tmp_path / "work")
    root = tmp_path / "one"
    root.mkdir()
    Checkout(root).commit(product="x")
    with pytest.raises(EdjeError, match="git fetch --unshallow"):
        lay_out(root, tmp_path / "work")


def test_other_pins_are_noted(checkout, tmp_path):
    checkout.write(**{"constraints.txt": "a==2"})
    (note,) = lay_out(checkout.root, tmp_path / "work").notes
    assert note.startswith("constraints.txt differ")


def test_an_environment_finds_its_own_package_first(checkout, tmp_path):
    tree = lay_out(checkout.root, tmp_path / "work").base
    found = tree.environment({**os.environ, "PYTHONPATH": "elsewhere", "KEPT": "1"})
    assert found["PYTHONPATH"] == str(tree.folder)
    assert found["KEPT"] == "1"
