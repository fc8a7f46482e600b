"""kill -9 of a writer, anywhere: what was acknowledged is whole; and readers in its midst."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from store_history import MEMORY

# A killed process leaves what it has written to the system, so a disk adds nothing but time.
SCRIPT = Path(__file__).parents[2] / "support" / "store_killer.py"
KINDS = {"append", "replace", "delete", "compact", "commit"}
KILLS = 200


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)


def run_killer(*arguments: object) -> Counter[str]:
    """Run the script; return how many kills hit each kind of operation."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    quiet = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=quiet, timeout=240)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["faults"] == []
    return Counter(outcome["hit"])


@pytest.mark.slow
def test_two_hundred_kills_at_random_moments(folder: Path) -> None:
    hit = run_killer("random", folder / "float16", "float16", 1, KILLS * 2 // 3)
    hit += run_killer("random", folder / "int8", "int8", 2, KILLS - KILLS * 2 // 3)
    assert sum(hit.values()) == KILLS
    assert min(hit[kind] for kind in KINDS) >= 5, hit


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_death_at_every_change_on_disk(folder: Path, dtype: str) -> None:
    hit = run_killer("everywhere", folder / "s", dtype, 3)
    assert hit.keys() == KINDS
    assert min(hit.values()) >= 3, "before, halfway and after at least one change"


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_readers_beside_a_writer_see_one_state_each_and_keep_it(folder: Path, dtype: str) -> None:
    hit = run_killer("beside", folder / "s", dtype, 4, 60)
    assert hit["opened"] == 60
    assert hit["states"] >= 20, "the writer went on meanwhile"
