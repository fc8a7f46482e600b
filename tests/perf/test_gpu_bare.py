"""`make gpu VENV= PYTHON=...` from a clone whose package is installed nowhere."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from edje.kernels.device.facts import driver_fault

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """A Python with every library of this one but the package itself."""
    folder = tmp_path_factory.mktemp("python")
    libraries = folder / "libraries"
    libraries.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "edje" not in path.name and path.suffix != ".pth":
            (libraries / path.name).symlink_to(path)
    program = folder / "python3"
    real = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    path = f'PYTHONPATH="$PYTHONPATH:{libraries}"'
    program.write_text(f'#!/bin/sh\n{path} exec {real} -s "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    return program


def run(*command: object, **env: str) -> subprocess.CompletedProcess[str]:
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [*map(str, command)], cwd=ROOT, env=known | env, capture_output=True, text=True
    )


def test_the_package_is_not_installed_there(python):
    done = run(python, "-c", "import edje")
    assert "No module named 'edje'" in done.stderr


@pytest.mark.skipif(driver_fault() is None, reason="a GPU is here: it would run for minutes")
def test_make_gpu_runs_up_to_the_missing_gpu(python):
    listed = run("make", "gpu", "VENV=", f"PYTHON={python}", "GPU_ARGS=--list")
    assert listed.returncode == 0, listed.stderr
    assert "pytest -m gpu" in listed.stdout
    done = run("make", "gpu", "VENV=", f"PYTHON={python}")
    assert "make gpu needs an NVIDIA GPU: no NVIDIA driver here" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


@pytest.mark.slow
def test_its_model_is_exported_and_checked_without_a_gpu(python, tmp_path):
    report = tmp_path / "prepare.json"
    step = ("-m", "edje.perf.gpu_run", "--step", "prepare", "--report", report)
    done = run(python, *step, "--seconds", 100, PYTHONPATH=str(ROOT / ".mypy"))
    assert done.returncode == 0, done.stderr
    assert json.loads(report.read_text())["max_abs_diff_to_the_bundle"] <= 1e-3
