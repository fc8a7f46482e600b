"""`engine.json`: written, read back, and refused with everything that is wrong."""

import json

import pytest

from edje.engines.manifest import EngineManifest, rebuild_command
from edje.errors import EngineError


def edit(folder, change):
    path = folder / "engine.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def test_what_is_written_is_read_back(engine_folder, tmp_path):
    manifest = EngineManifest.read(engine_folder)
    copy = tmp_path / "copy"
    copy.mkdir()
    manifest.write(copy)
    assert EngineManifest.read(copy) == manifest
    assert (copy / "engine.json").read_bytes() == (engine_folder / "engine.json").read_bytes()


def test_every_damaged_field_is_named(engine_folder):
    def damage(values):
        del values["onnx_sha256"]
        values["extra"] = 1
        values["files"] = "none"
        values["precision"] = None
        values["profile"]["max_pairs"] = "many"
        values["profile"]["text_buckets"] = [16, "24"]
        del values["bundle"]["text"]["cls_id"]

    edit(engine_folder, damage)
    with pytest.raises(EngineError, match="is damaged") as caught:
        EngineManifest.read(engine_folder)
    text = str(caught.value)
    for fault in (
        "onnx_sha256: missing",
        "extra: unknown field",
        "files: got 'none', expected an object",
        "precision: got None, expected str",
        "profile.max_pairs: got 'many', expected int",
        "profile.text_buckets[1]: got '24', expected int",
        "bundle.text.cls_id: missing",
    ):
        assert fault in text


@pytest.mark.parametrize("value", [None, [], "x", 3])
def test_a_section_of_another_kind(engine_folder, value):
    edit(engine_folder, lambda values: values.update(profile=value, bundle=value))
    with pytest.raises(EngineError) as caught:
        EngineManifest.read(engine_folder)
    for section in ("profile", "bundle"):
        assert f"{section}: expected an object, got " in str(caught.value)


def test_a_file_that_is_no_json_object_and_another_format_version(engine_folder):
    edit(engine_folder, lambda values: values.update(format_version=4, new_field=1))
    with pytest.raises(EngineError) as caught:
        EngineManifest.read(engine_folder)
    assert "format version is 4, this edje reads 3" in str(caught.value)
    assert f"--out {engine_folder} --overwrite" in str(caught.value)
    for content in (b"{", b"[1]", b"null", b"\xff\xfe", b""):
        (engine_folder / "engine.json").write_bytes(content)
        with pytest.raises(EngineError, match=r"engine\.json (is not JSON|holds)"):
            EngineManifest.read(engine_folder)


def test_folders_that_are_no_engines(tmp_path, tiny_bundle):
    with pytest.raises(EngineError, match="it does not exist"):
        EngineManifest.read(tmp_path / "nowhere")
    with pytest.raises(EngineError, match=r"it holds no engine\.json"):
        EngineManifest.read(tmp_path)
    with pytest.raises(EngineError, match=r"it is a model bundle") as caught:
        EngineManifest.read(tiny_bundle)
    assert f"edje build {tiny_bundle}" in str(caught.value)


def test_the_rebuild_command_repeats_the_build(tmp_path):
    values = {
        "bundle_path": "/models/my bundle",
        "backend": "openvino",
        "precision": "bf16",
        "profile": {"max_pairs": 64, "text_buckets": [16, 64]},
        "build_options": {"image_encoder": True},
    }
    assert rebuild_command(values, tmp_path / "engine") == (
        "edje build '/models/my bundle' --backend openvino --precision bf16 --max-pairs 64 "
        f"--text-buckets 16,64 --image-encoder --out {tmp_path / 'engine'} --overwrite"
    )


def test_the_rebuild_command_leaves_defaults_out(engine_folder):
    manifest = EngineManifest.read(engine_folder)
    command = rebuild_command(manifest.to_json(), engine_folder)
    assert command == (
        f"edje build {manifest.bundle_path} --backend {manifest.backend} --precision fp32 "
        f"--out {engine_folder} --overwrite"
    )
