"""Engines of the first layers, built as users build them."""

from types import MappingProxyType

import numpy as np
import pytest

from capabilities import needs_int8
from edje.bundle import JOINT_ENCODER, BundleManifest
from edje.engines.builder.build import build_engine
from edje.engines.builder.cache import cached_engine
from edje.engines.builder.options import EngineOptions
from edje.engines.contract import OpenOptions
from edje.engines.fidelity import engine_scorer
from edje.engines.manifest import EngineManifest, rebuild_command
from edje.engines.precision.emulate import runner
from edje.engines.precision.graph import Graph
from edje.engines.registry import open_engine
from edje.engines.samples import RandomSamples, SomeSamples, sample_batches
from edje.engines.shallow.depth import make_shallow
from edje.errors import EngineError, RequestError


class RealSamples(RandomSamples):
    """Random pairs that pass for real ones."""

    random = False
    build_options = MappingProxyType({"calibration_store": "s", "calibration_queries": "q.txt"})


@pytest.fixture(scope="module")
def samples(deep_bundle):
    return RealSamples(BundleManifest.read(deep_bundle), 8, 24)


def build(bundle, out, samples, **options):
    backend, precision = options.pop("backend", "onnxruntime"), options.pop("precision", "fp32")
    chosen = EngineOptions(**options)
    return build_engine(
        bundle, out, backend=backend, precision=precision, calibration=samples, options=chosen
    )


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_engine_scores_as_its_graph_and_says_what_it_is(deep_bundle, tmp_path, samples, backend):
    out = tmp_path / "engine"
    manifest = build(deep_bundle, out, samples, backend=backend, layers=2)
    assert (manifest.layers, manifest.is_shallow) == (2, True)
    assert manifest.words == f"{backend} fp32, 2 of 3 layers"
    assert EngineManifest.read(out) == manifest
    facts = manifest.precision_plan["shallow"]
    assert (facts["layers"], facts["of"]) == (2, 3)
    assert set(facts["left_out"]["depths"]) == {"1", "2", "5", "10"}
    assert manifest.fidelity["data"].startswith("each 4th query of: ")
    assert manifest.fidelity["num_queries"] == 2
    assert manifest.fidelity["depths"]["1"]["1"] <= 1
    assert "--layers 2" in rebuild_command(manifest.to_json(), out)
    source = BundleManifest.read(deep_bundle)
    pairs = SomeSamples(samples, 4, others=True)
    path = tmp_path / "graph.onnx"
    make_shallow(deep_bundle / JOINT_ENCODER, path, 2, pairs, source, manifest.profile)
    reference, engine = runner(Graph.read(path)), open_engine(out, OpenOptions())
    for sample in samples:
        for batch in sample_batches(sample, manifest.profile, pad_id=0, sep_id=source.text.sep_id):
            expected = reference(batch)[0]
            np.testing.assert_allclose(engine_scorer(engine)(batch), expected, atol=1e-4)
    engine.close()


def test_the_number_of_layers_can_be_chosen_by_measuring(deep_bundle, tmp_path, samples):
    manifest = build(deep_bundle, tmp_path / "engine", samples, layers="auto")
    facts = manifest.precision_plan["shallow"]
    assert set(facts["tried"]) == {"1", "2"}
    assert manifest.layers == min((1, 2), key=lambda k: facts["tried"][str(k)]["time"])
    assert "--layers auto" in rebuild_command(manifest.to_json(), tmp_path)


@needs_int8
def test_eight_bits_and_few_layers(deep_bundle, tmp_path, samples):
    manifest = build(deep_bundle, tmp_path / "engine", samples, precision="int8", layers=2)
    quantized = manifest.precision_plan["quantized"]
    assert quantized
    assert all(group.startswith(("layers.0.", "layers.1.")) for group in quantized)


@pytest.mark.parametrize("layers", [0, 3, 12])
def test_a_number_of_layers_that_cannot_be(deep_bundle, tmp_path, samples, layers):
    with pytest.raises((EngineError, RequestError), match=r"expected 1 to 2|whole number"):
        build(deep_bundle, tmp_path / "engine", samples, layers=layers)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("made_up", [False, True])
def test_without_real_pairs_there_is_no_head(deep_bundle, tmp_path, made_up):
    samples = RandomSamples(BundleManifest.read(deep_bundle)) if made_up else None
    with pytest.raises(EngineError, match="needs real pairs to fit its head on") as caught:
        build(deep_bundle, tmp_path / "engine", samples, layers=1)
    assert "--calibration-store" in caught.value.hint
    assert not (tmp_path / "engine").exists()


def test_the_cache_builds_it_once_and_finds_it_again(deep_bundle, tmp_path, samples):
    told: list[str] = []
    arguments = {"backend": "onnxruntime", "precision": "fp32", "calibration": samples}
    options = EngineOptions(layers=1, max_pairs=32)
    for _ in range(2):
        entry = cached_engine(
            deep_bundle, tmp_path, **arguments, options=options, progress=told.append
        )
    assert EngineManifest.read(entry).layers == 1
    assert sum(line.startswith("building") for line in told) == 1
    whole = cached_engine(deep_bundle, tmp_path, **arguments)
    assert whole != entry


def test_some_samples_are_every_fourth_and_the_rest(samples):
    taken, others = SomeSamples(samples, 4), SomeSamples(samples, 4, others=True)
    assert (len(taken), len(others)) == (2, 6)
    assert (len(list(taken)), len(list(others))) == (2, 6)
    every = [tuple(sample.text_ids) for sample in samples]
    assert [tuple(sample.text_ids) for sample in taken] == [every[3], every[7]]
    assert len({taken.fingerprint, others.fingerprint, samples.fingerprint}) == 3
