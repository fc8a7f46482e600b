"""`edje export` at the command line: what it shows, and what it says of inputs it cannot find."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from edje.runtime.cli.app import main
from official_checkpoint import Sizes, write_checkpoint

GRAPHS = ("joint_encoder.onnx", "adapter.onnx", "image_encoder.onnx")


@pytest.fixture
def arguments(official_tiny: Path, tmp_path: Path) -> list[str]:
    options = {"--language-model": "lm", "--vision-model": "siglip"}
    named = [word for option, name in options.items() for word in (option, official_tiny / name)]
    words = ["export", official_tiny / "checkpoint_16.pth", *named, "--out", tmp_path / "bundle"]
    return list(map(str, words))


def test_export_shows_normalization_sizes_and_parity(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for part in (
        "openclip normalization, at most 61 wordpieces",
        "32 x 32 pixels, 16 features",
        "64 x 32: 4,096 bytes an image",
        "2 layers, 4 heads, width 32, intermediate 64, vocabulary 143",
    ):
        assert part in shown
    parity = json.loads((tmp_path / "bundle" / "parity.json").read_text())
    for graph in GRAPHS:
        (row,) = (line.split() for line in shown.splitlines() if graph in line)
        found = parity[graph]
        assert row[1:3] == [f"{found['max_abs_difference']:.1e}", f"{found['limit']:.1e}"]
    assert "dropped" not in shown


def test_export_without_a_vision_model_says_what_the_bundle_cannot_do(tmp_path, capsys):
    sizes = Sizes(feature_dim=768, vision_heads=12, adapter_intermediate=8)
    folders = write_checkpoint(tmp_path / "in", sizes)
    inputs = (folders.checkpoint, "--language-model", folders.language_model)
    assert main(["export", *map(str, (*inputs, "--out", tmp_path / "scorer"))]) == 0
    assert "scores but does not index (no --vision-model" in capsys.readouterr().out


def test_export_in_json_holds_manifest_and_parity(arguments, tmp_path, capsys):
    assert main([*arguments, "--json", "--text-normalization", "none"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["text"]["normalization"] == "none"
    assert written["parity"].keys() == set(GRAPHS)
    for graph in written["parity"].values():
        assert 0 <= graph["max_abs_difference"] <= graph["limit"]
    assert written.pop("bundle") == str(tmp_path / "bundle")
    assert written.pop("parity") == json.loads((tmp_path / "bundle" / "parity.json").read_text())
    assert written == json.loads((tmp_path / "bundle" / "edje.json").read_text())


def test_export_says_what_it_dropped_from_wrapped_keys(arguments, tmp_path, capsys):
    content = torch.load(arguments[1], weights_only=True)
    model = {f"module.{key}": value for key, value in content["model"].items()}
    torch.save({**content, "model": model}, tmp_path / "wrapped.pth")
    arguments[1] = str(tmp_path / "wrapped.pth")
    assert main(arguments) == 0
    assert f"module. dropped from {len(model)} keys" in capsys.readouterr().out
    provenance = json.loads((tmp_path / "bundle" / "edje.json").read_text())["provenance"]
    assert provenance["dropped_from_keys"] == {"module.": len(model)}


def test_export_names_every_input_that_is_nowhere(tmp_path, capsys):
    names = ("acme/none:checkpoint.pth", "acme/minilm@v2", "/nonexistent")
    options = ("--language-model", names[1], "--vision-model", names[2])
    code = main(["export", names[0], *options, "--out", str(tmp_path / "bundle")])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    for name in names:
        assert sum(f"- {name} " in line for line in captured.err.splitlines()) == 1
    assert not (tmp_path / "bundle").exists()
