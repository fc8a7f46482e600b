"""ONNX Runtime and OpenVINO report nothing: no id in HOME, no try to reach anybody."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

import no_network
from edje.engines.builder.build import build_engine

# What decides for the libraries, and for us.
DECISIONS = ("ORT_DISABLE_TELEMETRY", "EDJE_TELEMETRY", "XDG_CACHE_HOME")
# Both libraries keep quiet by themselves where one of these is set.
CI_SYSTEMS = (
    *("CI", "TF_BUILD", "JENKINS_URL", "GITHUB_ACTIONS", "GITLAB_CI", "CIRCLECI", "TRAVIS"),
    *("CODEBUILD_BUILD_ID", "BUILDKITE", "TEAMCITY_VERSION", "APPVEYOR", "BITBUCKET_BUILD_NUMBER"),
)
EDJE = [sys.executable, "-c", "import sys; from edje.runtime.cli.app import main; sys.exit(main())"]
RANK = """
import sys
from edje import Reranker
with Reranker.open(sys.argv[1], store=sys.argv[2]) as reranker:
    assert len(reranker.rank("red"))
"""
LIBRARIES = "import onnxruntime, openvino; openvino.Core()"

why_no_namespace = cache(no_network.why_not)
Traces = tuple[list[str], int]


@pytest.fixture
def traces_of(tmp_path: Path) -> Callable[..., Traces]:
    """Run a command with an empty HOME; return the files that appear there or in its current
    folder, and how often it tried to reach a network."""

    def run(*command: object, **decisions: str) -> Traces:
        home, here = tmp_path / "home", tmp_path / "here"
        home.mkdir(exist_ok=True)
        here.mkdir(exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if k not in {*DECISIONS, *CI_SYSTEMS}}
        env = {**kept, "HOME": str(home), **decisions}
        attempts = no_network.run([*map(str, command)], here / "attempts", env)
        (here / "attempts").unlink()
        found = [path for place in (home, here) for path in place.rglob("*") if path.is_file()]
        return sorted(str(path.relative_to(tmp_path)) for path in found), attempts

    reason = why_no_namespace()
    if reason is not None:
        pytest.skip(reason)
    return run


@pytest.fixture(scope="module")
def built(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX Runtime engine."""
    folder = tmp_path_factory.mktemp("telemetry") / "engine"
    build_engine(tiny_bundle, folder, backend="onnxruntime", precision="fp32")
    return folder


NOTHING: Traces = ([], 0)


@pytest.mark.parametrize(
    "code",
    [
        "import edje.engines.onnxruntime",
        "import edje.engines.openvino",
        f"import edje\n{LIBRARIES}",
        f"from edje.perf import harness\n{LIBRARIES}",
        f"from edje.runtime.indexing.decoders import serve\n{LIBRARIES}",
    ],
)
def test_importing_any_part_leaves_no_trace(traces_of, code):
    assert traces_of(sys.executable, "-c", code) == NOTHING


def test_the_doctor_leaves_no_trace(traces_of):
    assert traces_of(*EDJE, "doctor") == NOTHING


def test_building_leaves_no_trace(traces_of, tiny_bundle, tmp_path):
    options = ("--backend", "openvino", "--precision", "fp32", "--out", tmp_path / "engine")
    assert traces_of(*EDJE, "build", tiny_bundle, *options) == NOTHING
    few = ("--bundle", tiny_bundle, "--max-queries", 1, "--num-candidates", 4)
    assert traces_of(*EDJE, "verify", tmp_path / "engine", *few) == NOTHING


def test_indexing_and_ranking_leave_no_trace(traces_of, tiny_bundle, built, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 48), "red").save(tmp_path / "images" / "a.png")
    places = (tiny_bundle, tmp_path / "images", "--store", tmp_path / "store")
    assert traces_of(*EDJE, "index", *places) == NOTHING
    assert traces_of(sys.executable, "-c", RANK, built, tmp_path / "store") == NOTHING


@pytest.mark.slow
def test_exporting_leaves_no_trace(traces_of, official_tiny, tmp_path):
    models = ("--language-model", official_tiny / "lm", "--vision-model", official_tiny / "siglip")
    command = ("export", official_tiny / "checkpoint_16.pth", *models, "--out", tmp_path / "out")
    assert traces_of(*EDJE, *command) == NOTHING


def test_a_user_who_wants_it_gets_the_libraries_as_they_are(traces_of):
    """So the tests above watch the right places."""
    files, _ = traces_of(sys.executable, "-c", f"import edje\n{LIBRARIES}", EDJE_TELEMETRY="1")
    assert any("openvino" in name for name in files)


def test_attempts_to_reach_the_network_are_counted(traces_of):
    code = "import socket; socket.socket(type=socket.SOCK_DGRAM).connect_ex(('192.0.2.1', 9))"
    _, attempts = traces_of(sys.executable, "-c", code)
    assert attempts == 1


@pytest.mark.parametrize(
    ("decided", "then"),
    [
        ({}, "1"),
        ({"ORT_DISABLE_TELEMETRY": ""}, "1"),
        ({"ORT_DISABLE_TELEMETRY": "0"}, "0"),
        ({"ORT_DISABLE_TELEMETRY": "true"}, "true"),
        ({"EDJE_TELEMETRY": "1"}, "None"),
        ({"EDJE_TELEMETRY": "0"}, "1"),
    ],
)
def test_what_the_environment_decides_stays(decided, then):
    env = {k: v for k, v in os.environ.items() if k not in DECISIONS} | decided
    code = "import edje, os; print(os.environ.get('ORT_DISABLE_TELEMETRY'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == then
