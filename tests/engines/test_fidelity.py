"""Fidelity of engines and plain functions: what is measured, refused and written down."""

from __future__ import annotations

import json
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

from edje.bundle import BundleManifest
from edje.engines.fidelity import (
    NOT_MEASURED,
    Fidelity,
    FidelityLimits,
    is_measured,
    measure,
    measure_fidelity,
    not_measured,
    reference_scorer,
)
from edje.engines.manifest import Profile
from edje.engines.samples import RandomSamples, RankingSample
from edje.errors import EngineError
from on_addresses import OnAddresses
from pretended_gpu import GPU_NAME, pretend_gpu

PROFILE = Profile(16, (32, 64))


class RaggedSamples:
    """Queries with 3, 40 and 7 candidates, made when they are read."""

    data = "ragged"
    random = False
    fingerprint = ""
    build_options = MappingProxyType({})

    def __init__(self, bundle, targets=(1, None, 6)):
        self.targets = targets
        self.source = next(iter(RandomSamples(bundle, 1, 50)))

    def __len__(self):
        return 3

    def __iter__(self):
        for size, target in zip((3, 40, 7), self.targets, strict=True):
            tokens = self.source.tokens[:size]
            yield RankingSample(np.array([2, 7, 9, size, 3], np.int32), tokens, target)


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return BundleManifest.read(tiny_bundle)


def measured(tiny_bundle, bundle, score, **arguments):
    samples = arguments.pop("samples", None) or RaggedSamples(bundle)
    return measure(score, tiny_bundle, samples, PROFILE, measured_on="here", **arguments)


def test_a_function_that_scores_as_the_reference_agrees_in_everything(tiny_bundle, bundle):
    steps = []
    fidelity = measured(tiny_bundle, bundle, reference_scorer(tiny_bundle), progress=steps.append)
    assert steps == ["measuring fidelity: query 1 of 3"]
    assert fidelity.max_abs_diff == fidelity.p999_abs_diff == fidelity.max_underrating == 0.0
    assert (fidelity.kendall_tau, fidelity.top_1, fidelity.top_10) == (1.0, 1.0, 1.0)
    assert (fidelity.num_queries, fidelity.num_pairs, fidelity.num_targets) == (3, 50, 2)
    assert fidelity.recall == fidelity.reference_recall
    assert fidelity.recall.keys() == {"R@1", "R@5", "R@10"}
    assert fidelity.recall["R@10"] == 1.0
    assert (fidelity.data, fidelity.random, fidelity.measured_on) == ("ragged", False, "here")
    assert "float32" in fidelity.reference


def test_a_scorer_that_turns_the_order_round_is_seen_in_every_measure(tiny_bundle, bundle):
    exact = reference_scorer(tiny_bundle)
    fidelity = measured(tiny_bundle, bundle, lambda batch: -exact(batch))
    assert fidelity.kendall_tau == pytest.approx(-1.0)
    assert fidelity.top_1 == 0.0
    assert fidelity.recall["R@1"] <= 0.5
    assert fidelity.max_abs_diff > 0


def test_batches_fit_the_profile_and_int8_tokens_carry_scales(tiny_bundle, bundle):
    exact, seen = reference_scorer(tiny_bundle), []

    def score(batch):
        seen.append(batch)
        tokens = batch.visual_tokens * batch.visual_scales[:, :, None]
        return exact(replace(batch, visual_tokens=tokens.astype(np.float16), visual_scales=None))

    fidelity = measured(tiny_bundle, bundle, score, token_dtype="int8")
    assert [len(batch) for batch in seen] == [3, 16, 16, 8, 7]
    assert {batch.visual_tokens.dtype.name for batch in seen} == {"int8"}
    assert 0 < fidelity.max_abs_diff < 0.1


def test_scores_that_are_not_finite_and_nothing_to_measure_on_are_refused(tiny_bundle, bundle):
    def score(batch):
        scores = np.zeros(len(batch), np.float32)
        scores[0] = np.nan
        return scores

    class Nothing(RaggedSamples):
        def __iter__(self):
            return iter(())

    with pytest.raises(EngineError, match="5 of 50 scores of here are not finite"):
        measured(tiny_bundle, bundle, score)
    with pytest.raises(EngineError, match="nothing to measure"):
        measured(tiny_bundle, bundle, score, samples=Nothing(bundle))


def test_a_graph_that_cannot_be_read_is_one_sentence(tmp_path):
    (tmp_path / "joint_encoder.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match="ONNX Runtime cannot load"):
        reference_scorer(tmp_path)


def test_an_engine_is_measured_on_random_pairs_or_on_given_ones(engine, tiny_bundle, bundle):
    plain = measure_fidelity(engine, tiny_bundle)
    assert plain["random"]
    assert plain["recall"] is None
    own = measure_fidelity(engine, tiny_bundle, RaggedSamples(bundle))
    assert (own["data"], own["random"], own["num_pairs"]) == ("ragged", False, 50)
    assert own["max_abs_diff"] < 1e-4
    manifest = engine.manifest
    assert own["measured_on"].startswith(f"{manifest.backend} {manifest.backend_version} fp32 on ")


def test_a_device_engine_is_scored_through_device_memory_and_names_the_gpu(
    monkeypatch, engine, tiny_bundle
):
    machine = pretend_gpu(monkeypatch)
    gpu = {"kind": "cuda", "compute_capabilities": ["8.9", "12.0"]}
    manifest = replace(engine.manifest, backend="tensorrt-rtx", device=gpu)
    found = measure_fidelity(OnAddresses(manifest, reference_scorer(tiny_bundle)), tiny_bundle)
    assert found["max_abs_diff"] == 0.0
    assert machine.named("copy")
    assert found["measured_on"].startswith("tensorrt-rtx ")
    assert found["measured_on"].endswith(f" fp32 on {GPU_NAME}")


def test_a_fidelity_survives_its_json_and_what_was_emulated_is_kept_apart(tiny_bundle, bundle):
    fidelity = measured(tiny_bundle, bundle, reference_scorer(tiny_bundle))
    values = json.loads(json.dumps(fidelity.to_json()))
    assert is_measured(values)
    assert Fidelity.from_json(values) == fidelity
    del values["kendall_tau"], values["top_1"]
    with pytest.raises(EngineError) as caught:
        Fidelity.from_json(values)
    assert caught.value.faults == ("fidelity.kendall_tau: missing", "fidelity.top_1: missing")
    assert not_measured() == {"measured_on": NOT_MEASURED}
    entry = not_measured(fidelity)
    assert not is_measured(entry)
    assert Fidelity.from_json(entry) is None
    assert Fidelity.from_json(entry["emulated"]) == fidelity


def test_limits_hold_or_name_what_breaks_them(tiny_bundle, bundle):
    good = measured(tiny_bundle, bundle, reference_scorer(tiny_bundle))
    limits = FidelityLimits(min_kendall_tau=0.97, max_top1_change=0.01)
    assert limits.broken_by(good) == []
    assert limits.broken_by(replace(good, kendall_tau=0.97, top_1=0.99)) == []
    assert FidelityLimits().broken_by(replace(good, kendall_tau=-1.0, top_1=0.0)) == []
    tau, top1 = limits.broken_by(replace(good, kendall_tau=0.9699, top_1=0.98))
    assert "0.9699" in tau
    assert "2.00%" in top1
    assert limits.broken_by(replace(good, kendall_tau=float("nan")))
    with pytest.raises(EngineError) as caught:
        FidelityLimits(min_kendall_tau=float("nan"), max_top1_change=2)
    assert len(caught.value.faults) == 2
