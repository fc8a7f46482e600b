"""`edje demo`, small: the whole way on real weights, and the README's example over its result."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from edje.demo.evaluation import DemoResult
from edje.demo.guide import print_table, run_demo
from edje.engines.builder.build import build_engine
from edje.engines.builder.options import EngineOptions
from edje.engines.fidelity import FidelityLimits
from edje.engines.manifest import EngineManifest
from edje.errors import EdjeError, RequestError
from edje.runtime.cli.app import main
from edje.runtime.queries import StoreSamples

README = Path(__file__).parents[2] / "README.md"
NUM_QUERIES = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "demo-out"


@pytest.fixture(scope="module")
def result(folder: Path) -> DemoResult:
    folder.mkdir()  # as the folder of a mounted volume is there, which cannot be replaced
    inode = folder.stat().st_ino
    result = run_demo(folder, num_queries=NUM_QUERIES)
    assert folder.stat().st_ino == inode
    return result


def test_reranking_finds_the_right_image(result: DemoResult) -> None:
    recalls = result.recalls()
    assert recalls["first stage"]["R@50"] >= 98
    assert recalls["reranked"]["R@1"] >= 85
    assert recalls["reranked"]["R@1"] >= recalls["first stage"]["R@1"] + 25


def test_every_candidate_comes_back_and_the_folder_holds_what_is_promised(
    result: DemoResult, folder: Path
) -> None:
    assert len(result.queries) == NUM_QUERIES
    for query in result.queries:
        assert sorted(query.before) == sorted(query.after)
        assert len(query.after) == result.num_candidates == 50
    names = {path.name for path in folder.iterdir()}
    assert {"index.html", "contact-sheet.png", "demo.json", "bundle", "engine"} <= names
    values = json.loads((folder / "demo.json").read_text())
    assert values["recall"] == result.recalls()
    assert values["bytes_per_image"] == 64 * 128 * 2
    assert [step["name"] for step in values["steps"]][-1] == "page"


def test_the_engine_is_the_fastest_that_ranks_as_float32_does(
    result: DemoResult, folder: Path
) -> None:
    manifest = EngineManifest.read(folder / "engine")
    trials = {(t["backend"], t["precision"]): t for t in manifest.build_options["auto"]}
    best = max(trials, key=lambda name: trials[name]["pairs_per_s"] or 0)
    assert (manifest.backend, manifest.precision) == best
    assert trials[best]["kendall_tau"] >= 0.975
    assert not manifest.fidelity["random"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
def test_rtx_engines_of_the_demo_are_built_without_a_gpu(
    result: DemoResult, folder: Path, tmp_path: Path, precision: str
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra rtx")
    pairs = folder / "calibration"
    with StoreSamples.open(
        pairs / "scenes.store", folder / "bundle", pairs / "queries.jsonl", max_queries=4
    ) as samples:
        manifest = build_engine(
            folder / "bundle",
            tmp_path / "engine",
            backend="tensorrt-rtx",
            precision=precision,
            calibration=samples,
            options=EngineOptions(text_buckets=[15], limits=FidelityLimits()),
        )
    assert manifest.fidelity["measured_on"] == "not measured on a device"
    assert manifest.fidelity["emulated"]["kendall_tau"] > 0.9
    assert manifest.fidelity["emulated"]["recall"]["R@1"] == 1.0


def test_the_demo_spares_folders_it_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(EdjeError, match="no demo wrote"):
        run_demo(tmp_path, num_queries=8)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("wrong", [0, -4, 1, 3, 66, 1028, 10**9])
def test_a_number_of_queries_that_cannot_be_is_refused_before_the_work(
    tmp_path: Path, wrong: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(RequestError, match=f"num_queries is {wrong}, expected a multiple of 4"):
        run_demo(out, num_queries=wrong)
    assert main(["demo", "--out", str(out), "--num-queries", str(wrong)]) == 2
    assert f"num_queries is {wrong}" in capsys.readouterr().err
    assert not out.exists()


def test_the_terminal_says_what_was_tried_what_was_not_and_where_to_go_on(
    result: DemoResult, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = [
        {"backend": "openvino", "precision": "fp32", "pairs_per_s": 1234.5, "kendall_tau": 1.0},
        {"backend": "openvino", "precision": "bf16", "refused": "tau 0.9 is below 0.975"},
        {"backend": "openvino", "precision": "int8", "not_tried": "this CPU has no VNNI"},
        {"backend": "tensorrt", "precision": "fp16", "not_tried": "not installed"},
        {"backend": "tensorrt", "precision": "fp8", "not_tried": "not installed"},
    ]
    blank = dict.fromkeys(("pairs_per_s", "kendall_tau", "refused", "not_tried"))
    print_table(replace(result, trials=[{**blank, **trial} for trial in trials]), folder)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "openvino fp32 1,234 pairs/s, Kendall tau 1.0000" in lines
    assert "openvino bf16 tau 0.9 is below 0.975" in lines
    assert "openvino int8 not tried: this CPU has no VNNI" in lines
    assert "tensorrt fp16 fp8 not tried: not installed" in lines
    assert f"Look: {folder / 'index.html'}, {folder / 'contact-sheet.png'}" in lines


def test_the_command_that_the_terminal_proposes_runs(
    result: DemoResult, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_table(result, folder)
    proposed = capsys.readouterr().out.split("Try:")[1].replace("\\\n", " ")
    done = subprocess.run(proposed, shell=True, capture_output=True, text=True, check=True)
    assert f"{NUM_QUERIES} images scored in" in done.stdout


def test_the_readme_example_gives_what_the_readme_shows(
    result: DemoResult,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    blocks = r"^```python\n(.*?)^```\n\n^```\n(.*?)^```"
    (example, shown), *_ = re.findall(blocks, README.read_text(), re.M | re.S)
    monkeypatch.chdir(folder.parent)
    scope: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), scope)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(shown.splitlines()) == 6
    (score, best), (runner_up, _) = (line.split() for line in printed[:2])
    told, told_best = shown.splitlines()[0].split()
    assert best == told_best
    assert abs(float(score) - float(told)) < 0.5, "engines differ by less"
    assert float(runner_up) < float(score) - 5, "a clear first place"
    assert getattr(scope["scores"], "shape", None) == (2,)
