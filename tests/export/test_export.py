"""`export_bundle`: what a bundle holds, other checkpoints, and inputs that cannot be used."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, SiglipProcessor

from edje.bundle import BundleManifest
from edje.errors import CheckpointError, EdjeError
from edje.export import reference
from edje.export.export import export_bundle
from official_checkpoint import CheckpointFolders, Sizes, official_state, write_checkpoint

GRAPHS = {"joint_encoder.onnx", "adapter.onnx", "image_encoder.onnx"}
FILES = GRAPHS | {"edje.json", "tokenizer.json", "parity.json"}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> CheckpointFolders:
    return write_checkpoint(tmp_path_factory.mktemp("small") / "in")


def export(folders: CheckpointFolders, out: Path, **options) -> BundleManifest:
    options = {"vision_model": folders.vision_model, **options}
    return export_bundle(folders.checkpoint, folders.language_model, out, **options)


def refused(folders: CheckpointFolders, out: Path, **options) -> str:
    """Export, expect an error and nothing written; return the message."""
    before = {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")}
    with pytest.raises(EdjeError) as caught:
        export(folders, out, **options)
    assert {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")} == before
    return str(caught.value)


def copy_of(folders: CheckpointFolders, folder: Path) -> CheckpointFolders:
    shutil.copytree(folders.checkpoint.parent, folder)
    parts = (folders.checkpoint, folders.language_model, folders.vision_model)
    return CheckpointFolders(*(folder / part.name for part in parts))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_bundle_holds_what_the_design_lists(tiny_bundle, official_tiny):
    assert {path.name for path in tiny_bundle.iterdir()} == FILES
    manifest = BundleManifest.read(tiny_bundle)
    assert manifest.sizes.num_features == 16
    assert (manifest.text.max_wordpieces, manifest.text.normalization) == (61, "openclip")
    assert (manifest.text.cls_id, manifest.text.sep_id, manifest.text.pad_id) == (2, 3, 0)
    assert manifest.image is not None
    assert (manifest.image.size, manifest.image.resample) == (32, 3)
    assert manifest.provenance["checkpoint"] == "checkpoint_16.pth"
    assert len(manifest.provenance["checkpoint_sha256"]) == 64
    assert {"edje-runtime", "torch", "onnx"} <= manifest.provenance["versions"].keys()


def test_parity_names_every_graph_with_a_small_difference(tiny_bundle):
    report = json.loads((tiny_bundle / "parity.json").read_text())
    assert report.keys() == GRAPHS
    assert report["joint_encoder.onnx"]["max_abs_difference"] < 1e-5
    for graph in ("adapter.onnx", "image_encoder.onnx"):  # float16 rounds by at most 2^-11
        assert report[graph]["max_abs_difference"] < report[graph]["max_abs_output"] / 2000
    shapes = [case["text_ids"] for case in report["joint_encoder.onnx"]["inputs"]]
    assert len({tuple(shape) for shape in shapes}) >= 3


def test_the_tokenizer_gives_the_official_ids(tiny_bundle, official_tiny):
    tokenizer = Tokenizer.from_file(str(tiny_bundle / "tokenizer.json"))
    assert tokenizer.truncation is None
    assert tokenizer.padding is None
    captions = json.loads((official_tiny / "captions.json").read_text())
    for caption, pair in zip(captions["captions"], captions["pair_input_ids"], strict=True):
        ids = tokenizer.encode(caption, add_special_tokens=False).ids[:61]
        assert ids == pair[1 : pair.index(3)]


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(num_tokens=32, num_layers=1, hidden=16, num_heads=1),
        Sizes(num_tokens=256, text_activation="relu", vision_activation="gelu"),
        Sizes(num_tokens=8, max_positions=30, num_heads=12),
    ],
    ids=["one-layer", "256-tokens", "short-positions"],
)
def test_other_sizes_export(tmp_path, sizes):
    manifest = export(write_checkpoint(tmp_path / "in", sizes), tmp_path / "bundle")
    assert manifest.sizes.num_tokens == sizes.num_tokens
    assert manifest.sizes.num_layers == sizes.num_layers
    assert manifest.text.max_wordpieces == min(64, sizes.max_positions - sizes.num_tokens) - 3
    session = onnxruntime.InferenceSession(str(tmp_path / "bundle" / "image_encoder.onnx"))
    pixels = np.zeros((2, 3, sizes.image_size, sizes.image_size), np.float32)
    (tokens,) = session.run(None, {"pixels": pixels})
    assert tokens.shape == (2, sizes.num_tokens, sizes.hidden)
    assert tokens.dtype == np.float16


def test_spelling_and_dtype_do_not_change_the_fingerprints(tmp_path):
    rounded = {k: v.bfloat16().float() for k, v in official_state(Sizes()).items()}
    older = {
        k.replace("vision_encoder.", "vision_encoder.vision_model."): rounded[k] for k in rounded
    }
    one = write_checkpoint(tmp_path / "a", state=rounded)
    two = write_checkpoint(tmp_path / "b", state=older, dtype=torch.bfloat16)
    first, second = export(one, tmp_path / "A"), export(two, tmp_path / "B")
    assert first.fingerprint_encoder == second.fingerprint_encoder
    assert first.fingerprint_scorer == second.fingerprint_scorer
    graphs = [(tmp_path / name / "joint_encoder.onnx").read_bytes() for name in "AB"]
    assert graphs[0] == graphs[1]


def test_without_a_vision_folder_there_is_no_image_encoder(tmp_path):
    folders = write_checkpoint(
        tmp_path / "in", Sizes(feature_dim=768, vision_heads=12, adapter_intermediate=8)
    )
    manifest = export(folders, tmp_path / "bundle", vision_model=None)
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == FILES - {"image_encoder.onnx"}
    assert manifest.image is None
    assert manifest.sizes.num_features is None
    export(folders, tmp_path / "whole")
    graphs = [(tmp_path / name / "adapter.onnx").read_bytes() for name in ("bundle", "whole")]
    assert graphs[0] == graphs[1]  # 12 heads were inferred from the width


@pytest.mark.parametrize("vision_only", [False, True], ids=["whole-model", "vision-model"])
def test_folders_saved_by_transformers_5_give_the_same_bundle(
    official_tiny, tiny_bundle, tmp_path, vision_only
):
    lm, siglip = tmp_path / "lm", tmp_path / "siglip"
    tokenizer = AutoTokenizer.from_pretrained(official_tiny / "lm")
    AutoConfig.from_pretrained(official_tiny / "lm").save_pretrained(lm)
    tokenizer.save_pretrained(lm)
    config = AutoConfig.from_pretrained(official_tiny / "siglip")
    (config.vision_config if vision_only else config).save_pretrained(siglip)
    images = AutoImageProcessor.from_pretrained(official_tiny / "siglip")
    SiglipProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(siglip)
    checkpoint = official_tiny / "checkpoint_16.pth"
    manifest = export_bundle(checkpoint, lm, tmp_path / "bundle", vision_model=siglip)
    original = BundleManifest.read(tiny_bundle)
    assert replace(manifest, provenance={}) == replace(original, provenance={})
    for name in FILES - {"edje.json"}:
        assert (tmp_path / "bundle" / name).read_bytes() == (tiny_bundle / name).read_bytes()


def test_unknown_head_count_asks_for_the_vision_folder(small, tmp_path):
    message = refused(small, tmp_path / "out" / "bundle", vision_model=None)
    assert "--vision-model DIR" in message


def test_a_language_model_that_does_not_fit_lists_every_difference(small, tmp_path):
    folders = copy_of(small, tmp_path / "in")
    config = folders.language_model / "config.json"
    edit_json(config, hidden_size=48, num_hidden_layers=2, num_attention_heads=7, hidden_act="mish")
    tokenizer = json.loads((folders.language_model / "tokenizer.json").read_text())
    del tokenizer["model"]["vocab"]["w84"]
    (folders.language_model / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refused(folders, tmp_path / "bundle")
    for part in (
        "does not fit",
        "hidden_size: the folder says 48, the checkpoint's tensors 24",
        "num_hidden_layers: the folder says 2, the checkpoint's tensors 3",
        "7 heads do not divide the width 24",
        "hidden_act: got 'mish'",
        "the tokenizer has 89 tokens, so 90 embedding rows",
    ):
        assert part in message


def test_a_vision_model_that_does_not_fit_lists_every_difference(small, tmp_path):
    folders = copy_of(small, tmp_path / "in")
    config = folders.vision_model / "config.json"
    vision = json.loads(config.read_text())["vision_config"]
    edit_json(config, vision_config=vision | {"intermediate_size": 44, "image_size": 32})
    message = refused(folders, tmp_path / "bundle")
    assert "intermediate_size: the folder says 44, the checkpoint's tensors 36" in message
    assert "num_features: the folder says 16, the checkpoint's tensors 9" in message
    assert "expected 32 squared" in message


def test_a_damaged_vision_tower_lists_every_tensor(tmp_path):
    state = official_state(Sizes())
    del state["vision_encoder.encoder.layers.1.mlp.fc2.weight"]
    state["vision_encoder.post_layernorm.bias"] = torch.zeros(3)
    message = refused(write_checkpoint(tmp_path / "in", state=state), tmp_path / "bundle")
    assert "layers.1.mlp.fc2.weight: missing, expected [20, 36]" in message
    assert "post_layernorm.bias: got [3], expected [20]" in message


def test_folders_that_cannot_be_read_swapped_and_empty_ones_are_refused(small, tmp_path):
    folders = copy_of(small, tmp_path / "in")
    edit_json(folders.language_model / "config.json", hidden_size="wide")
    assert "config.json cannot be used" in refused(folders, tmp_path / "bundle")
    swapped = replace(small, language_model=small.vision_model)
    assert "tokenizer.json or vocab.txt" in refused(swapped, tmp_path / "bundle")
    message = refused(small, tmp_path / "bundle", vision_model=small.language_model)
    assert "holds a 'bert' model, expected a 'siglip' vision model" in message
    (tmp_path / "empty").mkdir()
    message = refused(small, tmp_path / "bundle", vision_model=tmp_path / "empty")
    assert "config.json" in message


def test_an_existing_bundle_stays_unless_overwrite_is_given(small, tmp_path):
    out = tmp_path / "out" / "bundle"
    first = export(small, out, text_normalization="none")
    assert "exists already" in refused(small, out)
    broken = replace(small, checkpoint=small.language_model / "config.json")
    assert "not a readable PyTorch checkpoint" in refused(broken, out, overwrite=True)
    assert BundleManifest.read(out).text.normalization == "none"
    second = export(small, out, overwrite=True)
    assert BundleManifest.read(out).text.normalization == "openclip"
    assert first.fingerprint_scorer == second.fingerprint_scorer


def test_overwrite_replaces_bundles_only_and_places_must_be_writable(small, tmp_path):
    out = tmp_path / "out" / "photos"
    out.mkdir(parents=True)
    (out / "keep.txt").write_text("precious")
    for overwrite in (False, True):
        message = refused(small, out, overwrite=overwrite)
        assert "holds other files (no edje.json)" in message
        assert "--overwrite" not in message, "it would not help"
    assert "cannot write" in refused(small, out / "keep.txt" / "bundle")


def test_a_graph_that_differs_and_an_unknown_normalization_give_no_bundle(
    small, tmp_path, monkeypatch
):
    message = refused(small, tmp_path / "bundle", text_normalization="upper")
    assert "expected one of openclip, none" in message
    monkeypatch.setattr(reference, "MAX_DIFFERENCE", 1e-12)
    message = refused(small, tmp_path / "bundle")
    assert "joint_encoder.onnx differs from PyTorch" in message


def test_steps_are_reported_and_faults_of_inputs_are_checkpoint_errors(small, tmp_path):
    steps: list[str] = []
    export(small, tmp_path / "bundle", progress=steps.append)
    assert steps[0] == "reading the checkpoint"
    assert len(steps) == len(set(steps)) >= 4
    with pytest.raises(CheckpointError):
        export(replace(small, checkpoint=tmp_path / "none.pth"), tmp_path / "other")
