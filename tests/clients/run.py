"""`make test-clients`: rerank clients that people have, unchanged, against a real `edje serve`.

Each folder here with a `requirements.txt` is an environment: made once below `.cache/clients`, and
again when its pins change. The server runs in the Python that runs this file.

Usage: python tests/clients/run.py [--demo FOLDER] [--only NAME] [PYTEST_ARGS ...]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from edje import Reranker

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache" / "clients"
NUM_QUERIES = 64  # of the demo, and as many images
NUM_CASES = 8
NUM_CANDIDATES = 16
# What the clients would tell or ask others; and nothing is written beside the tests.
QUIET = {
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "PYTHONDONTWRITEBYTECODE": "1",
}


def environment(folder: Path) -> Path:
    """Return the Python of a folder's environment; make it where its pins are not installed."""
    place, pins = CACHE / folder.name, folder / "requirements.txt"
    python, stamp = place / "bin" / "python", place / ".installed"
    wanted = hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()
    if not stamp.is_file() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        quiet = ["--quiet", "--disable-pip-version-check", "--no-compile"]
        subprocess.run([python, "-m", "pip", "install", *quiet, "-r", pins], check=True)
        stamp.write_text(wanted)
    return python


def package() -> Path:
    """Return a folder that holds `edje`, of which the tests need what imports nothing else."""
    folder = CACHE / "package"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "edje"
    if not link.is_symlink():
        link.symlink_to(ROOT)
    return folder


def demo() -> Path:
    """Return a folder with a small demo: engine, store, queries."""
    folder = CACHE / "demo"
    command = [sys.executable, "-m", "edje", "--quiet", "demo", "--num-queries", str(NUM_QUERIES)]
    subprocess.run([*command, "--out", folder], check=True, stdout=subprocess.DEVNULL)
    return folder


def write_setup(folder: Path) -> Path:
    """Write what the tests start and expect; `Reranker.rank` says what is right."""
    lines = (folder / "queries.jsonl").read_text().splitlines()[:NUM_CASES]
    engine, store, cases = folder / "engine", folder / "scenes.store", []
    with Reranker.open(engine, store=store) as reranker:
        for line in map(json.loads, lines):
            hits = reranker.rank(line["query"], ids := line["candidates"][:NUM_CANDIDATES]).hits
            order, logits = [hit.index for hit in hits], [hit.score for hit in hits]
            cases.append({"query": line["query"], "ids": ids, "order": order, "logits": logits})
    setup = {"python": sys.executable, "engine": str(engine), "store": str(store), "cases": cases}
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / "setup.json"
    path.write_text(json.dumps(setup))
    return path


def main() -> int:
    """Run every environment's tests; return 1 where some fail."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--demo", type=Path, help="of `edje demo`; default: a small one is made")
    parser.add_argument("--only", help="the environment to run; default: all")
    own, for_pytest = parser.parse_known_args()
    folders = sorted(pins.parent for pins in HERE.glob("*/requirements.txt"))
    pythons = {f: environment(f) for f in folders if own.only in (None, f.name)}
    setup = write_setup(own.demo.resolve() if own.demo else demo())
    failed = not pythons
    for folder, python in pythons.items():
        print(f"\n{folder.name}: {python}", flush=True)
        command = [python, "-m", "pytest", "-c", HERE / "pytest.ini", "--rootdir", HERE, folder]
        told = {"EDJE_CLIENTS_SETUP": str(setup), "PYTHONPATH": str(package())}
        env = {**os.environ, **QUIET, **told}
        failed |= subprocess.run([*command, *for_pytest], env=env, cwd=HERE).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
