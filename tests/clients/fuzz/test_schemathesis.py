"""Thousands of requests made of the server's OpenAPI document, good and bad."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cases import KEY, Setup

from edje.perf.server_process import ServerProcess

HERE = Path(__file__).parent
NUM_EXAMPLES = 60  # of each route; and what its document's edges give
GROWTH_MB = 150


def fuzz(server: ServerProcess, folder: Path, *options: str) -> None:
    """Run schemathesis; it exits with 1 and says how to repeat each failure."""
    command = [Path(sys.executable).with_name("st"), "--config-file", HERE / "schemathesis.toml"]
    asked = ["run", f"{server.url}/openapi.json", "--phases", "examples,coverage,fuzzing"]
    counts = ["--max-examples", str(NUM_EXAMPLES), "--seed", "1", "--continue-on-failure"]
    env = {**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(HERE)}
    ran = subprocess.run(
        [*command, *asked, *counts, "--no-color", "--warnings", "off", *options],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-20_000:] + ran.stderr[-2000:]


def check_sound(server: ServerProcess, before: dict[str, float]) -> None:
    """Check that no request met a fault of ours, and that nothing was kept."""
    failed = {
        name: count
        for name, count in server.metrics().items()
        if name.startswith("edje_requests_total") and 'status="5' in name
    }
    assert failed == {}
    assert "Traceback" not in server.log_text()
    assert server.metrics()["edje_body_bytes"] == 0
    held = server.holds()
    assert held["rss_mb"] < before["rss_mb"] + GROWTH_MB
    assert held["threads"] < before["threads"] + 50  # FastAPI's pool among them


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where schemathesis writes what it learns."""
    return tmp_path


def test_what_the_document_allows_is_served_and_nothing_breaks(setup: Setup, folder: Any) -> None:
    """Every id ranks, so that what the document allows has no reason to be refused."""
    with setup.serve("--unknown-ids", "lowest") as server:
        before = server.holds()
        fuzz(server, folder)
        check_sound(server, before)


def test_a_server_with_keys_that_refuses_unknown_ids(setup: Setup, folder: Any) -> None:
    with setup.serve(keys=[KEY]) as server:
        before = server.holds()
        header = f"Authorization: Bearer {KEY}"
        fuzz(server, folder, "--header", header, "--exclude-checks", "positive_data_acceptance")
        check_sound(server, before)
