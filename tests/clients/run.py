"""`make test-clients`: rerank clients that people have, unchanged, against a real `edje serve`.

Each folder here with a `requirements.txt` is an environment: made once below `.cache/clients`, and
again when its pins change. The server runs in the Python that runs this file. Some environments are
for tests of the suite itself, which skip where these packages are missing.

Usage: python tests/clients/run.py [--demo FOLDER] [--only NAME] [PYTEST_ARGS ...]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from edje import Reranker

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache" / "clients"
NUM_QUERIES = 64  # of the demo, and as many images
NUM_CASES = 8
NUM_CANDIDATES = 16
# Environments that find the packages of this Python behind their own -> tests of the suite, and
# what they would skip without.
SERVER = "tests/runtime/server"
SUITE = {
    "adapters": (
        (f"{SERVER}/test_adapters.py", f"{SERVER}/test_asgi.py"),
        "granian, haystack, lancedb, langchain_core",
    ),
    "ray": ((f"{SERVER}/route/test_ray_serve.py",), "ray.serve"),
}
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
        if folder.name in SUITE:
            (packages,) = place.glob("lib/python*/site-packages")
            behind = sysconfig.get_path("purelib")
            (packages / "behind.pth").write_text(f"import site; site.addsitedir({behind!r})\n")
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


def run_tests(folder: Path, python: Path, setup: Path, for_pytest: list[str]) -> bool:
    """Run the tests of one environment; return whether they passed."""
    command, env = [python, "-m", "pytest"], {**os.environ, **QUIET}
    if folder.name in SUITE:
        tests, modules = SUITE[folder.name]
        subprocess.run([python, "-c", f"import {modules}"], env=env, check=True)
        ran = subprocess.run([*command, *tests, *for_pytest], env=env, cwd=ROOT)
    else:
        told = {"EDJE_CLIENTS_SETUP": str(setup), "PYTHONPATH": str(package())}
        own = ["-c", HERE / "pytest.ini", "--rootdir", HERE, folder]
        ran = subprocess.run([*command, *own, *for_pytest], env={**env, **told}, cwd=HERE)
    return ran.returncode == 0


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
        failed |= not run_tests(folder, python, setup, for_pytest)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
