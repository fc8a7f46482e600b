"""Full-size weights (12 layers, 384) with planted outlier channels, as trained encoders have."""

from __future__ import annotations

import numpy as np
import pytest

from edje.bundle import JOINT_ENCODER, BundleManifest
from edje.engines.fidelity import FidelityLimits
from edje.engines.manifest import Profile
from edje.engines.precision.graph import Graph
from edje.engines.precision.search import choose
from edje.engines.samples import RandomSamples, sample_batches

NUM_CHANNELS = 4
MIN_TAU = 0.95


def with_outliers(graph: Graph) -> Graph:
    """Make 4 channels of every layer's norms and 4 outputs of every FFN2 20 to 60 times larger."""
    random = np.random.default_rng(0)
    planted = graph.replaced(graph.nodes)
    for name in graph.weights:
        if not name.startswith("layers.") or not name.endswith(("norm.weight", "ffn2.weight")):
            continue
        weight = graph.array(name).copy()
        chosen = random.choice(weight.shape[-1], NUM_CHANNELS, replace=False)
        weight[..., chosen] *= random.uniform(20, 60, NUM_CHANNELS)
        planted.set_weight(name, weight)
    return planted


@pytest.mark.slow
def test_the_search_holds_its_limit_with_outliers_and_says_what_it_kept(full_size_bundle):
    bundle = BundleManifest.read(full_size_bundle)
    planted = with_outliers(Graph.read(full_size_bundle / JOINT_ENCODER))
    profile = Profile(64, (15, 63))
    queries = [
        list(sample_batches(sample, profile, pad_id=0, sep_id=bundle.text.sep_id))
        for sample in RandomSamples(bundle, 1, 24)
    ]
    told: list[str] = []
    limits = FidelityLimits(min_kendall_tau=MIN_TAU)
    choice = choose(planted, queries, "int8", "float32", limits, told.append)
    assert choice.agreement.kendall_tau >= MIN_TAU
    assert 0 < len(choice.kept) < 48
    assert set(choice.facts["kept"]) == set(choice.kept)
    assert len(choice.facts["smoothed"]) >= 20
    taus = [found["kendall_tau"] for found in choice.facts["tried"] if "kept" not in found]
    assert max(taus) < MIN_TAU  # the search was needed
    assert any("layer groups in float32" in line for line in told)
