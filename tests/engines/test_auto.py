"""`build_engine` with `auto`: what it tries, what it keeps, and what it refuses before it works."""

import time

import pytest

from avx2_only import FEATURES
from edje.bundle import BundleManifest
from edje.engines.build_options import BuildOptions
from edje.engines.builder.auto import NOTHING_TO_CALIBRATE, build_fastest
from edje.engines.builder.build import build_engine
from edje.engines.builder.options import EngineOptions, EngineRequest
from edje.engines.builder.trial import why_chosen
from edje.engines.contract import Engine
from edje.engines.fidelity import FidelityLimits
from edje.engines.manifest import EngineManifest, Profile
from edje.engines.registry import REGISTRY, load_backend, open_engine
from edje.engines.samples import RandomSamples
from edje.errors import EdjeError, EngineError
from edje.machine import cpu_features, is_x86


def test_a_profile_of_ones_own_is_timed_and_kept(tiny_bundle, tmp_path):
    out = tmp_path / "engine"
    options = EngineOptions(max_pairs=5, text_buckets=[20, 63], image_encoder=True)
    manifest = build_engine(tiny_bundle, out, options=options)
    assert manifest == EngineManifest.read(out)
    assert manifest.profile == Profile(5, (20, 63))
    trials = {(t["backend"], t["precision"]): t for t in manifest.build_options["auto"]}
    rates = {name: trial["pairs_per_s"] for name, trial in trials.items() if trial["pairs_per_s"]}
    assert set(rates) >= {("openvino", "fp32"), ("onnxruntime", "fp32")}
    assert (manifest.backend, manifest.precision) == max(rates, key=rates.get)
    for (_, precision), trial in trials.items():
        if precision in ("int8", "fp8"):
            assert trial["not_tried"]
    assert (out / "image_encoder.onnx").is_file()
    open_engine(out).close()


def test_the_manifest_says_why_a_precision_was_not_tried(tiny_bundle, tmp_path, monkeypatch):
    reasons = {"bf16": "this CPU has no bf16", "int8": None}
    for name in ("openvino", "onnxruntime"):
        monkeypatch.setattr(load_backend(name), "why_not", reasons.get)
    manifest = build_engine(
        tiny_bundle, tmp_path / "engine", options=EngineOptions(max_pairs=4, text_buckets=[15])
    )
    trials = {(t["backend"], t["precision"]): t for t in manifest.build_options["auto"]}
    assert trials.keys() == {(n, p) for n, entry in REGISTRY.items() for p in entry.precisions}
    assert trials["openvino", "bf16"]["not_tried"] == "this CPU has no bf16"
    assert trials["openvino", "int8"]["not_tried"] == NOTHING_TO_CALIBRATE
    assert trials["openvino", "fp32"]["not_tried"] is None
    skipped = [trial for trial in trials.values() if trial["not_tried"]]
    assert all(t["pairs_per_s"] is t["kendall_tau"] is t["refused"] is None for t in skipped)


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({"max_pairs": 0}, "max_pairs: got 0, expected 1 or more"),
        ({"text_buckets": [2]}, "text_buckets: got 2"),
        ({"token_dtype": "int4"}, "token_dtype: got 'int4'"),
    ],
)
def test_what_no_engine_can_have_is_said_once_and_not_per_backend(
    tiny_bundle, tmp_path, wrong, fault
):
    with pytest.raises(EngineError) as caught:
        build_engine(tiny_bundle, tmp_path / "engine", options=EngineOptions(**wrong))
    assert str(caught.value).count(fault) == 1
    assert "openvino" not in str(caught.value)


def test_int8_tokens_are_timed_as_int8(tiny_bundle, tmp_path):
    options = EngineOptions(token_dtype="int8")
    assert build_engine(tiny_bundle, tmp_path / "engine", options=options).token_dtype == "int8"


class RealSamples(RandomSamples):
    """Random pairs that pass for real ones."""

    random = False


