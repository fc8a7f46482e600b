"""A stale or foreign engine is refused, with what differs and the command that mends it."""

import json
from dataclasses import replace

import numpy as np
import pytest

from edje.engines import registry as opening
from edje.engines.contract import OpenOptions
from edje.engines.cpu import device_faults
from edje.engines.manifest import EngineManifest
from edje.engines.registry import open_engine
from edje.errors import EngineError
from toy_engine import toy_manifest


def rewrite(folder, **changes):
    manifest = EngineManifest.read(folder)
    replace(manifest, **changes).write(folder)
    return manifest


def refused(folder):
    with pytest.raises(EngineError) as caught:
        open_engine(folder)
    return caught.value


def test_another_backend_version(engine_folder):
    manifest = rewrite(engine_folder, backend_version="0.0.1")
    error = refused(engine_folder)
    assert error.faults == (
        f"backend version: built with {manifest.backend} 0.0.1, "
        f"{manifest.backend_version} is installed",
    )
    assert f"edje build {manifest.bundle_path} --backend {manifest.backend}" in error.hint
    assert error.hint.endswith(f"--out {engine_folder} --overwrite")


def test_another_device(engine_folder):
    manifest = EngineManifest.read(engine_folder)
    device = {**manifest.device, "architecture": "s390x", "features": ["avx2048"]}
    rewrite(engine_folder, device=device)
    error = refused(engine_folder)
    assert len(error.faults) == 2
    assert error.faults[0].startswith("device architecture: built for 's390x'")
    assert error.faults[1].startswith("device features: built with avx2048")


def test_a_changed_file_and_a_missing_one(engine_folder):
    manifest = EngineManifest.read(engine_folder)
    changed = next(name for name in manifest.files if name.startswith("joint_encoder"))
    with (engine_folder / changed).open("ab") as file:
        file.write(b"\0")
    (engine_folder / "tokenizer.json").unlink()
    error = refused(engine_folder)
    assert len(error.faults) == 2
    assert any(f"file hash: {changed} is " in fault for fault in error.faults)
    assert any("file tokenizer.json: cannot be read" in fault for fault in error.faults)


def test_everything_that_differs_comes_at_once(engine_folder):
    device = {"kind": "cuda", "architecture": "x86_64", "features": ["sm_90"]}
    rewrite(engine_folder, backend_version="0", device=device)
    (engine_folder / "tokenizer.json").write_text("{}")
    kinds = [fault.split(":")[0] for fault in refused(engine_folder).faults]
    assert kinds[0] == "backend version"
    assert "device kind" in kinds
    assert "device features" in kinds
    assert "file hash" in kinds


def test_an_engine_of_an_unknown_backend(engine_folder):
    rewrite(engine_folder, backend="tensorflow")
    error = refused(engine_folder)
    assert "unknown backend 'tensorflow'" in str(error)
    assert "this machine can run" in error.hint


def test_a_precision_that_this_cpu_lacks(engine_folder, monkeypatch):
    rewrite(engine_folder, precision="bf16")
    backend = opening.load_backend(EngineManifest.read(engine_folder).backend)
    monkeypatch.setattr(backend, "why_not", lambda precision: f"no {precision} units")
    assert "cannot run here" in str(refused(engine_folder))
    assert "no bf16 units" in str(refused(engine_folder))


def test_a_number_of_threads_is_heeded_and_a_senseless_one_refused(
    engine_folder, official_pairs, run
):
    for num_threads in (0, -1):
        with pytest.raises(EngineError, match="num_threads"):
            open_engine(engine_folder, OpenOptions(num_threads=num_threads))
    engine = open_engine(engine_folder, OpenOptions(num_threads=1))
    pairs = [(0, image) for image in range(12)]
    scores = run(engine, official_pairs.batch(pairs, 15))
    engine.close()
    np.testing.assert_allclose(scores, official_pairs.expected(pairs), rtol=0, atol=1e-4)


def test_unknown_backend_settings_are_refused(built_engines):
    options = OpenOptions(backend_settings={"NO_SUCH_SETTING": "1"})
    with pytest.raises(EngineError, match="cannot open"):  # ONNX Runtime keeps them for plugins
        open_engine(built_engines["openvino"], options)


@pytest.mark.parametrize(
    ("built_for", "num_faults"),
    [
        ({"kind": "cpu", "architecture": "x86_64", "features": ["avx2"]}, 0),
        ({"kind": "cpu", "architecture": "x86_64", "features": []}, 0),
        ({"kind": "cpu", "architecture": "x86_64", "features": ["avx2", "amx_bf16"]}, 1),
        ({"kind": "cpu", "architecture": "aarch64", "features": ["asimd"]}, 2),
        ({}, 2),
    ],
)
def test_device_faults(built_for, num_faults, monkeypatch):
    monkeypatch.setattr("edje.machine.cpu_features", lambda: ("avx2", "avx512f"))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    manifest = replace(toy_manifest(), device=built_for, precision="bf16")
    assert len(device_faults(manifest)) == num_faults


def test_the_folder_may_be_moved(engine_folder, tmp_path, official_pairs, run):
    moved = engine_folder.rename(tmp_path / "elsewhere")
    values = json.loads((moved / "engine.json").read_text())
    values["bundle_path"] = "/gone"
    (moved / "engine.json").write_text(json.dumps(values))
    engine = open_engine(str(moved))
    assert run(engine, official_pairs.batch([(0, 0)], 15)).shape == (1,)
    engine.close()
