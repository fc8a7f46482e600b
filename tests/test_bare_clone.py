"""Nothing asks for installed metadata: a bare clone on the path works and says its version."""

from __future__ import annotations

import json
from pathlib import Path

from bare_clone import run_bare
from edje import __version__

EXPORT = """
import sys
from edje.export.export import export_bundle
checkpoint, language_model, vision_model, out = sys.argv[1:]
export_bundle(checkpoint, language_model, out, vision_model=vision_model)
"""
SAID = """
import importlib.metadata, json, sys
from edje import TokenStore
from edje.perf.harness import conditions
from edje.runtime.cli.doctor import examine
with TokenStore.create("s", num_tokens=64, hidden=32, fingerprint_encoder="a" * 64) as store:
    said = [store.stat().created_by, conditions()["versions"]["edje-runtime"], examine().edje]
try:
    importlib.metadata.version("edje-runtime")
except importlib.metadata.PackageNotFoundError:
    print(json.dumps(said))
"""


def test_a_clone_that_is_not_installed_exports_and_says_its_version(
    official_tiny: Path, tmp_path: Path
) -> None:
    inputs = [str(official_tiny / name) for name in ("checkpoint_16.pth", "lm", "siglip")]
    out = tmp_path / "bundle"
    ran = run_bare(tmp_path, "-c", EXPORT, *inputs, str(out))
    assert ran.returncode == 0, ran.stderr
    versions = json.loads((out / "edje.json").read_text())["provenance"]["versions"]
    assert versions["edje-runtime"] == __version__
    assert all(versions[name] for name in ("torch", "transformers", "onnx", "tokenizers"))


def test_stores_figures_and_doctor_say_the_version_of_a_clone(tmp_path: Path) -> None:
    ran = run_bare(tmp_path, "-c", SAID)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == [f"edje-runtime {__version__}", __version__, __version__]
