"""Building: what a folder holds, and everything that must leave nothing behind."""

import os
import shutil
from dataclasses import fields

import numpy as np
import pytest

from edje.bundle import BundleManifest
from edje.engines.builder.build import build_engine
from edje.engines.builder.options import EngineOptions
from edje.engines.manifest import EngineManifest, Profile
from edje.engines.registry import open_engine
from edje.errors import CheckpointError, EdjeError, EngineError
from edje.files import sha256_of


def build(bundle, out, **changes):
    """Build for ONNX Runtime; `changes` are arguments, or fields of the options."""
    chosen = {"backend": "onnxruntime", "precision": "fp32"}
    names = {field.name for field in fields(EngineOptions)}
    options = EngineOptions(**{name: changes.pop(name) for name in names & changes.keys()})
    return build_engine(bundle, out, **{**chosen, **changes}, options=options)


def test_a_folder_holds_all_that_production_needs(built_engines, tiny_bundle):
    for backend, folder in built_engines.items():
        manifest = EngineManifest.read(folder)
        assert manifest.backend == backend
        assert manifest.precision == "fp32"
        assert manifest.bundle == BundleManifest.read(tiny_bundle)
        assert manifest.onnx_sha256 == sha256_of(tiny_bundle / "joint_encoder.onnx")
        assert manifest.profile == Profile(256, (15, 23, 31, 47, 63))
        on_disk = {path.name for path in folder.iterdir()}
        assert on_disk == {*manifest.files, "engine.json"}
        assert (folder / "tokenizer.json").read_bytes() == (
            tiny_bundle / "tokenizer.json"
        ).read_bytes()
        assert "image_encoder.onnx" not in on_disk
        assert manifest.build_seconds > 0
        assert manifest.fidelity["data"] == "random wordpieces and random tokens, seed 0"
        assert manifest.fidelity["mean_abs_diff"] <= manifest.fidelity["max_abs_diff"] < 1e-4
        assert manifest.fidelity["top_1"] == 1.0
        assert manifest.fidelity["kendall_tau"] > 0.99


def test_a_small_profile(tiny_bundle, tmp_path, official_pairs, run):
    out = tmp_path / "engine"
    lines = []
    options = {"max_pairs": 5, "text_buckets": [64, 16, 16]}
    manifest = build(tiny_bundle, out, progress=lines.append, **options)
    assert lines == ["building onnxruntime fp32", "measuring fidelity: query 1 of 4"]
    assert manifest.profile == Profile(5, (16, 64))
    engine = open_engine(out)
    assert np.isfinite(run(engine, official_pairs.batch([(0, i) for i in range(5)], 64))).all()
    engine.close()


def test_the_image_encoder_comes_along_when_asked(tiny_bundle, tmp_path):
    manifest = build(tiny_bundle, tmp_path / "engine", image_encoder=True)
    copied = tmp_path / "engine" / "image_encoder.onnx"
    assert copied.read_bytes() == (tiny_bundle / "image_encoder.onnx").read_bytes()
    assert manifest.files["image_encoder.onnx"] == sha256_of(copied)
    open_engine(tmp_path / "engine").close()
    copied.unlink()
    with pytest.raises(EngineError, match=r"file image_encoder\.onnx: cannot be read"):
        open_engine(tmp_path / "engine")


def test_a_bundle_that_lacks_files_or_is_none_and_an_unwritable_place(tiny_bundle, tmp_path):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    for name in ("image_encoder.onnx", "tokenizer.json"):
        (bundle / name).unlink()
    with pytest.raises(EngineError, match="lacks what this engine needs") as caught:
        build(bundle, tmp_path / "engine", image_encoder=True)
    assert caught.value.faults == ("tokenizer.json: missing", "image_encoder.onnx: missing")
    with pytest.raises(CheckpointError, match="not a model bundle"):
        build(tmp_path, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EdjeError, match="cannot write"):
        build(tiny_bundle, tmp_path / "file" / "engine")


def test_an_existing_folder_is_left_as_it_was(tiny_bundle, built_engines, tmp_path):
    out = shutil.copytree(built_engines["onnxruntime"], tmp_path / "engine")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir())
    with pytest.raises(EdjeError, match="exists already"):
        build(tiny_bundle, out)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir()) == before
    assert os.listdir(tmp_path) == ["engine"]


def test_overwrite_replaces_an_engine_and_nothing_else(tiny_bundle, built_engines, tmp_path):
    out = shutil.copytree(built_engines["openvino"], tmp_path / "engine")
    build(tiny_bundle, out, overwrite=True)
    assert EngineManifest.read(out).backend == "onnxruntime"
    assert not (out / "joint_encoder.xml").exists()
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(EdjeError, match=r"holds other files \(no engine.json\)"):
        build(tiny_bundle, home, overwrite=True)
    assert (home / "thesis.txt").read_text() == "years of work"


def test_a_failed_build_leaves_nothing(tiny_bundle, tmp_path, built_engines):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (bundle / "joint_encoder.onnx").write_bytes(b"not a graph")
    out = shutil.copytree(built_engines["onnxruntime"], tmp_path / "engine")
    for backend in ("onnxruntime", "openvino"):
        with pytest.raises(EngineError, match="cannot"):
            build(bundle, out, backend=backend, overwrite=True)
    open_engine(out).close()
    assert sorted(os.listdir(tmp_path)) == ["bundle", "engine"]


def test_all_faults_of_a_profile_come_at_once():
    with pytest.raises(EngineError) as caught:
        EngineOptions(max_pairs=0, text_buckets=[2, 16, 65], token_dtype="int4").profile(61)
    assert caught.value.faults == (
        "max_pairs: got 0, expected 1 or more",
        "text_buckets: got 2, expected 3 (CLS, one wordpiece, SEP) to 64",
        "text_buckets: got 65, expected 3 (CLS, one wordpiece, SEP) to 64",
        "token_dtype: got 'int4', expected float16 or int8",
    )
    with pytest.raises(EngineError, match="got none"):
        EngineOptions(text_buckets=[]).profile(61)