@pytest.mark.skipif(not is_x86(), reason="only x86 CPUs have AVX2")
@pytest.mark.skipif("avx2" not in cpu_features(), reason="this CPU has no AVX2")
@pytest.mark.parametrize("int8_wins", [True, False])
def test_on_a_cpu_with_avx2_only_int8_is_tried_and_chosen_where_it_is_faster(
    tiny_bundle, tmp_path, monkeypatch, int8_wins
):
    """The slower kind waits in every batch: kernels alone would decide otherwise elsewhere."""
    monkeypatch.setenv("EDJE_CPU_FEATURES", FEATURES)
    enqueue = Engine.enqueue

    def slowed(engine, batch, scores, *, stream):
        if (engine.manifest.precision == "int8") != int8_wins:
            time.sleep(0.05)
        enqueue(engine, batch, scores, stream=stream)

    monkeypatch.setattr(Engine, "enqueue", slowed)
    samples = RealSamples(BundleManifest.read(tiny_bundle), num_queries=2, num_candidates=8)
    options = EngineOptions(max_pairs=8, text_buckets=[63], limits=FidelityLimits())
    manifest = build_engine(tiny_bundle, tmp_path / "engine", calibration=samples, options=options)
    tried = manifest.build_options["auto"]
    trials = {(t["backend"], t["precision"]): t for t in tried}
    int8, fp32 = trials["onnxruntime", "int8"], trials["onnxruntime", "fp32"]
    assert int8["refused"] is int8["not_tried"] is None
    assert "sums of int8 overflow" in trials["openvino", "int8"]["not_tried"]
    assert trials["openvino", "bf16"]["not_tried"]
    assert (int8["pairs_per_s"] > fp32["pairs_per_s"]) == int8_wins
    assert (manifest.precision == "int8") == int8_wins
    if int8_wins:
        assert manifest.backend == "onnxruntime"
        assert manifest.precision_plan["weights"].startswith("int8 of 7 bits")
        said = why_chosen("onnxruntime", "int8", tried)
        assert said.startswith("the fastest of 3 that rank as float32 does: ")
        assert said.endswith(("times openvino fp32", "times onnxruntime fp32"))


def test_what_was_built_can_be_kept(tiny_bundle, tmp_path):
    options = EngineOptions(max_pairs=4, text_buckets=[15])
    asked = EngineRequest(tiny_bundle, "auto", "auto", None, options)
    manifest = build_fastest(asked, tmp_path / "engine", trials=tmp_path / "trials")
    for trial in manifest.build_options["auto"]:
        folder = tmp_path / "trials" / f"{trial['backend']}-{trial['precision']}"
        assert folder.exists() == (trial["not_tried"] is None)
    open_engine(tmp_path / "trials" / "onnxruntime-fp32").close()


def test_why_an_engine_was_chosen_is_said():
    def timed(backend, rate, **more):
        return {"backend": backend, "precision": "fp32", "pairs_per_s": rate, **more}

    trials = [timed("a", 100.0), timed("b", 150.0), timed("c", 900.0, is_first=True)]
    said = why_chosen("b", "fp32", trials)
    assert said == "the fastest of 2 that rank as float32 does: 1.50 times a fp32"
    assert why_chosen("a", "fp32", trials) is None, "another was before it for another reason"
    assert why_chosen("a", "fp32", trials[:1]) == "the only one that ranks as float32 does"
    assert why_chosen("a", "fp32", []) is None


def test_an_existing_engine_is_left_and_where_nothing_is_faithful_every_reason_is_told(
    tiny_bundle, built_engines, tmp_path, monkeypatch
):
    told = []
    with pytest.raises(EdjeError, match="exists already"):
        build_engine(tiny_bundle, built_engines["openvino"], progress=told.append)
    assert told == []
    monkeypatch.setattr(FidelityLimits, "broken_by", lambda *_: ["too far off"])
    with pytest.raises(EngineError, match="no backend of this machine") as caught:
        build_engine(tiny_bundle, tmp_path / "engine")
    assert "openvino fp32: too far off" in caught.value.faults
    assert list(tmp_path.iterdir()) == []


def test_what_belongs_to_one_backend_is_refused_all_at_once(tiny_bundle, tmp_path):
    options = EngineOptions(backend_options=BuildOptions(report=True))
    with pytest.raises(EngineError, match="chosen by measuring") as caught:
        build_engine(tiny_bundle, tmp_path / "engine", precision="int8", options=options)
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        "--report",
        "--precision int8",
    ]
    assert list(tmp_path.iterdir()) == []
