"""The report that `make check` prints: it measures the house, and refuses what is over a limit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from private_names import ALLOWED, private_accesses

ROOT = Path(__file__).parent.parent


def run_report(root: Path) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / ".ci" / "house_report.py")
    return subprocess.run([sys.executable, script, str(root)], capture_output=True, text=True)


def write(root: Path, name: str, lines: list[str]) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    """What the report says of this very tree, by measure."""
    report = run_report(ROOT)
    assert not report.stderr
    rows = re.findall(r"^(.{40}) +([\d,]+) +([\d,]+) +([\d,]+)$", report.stdout, re.M)
    return {name.strip(): float(now.replace(",", "")) for name, now, _, _ in rows}


def test_every_measure_of_this_tree_sees_something(measured) -> None:
    nothing = {name for name, now in measured.items() if now == 0}
    assert nothing <= {
        *("circles of folders and files", "arrows up", "accesses of tests to private names"),
        "pretended GPUs",
    }
    assert {"source files", "files under Reranker", "rank of one batch: calls"} <= measured.keys()
    assert measured["store read of one batch: calls"] < measured["rank of one batch: calls"]


def test_files_and_functions_at_the_limit_are_accepted(tmp_path: Path) -> None:
    write(tmp_path, "runtime/whole.py", ["def long():", *["    pass"] * 59, *["x = 1"] * 340])
    for folder in ("export", "engines", "kernels", "demo"):
        write(tmp_path, f"{folder}/small.py", [*["def short(): pass"] * 2, *["x = 1"] * 398])
    report = run_report(tmp_path)
    assert (report.returncode, report.stderr) == (0, ""), report.stdout
    assert "whole.py" not in report.stdout


def test_what_is_over_is_named(tmp_path: Path) -> None:
    write(tmp_path, "runtime/large.py", ["def long():", *["    pass"] * 60, *["x = 1"] * 340])
    write(tmp_path, "runtime/one.py", ["from . import two"])
    write(tmp_path, "runtime/two.py", ["from . import one"])
    write(tmp_path, "kernels/up.py", ["from ..runtime import one"])
    report = run_report(tmp_path)
    assert report.returncode == 1
    assert re.search(r"large\.py: 401 lines, at most 400", report.stdout)
    assert re.search(r"large\.py:1 long: 61 lines, at most 60", report.stdout)
    assert "circles of folders and files: 1, at most 0" in report.stdout
    assert "arrows up: 1, at most 0" in report.stdout


# `§` stands for the underscore, or this file would be found.
FOREIGN = """
import sys
from edje.files import §swap
class Mine:
    def §own(self): return self.§value + sys.§getframe() + Mine().§own()
def test(monkeypatch):
    monkeypatch.setattr(files, "§fill", None)
    monkeypatch.setattr("edje.files.§sign", None)
    pair.§replace(a=1)
    assert store.§catalog.§rows
    run("import edje\\nprint(edje.§secret)")
"""


def test_accesses_to_others_private_names_are_found(tmp_path: Path) -> None:
    write(tmp_path, "test_foreign.py", FOREIGN.replace("§", "_").strip().splitlines())
    write(tmp_path, "test_good.py", ["def _mine(): pass", "module._mine()", "x._from_support()"])
    write(tmp_path, "support/helper.py", ["def _from_support(): pass"])
    (name,) = found = private_accesses(tmp_path)
    assert name == "test_foreign.py"
    names = {access.partition(": ")[2] for access in found[name]}
    assert names == {"_swap", "_fill", "_sign", "_catalog", "_rows", "_secret"}


def test_few_accesses_are_allowed_by_name() -> None:
    assert len(ALLOWED) <= 10
