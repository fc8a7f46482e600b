"""An export needs no installed metadata: a bare clone on the path is enough."""

from __future__ import annotations

import json
from pathlib import Path

from bare_clone import run_bare
from edje import __version__

SCRIPT = """
import importlib.metadata, json, sys
from edje.export.export import export_bundle
try:
    importlib.metadata.version("edje-runtime")
except importlib.metadata.PackageNotFoundError:
    print("not installed")
checkpoint, language_model, vision_model, out = sys.argv[1:]
export_bundle(checkpoint, language_model, out, vision_model=vision_model)
"""


def test_a_clone_that_is_not_installed_exports_and_says_its_version(
    official_tiny: Path, tmp_path: Path
) -> None:
    inputs = [str(official_tiny / name) for name in ("checkpoint_16.pth", "lm", "siglip")]
    out = tmp_path / "bundle"
    ran = run_bare(tmp_path, "-c", SCRIPT, *inputs, str(out))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "not installed\n"
    versions = json.loads((out / "edje.json").read_text())["provenance"]["versions"]
    assert versions["edje-runtime"] == __version__
    assert all(versions[name] for name in ("torch", "transformers", "onnx", "tokenizers"))
