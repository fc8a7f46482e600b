"""`edje verify`: real pairs, limits, foreign bundles, and `engine.json` written whole."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest

from edje.engines import verify
from edje.engines.builder.build import build_engine
from edje.engines.fidelity import Fidelity, not_measured
from edje.engines.manifest import EngineManifest
from edje.engines.verify import check_bundle, verify_engine, write_fidelity
from edje.errors import EngineError
from edje.runtime.cli.app import main


@pytest.fixture(scope="module")
def built(tiny_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "engine"
    build_engine(tiny_bundle, folder, backend="onnxruntime", precision="fp32")
    return folder


@pytest.fixture
def folder(built, tmp_path):
    """A copy to write to."""
    return shutil.copytree(built, tmp_path / "engine")


@pytest.fixture
def queries(tmp_path):
    path = tmp_path / "queries.txt"
    path.write_text("a dog in the snow\timg-3\nthe cat\timg-0\na red circle\n")
    return path


@pytest.fixture
def edje(capfd):
    """Run the command line: `(exit code, stdout, stderr)`."""

    def call(*args):
        capfd.readouterr()
        code = main([str(arg) for arg in args])
        return code, *capfd.readouterr()

    return call


def test_real_pairs_are_measured_shown_and_written(edje, folder, tiny_bundle, tiny_store, queries):
    before = json.loads((folder / "engine.json").read_text())
    common = ("verify", folder, "--bundle", tiny_bundle, "--store", tiny_store)
    code, out, _ = edje(*common, "--queries", queries)
    assert code == 0
    assert "3 queries, 36 pairs" in out
    assert "Kendall tau" in out
    assert "R@1" in out
    assert json.loads((folder / "engine.json").read_text()) == before

    code, out, _ = edje(*common, "--queries", queries, "--max-queries", 2, "--write", "--json")
    assert code == 0
    shown, after = json.loads(out), json.loads((folder / "engine.json").read_text())
    assert shown["num_queries"] == 2
    assert not shown["random"]
    assert {name: shown[name] for name in after["fidelity"]} == after["fidelity"]
    assert list(after) == list(before)
    assert {**after, "fidelity": 0} == {**before, "fidelity": 0}
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    assert EngineManifest.read(folder).fidelity["num_pairs"] == 24


def test_candidates_are_drawn_and_without_a_store_random_pairs_are_marked(
    edje, folder, tiny_bundle, tiny_store, queries
):
    common = ("verify", folder, "--bundle", tiny_bundle)
    drawn = ("--store", tiny_store, "--queries", queries, "--num-candidates", 5)
    assert json.loads(edje(*common, *drawn, "--json")[1])["num_pairs"] == 15
    code, out, _ = edje(*common)
    assert code == 0
    assert "random wordpieces" in out
    assert "made-up data" in out
    assert "R@1" not in out


def test_broken_limits_are_one_sentence_and_exit_code_1(edje, folder, tiny_bundle, monkeypatch):
    exact = verify.measure_fidelity

    def worse(*args):
        return {**exact(*args), "kendall_tau": 0.9, "top_1": 0.95}

    monkeypatch.setattr(verify, "measure_fidelity", worse)
    common = ("verify", folder, "--bundle", tiny_bundle)
    code, out, err = edje(*common, "--min-kendall-tau", 0.97, "--max-top1-change", 0.02)
    assert code == 1
    assert "Kendall tau" in out
    assert "breaks its limits: Kendall tau is 0.9000, the limit is 0.97; the first" in err
    code, out, _ = edje(*common, "--max-top1-change", 0.02, "--json")
    assert code == 1
    assert len(json.loads(out)["broken_limits"]) == 1
    code, _, err = edje(*common, "--min-kendall-tau", 0.9, "--max-top1-change", 0.05)
    assert (code, err.strip()) == (0, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--store", "STORE"), "store was given without queries"),
        (("--queries", "QUERIES"), "queries was given without store"),
        (("--min-kendall-tau", "2"), "expected -1 to 1"),
        (("--store", "STORE", "--queries", "/nonexistent"), "cannot read the queries"),
        (("--store", "STORE", "--queries", "QUERIES", "--num-candidates", "1"), "2 or more"),
    ],
)
def test_bad_input_is_exit_code_2(edje, folder, tiny_bundle, tiny_store, queries, options, message):
    places = {"STORE": tiny_store, "QUERIES": queries}
    words = [places.get(word, word) for word in options]
    code, out, err = edje("verify", folder, "--bundle", tiny_bundle, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_another_bundle_is_refused_and_every_difference_is_named(
    edje, built, tiny_bundle, tmp_path
):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = EngineManifest.read(built)
    check_bundle(manifest, built, bundle)
    values = json.loads((bundle / "edje.json").read_text())
    scorer = values["fingerprint_scorer"]
    values |= {"fingerprint_scorer": "1", "fingerprint_encoder": "2"}
    values["text"]["normalization"] = "none"
    (bundle / "edje.json").write_text(json.dumps(values))
    (bundle / "joint_encoder.onnx").write_bytes(b"another graph")
    (bundle / "tokenizer.json").unlink()
    with pytest.raises(EngineError) as caught:
        check_bundle(manifest, built, bundle)
    assert len(caught.value.faults) == 5
    assert caught.value.faults[-1].endswith("not readable (No such file or directory)")
    assert manifest.bundle_path in str(caught.value)
    code, _, err = edje("verify", built, "--bundle", bundle)
    assert code == 2
    assert f"scorer fingerprint: the engine's is {scorer}, the bundle's is 1" in err
    assert str(built) in err
    assert str(bundle) in err


def test_what_was_emulated_stays_beside_what_was_measured(folder, tiny_bundle):
    measured = verify_engine(folder, tiny_bundle)
    emulated = replace(measured, measured_on="an emulation")
    values = json.loads((folder / "engine.json").read_text())
    values["fidelity"] = not_measured(emulated)
    (folder / "engine.json").write_text(json.dumps(values))
    assert verify_engine(folder, tiny_bundle, write=True) == measured
    found = EngineManifest.read(folder).fidelity
    assert Fidelity.from_json(found) == measured
    assert Fidelity.from_json(found["emulated"]) == emulated


def test_the_rights_stay_and_a_failed_write_or_a_changed_file_leaves_the_old_one(
    folder, tiny_bundle, monkeypatch
):
    path = folder / "engine.json"
    path.chmod(0o640)
    verify_engine(folder, tiny_bundle, write=True)
    assert path.stat().st_mode & 0o777 == 0o640
    before = path.read_bytes()
    fidelity = Fidelity.from_json(EngineManifest.read(folder).fidelity)
    with pytest.raises(EngineError, match="changed while"):
        write_fidelity(folder, fidelity, before + b"\n")
    assert path.read_bytes() == before

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EngineError, match="No space left"):
        verify_engine(folder, tiny_bundle, write=True)
    assert path.read_bytes() == before
    assert [found.name for found in folder.iterdir() if found.name.startswith(".")] == []
