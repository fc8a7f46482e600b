"""A native engine computes the bundle's scores: every bucket, size, type and kind of kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edje.bundle import BundleManifest
from edje.engines.agreement import kendall_tau
from edje.engines.contract import Batch
from edje.engines.precision.emulate import scorer
from edje.engines.precision.graph import Graph
from edje.engines.precision.lower import lower_operands
from edje.engines.samples import int8_batch
from native_engine import BUCKETS, native_scorer, random_batch, ranked_batches

# Weights alone, rounded to float16, move scores of random tokens by up to 3.6e-3 here (255 pairs);
# all operands rounded, emulated, by 4.7e-3.
TOLERANCE = {"fp16": 5e-3, "bf16": 5e-2}
ELEMENTS = {"fp16": "float16", "bf16": "bfloat16"}


@pytest.fixture(scope="module")
def exact(tiny_bundle: Path) -> Callable[[Batch], np.ndarray]:
    return scorer(Graph.read(tiny_bundle / "joint_encoder.onnx"))


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> BundleManifest:
    return BundleManifest.read(tiny_bundle)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_scores_are_those_of_float32(
    native_folder: Any,
    interpreted: Any,
    exact: Any,
    bundle: BundleManifest,
    capability: tuple[int, int],
    precision: str,
) -> None:
    folder = native_folder(precision)
    with native_scorer(folder, interpreted, capability=capability, max_pairs=4) as score:
        for seed, bucket in enumerate(BUCKETS):
            batch = random_batch(bundle, bucket, 1 + seed, seed)
            np.testing.assert_allclose(score(batch), exact(batch), atol=TOLERANCE[precision])


@pytest.mark.parametrize("precision", ELEMENTS)
def test_pairs_are_ranked_as_the_rounded_graph_ranks_them(
    native_folder: Any, interpreted: Any, bundle: BundleManifest, tiny_bundle: Path, precision: str
) -> None:
    graph = Graph.read(tiny_bundle / "joint_encoder.onnx")
    rounded, batches = scorer(lower_operands(graph, ELEMENTS[precision])), ranked_batches(bundle, 8)
    with native_scorer(native_folder(precision), interpreted, max_pairs=8) as score:
        found = np.concatenate([score(batch) for batch in batches])
    expected = np.concatenate([rounded(batch) for batch in batches])
    assert kendall_tau(found, expected) >= 0.99  # of 17 a bucket: 0.9994 and 0.9989


def test_official_pairs_are_ranked_as_the_official_code_ranks_them(
    native_folder: Any, interpreted: Any, official_pairs: Any
) -> None:
    pairs = [(0, image) for image in range(8)]
    with native_scorer(native_folder(), interpreted, max_pairs=8) as score:
        found = score(official_pairs.batch(pairs, 63))
    np.testing.assert_allclose(found, official_pairs.expected(pairs), atol=3e-3)
    assert kendall_tau(found, official_pairs.expected(pairs)) == 1


def test_a_pair_has_the_same_bits_in_every_batch(
    native_folder: Any, interpreted: Any, bundle: BundleManifest
) -> None:
    whole = random_batch(bundle, 15, 17, 3)
    with native_scorer(native_folder(), interpreted, max_pairs=16) as score:
        together = score(whole)  # in two parts: more pairs than run at once
        for size in (1, 2, 3, 5):
            assert (
                score(whole.part(slice(2, 2 + size))).tobytes() == together[2 : 2 + size].tobytes()
            )
        turned = replace(
            whole,
            query_of_pair=whole.query_of_pair[::-1].copy(),
            visual_tokens=whole.visual_tokens[::-1].copy(),
        )
        assert score(turned)[::-1].tobytes() == together.tobytes()


def test_int8_tokens_score_as_their_values_do(
    native_folder: Any, interpreted: Any, exact: Any, bundle: BundleManifest
) -> None:
    batch = random_batch(bundle, 23, 3, 1)
    stored = int8_batch(batch)
    wide = stored.visual_tokens.astype(np.float32) * stored.visual_scales[..., None]
    folder = native_folder("fp16", "int8")
    with native_scorer(folder, interpreted, max_pairs=4) as score:
        expected = exact(replace(batch, visual_tokens=wide.astype(np.float16)))
        np.testing.assert_allclose(score(stored), expected, atol=TOLERANCE["fp16"])


def test_tokens_that_are_not_finite_spoil_their_own_score_only(
    native_folder: Any, interpreted: Any, bundle: BundleManifest
) -> None:
    batch = random_batch(bundle, 15, 4, 2)
    spoilt = batch.visual_tokens.copy()
    spoilt[1, 3, 5], spoilt[3] = np.nan, np.inf
    with native_scorer(native_folder(), interpreted, max_pairs=4) as score:
        right = score(batch)
        found = score(replace(batch, visual_tokens=spoilt))
        again = score(batch)
    assert np.isnan(found).tolist() == [False, True, False, True]
    assert found[[0, 2]].tobytes() == right[[0, 2]].tobytes()
    assert again.tobytes() == right.tobytes()  # nothing of it stays in the engine's memory
