"""The end-to-end step of `make gpu`, over memory that a stand-in calls the GPU's."""

from dataclasses import replace

import numpy as np
import pytest

from edje.bundle import BundleManifest
from edje.perf import gpu_contest as contest
from edje.perf import gpu_rank
from edje.perf.gpu_engines import manifest_of
from edje.perf.gpu_rank import RowHeads, measure_places, query_pairs
from edje.perf.gpu_steps import Report

NUM_IMAGES, MAX_PAIRS = 50, 20
PROFILE = contest.profile_of([gpu_rank.NUM_WORDPIECES], [MAX_PAIRS])


@pytest.fixture
def measure(tiny_bundle, tmp_path, pretended_gpu, monkeypatch):
    """Return what measures an engine over a store of its own, and the pairs ranked."""
    monkeypatch.setattr(gpu_rank, "MAX_PAIRS", MAX_PAIRS)
    for name, value in (("NUM_FEW", 7), ("NUM_WARM", 1), ("NUM_CALLS", 3), ("NUM_ROUNDS", 1)):
        monkeypatch.setattr(gpu_rank, name, value)
    monkeypatch.setattr(gpu_rank, "query_of", lambda length: " ".join("a" * length))
    bundle = BundleManifest.read(tiny_bundle)
    store, tokens = gpu_rank.make_store(tmp_path / "store", bundle, NUM_IMAGES)
    report = Report(tmp_path / "report", 60)

    def measured(engine, pairs):
        measure_places(report, "E", engine, tiny_bundle, store, pairs)
        return report.values

    return measured, query_pairs(tiny_bundle, tokens)


def check_rows(values, differences):
    rows = values["rows"]
    assert [row["via"] for row in rows] == ["bare", "disk", "host", "device"]
    for row in rows:
        assert row["fault"] is None
        assert row["agreement"]["max_abs_diff"] <= differences
        assert row["pairs_per_s"] > 0
        assert row["share_of_bare"] > 0
        assert row["batch"] == 16  # 50 images in three even batches
    assert [row["via"] for row in values["latencies"]] == ["disk", "host", "device"]
    assert all(0 < row["min_ms"] <= row["p50_ms"] for row in values["latencies"])


def test_every_place_ranks_as_float32_does_beside_the_bare_engine(measure, open_float32):
    run, pairs = measure
    assert pairs.text_ids.shape == (1, gpu_rank.NUM_WORDPIECES + 2)
    check_rows(run(open_float32(PROFILE), pairs), 1e-4)


def test_what_is_fed_arrives_bit_by_bit(measure, tiny_bundle):
    run, pairs = measure
    exact = replace(pairs, expected=gpu_rank.row_heads(pairs.tokens), reference="the stored bytes")
    check_rows(run(RowHeads(manifest_of(tiny_bundle, "none", "0", "fp16", PROFILE)), exact), 0)


def test_wrong_bytes_are_a_fault_and_no_speed(measure, tiny_bundle):
    run, pairs = measure
    heads = gpu_rank.row_heads(pairs.tokens)
    heads[3] = np.nextafter(heads[3], np.float32(np.inf))
    wrong = replace(pairs, expected=heads)
    values = run(RowHeads(manifest_of(tiny_bundle, "none", "0", "fp16", PROFILE)), wrong)
    for row in values["rows"]:
        assert "not the stored ones" in row["fault"]
        assert row["pairs_per_s"] is None


def test_records_are_random_never_zero_and_all_different(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_rank, "NUM_DRAWN", 8)
    bundle = BundleManifest.read(tiny_bundle)
    _, tokens = gpu_rank.make_store(tmp_path / "store", bundle, NUM_IMAGES)
    assert len(np.unique(tokens.reshape(NUM_IMAGES, -1), axis=0)) == NUM_IMAGES
    assert np.abs(tokens.astype(np.float32)).mean() > 0.5
