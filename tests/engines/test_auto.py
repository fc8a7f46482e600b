"""`build_engine` with `auto`: what it tries, what it keeps, and what it refuses before it works."""

import pytest

from edje.engines.build_options import BuildOptions
from edje.engines.builder.auto import NOTHING_TO_CALIBRATE
from edje.engines.builder.build import build_engine
from edje.engines.builder.options import EngineOptions
from edje.engines.fidelity import FidelityLimits
from edje.engines.manifest import EngineManifest, Profile
from edje.engines.registry import REGISTRY, load_backend, open_engine
from edje.errors import EdjeError, EngineError


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
