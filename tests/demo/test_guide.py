"""`edje demo`, small: the whole way on real weights, and the README's example over its result."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from edje.demo.evaluation import DemoResult
from edje.demo.guide import run_demo
from edje.engines.build import build_engine
from edje.engines.fidelity import FidelityLimits
from edje.engines.manifest import EngineManifest
from edje.errors import EdjeError
from edje.runtime.samples import StoreSamples

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


def test_every_candidate_comes_back(result: DemoResult) -> None:
    assert len(result.queries) == NUM_QUERIES
    for query in result.queries:
        assert sorted(query.before) == sorted(query.after)
        assert len(query.after) == result.num_candidates == 50


def test_the_folder_holds_what_the_guide_promises(result: DemoResult, folder: Path) -> None:
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
            text_buckets=[15],
            calibration=samples,
            limits=FidelityLimits(),
        )
    assert manifest.fidelity["measured_on"] == "not measured on a device"
    assert manifest.fidelity["emulated"]["kendall_tau"] > 0.9
    assert manifest.fidelity["emulated"]["recall"]["R@1"] == 1.0


def test_the_demo_spares_folders_it_did_not_write(
    result: DemoResult, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(EdjeError, match="no demo wrote"):
        run_demo(tmp_path, num_queries=8)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_readme_example_runs(
    result: DemoResult,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example, *_ = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)
    monkeypatch.chdir(folder.parent)
    scope: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert len(capsys.readouterr().out.splitlines()) == 5
    scores = scope["scores"]
    assert getattr(scores, "shape", None) == (2,)
