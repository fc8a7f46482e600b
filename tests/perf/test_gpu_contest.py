"""What is raced, and how scores are checked: on the CPU, with the tiny bundle."""

from dataclasses import replace

import numpy as np
import pytest

from edje.bundle import BundleManifest
from edje.perf import gpu_contest as contest
from edje.perf.gpu_steps import Report


@pytest.fixture(scope="module")
def pairs(tiny_bundle):
    score = contest.torch_scorer(tiny_bundle, "cpu", part=5)
    made = contest.make_pairs(tiny_bundle, [3, 13], num_pairs=24)
    return [replace(p, expected=score(p.batch(0, 24))) for p in made]


def test_pairs_are_seeded_random_and_never_zero(tiny_bundle, pairs):
    again = contest.make_pairs(tiny_bundle, [3, 13], num_pairs=24)
    for first, second, length in zip(pairs, again, (3, 13), strict=True):
        assert np.array_equal(first.tokens, second.tokens)
        assert first.text_ids.shape == (1, length + 2)
        assert np.abs(first.tokens.astype(np.float32)).mean() > 0.5
        np.testing.assert_allclose(second.expected, first.expected, atol=1e-4)
        assert second.reference.startswith("ONNX Runtime fp32")


def test_batches_go_around(pairs):
    tokens = pairs[0].tokens
    assert np.shares_memory(pairs[0].batch(8, 8).visual_tokens, tokens)
    assert np.array_equal(pairs[0].batch(24 + 16, 8).visual_tokens, tokens[16:])
    around = pairs[0].batch(20, 8).visual_tokens
    assert np.array_equal(around, np.concatenate([tokens[20:], tokens[:4]]))


def test_wrong_scores_have_a_fault_and_no_speed(pairs):
    rows = np.arange(24)
    right = pairs[0].expected
    wrong = {"right": right, "reversed": -right, "nan": np.full(24, np.nan, np.float32)}
    runs = {name: (lambda scores=scores: scores) for name, scores in wrong.items()}
    made = {row["via"]: row for row in contest.compare(runs, rows, pairs[0])}
    assert made["right"]["fault"] is None
    assert made["right"]["pairs_per_s"] > 0
    for name in ("reversed", "nan"):
        assert "disagree with float32" in made[name]["fault"]
        assert made[name]["pairs_per_s"] is None


def test_scores_without_a_known_reference_are_not_compared(pairs):
    few = replace(pairs[0], expected=pairs[0].expected[:4])
    scores = np.concatenate([pairs[0].expected[:4], np.zeros(20, np.float32)])
    found = contest.agreement(few, np.arange(24), scores)
    assert (found["num_pairs"], found["max_abs_diff"]) == (4, 0.0)


def test_a_point_that_fails_is_a_row_and_the_rest_goes_on(tiny_bundle, pairs, tmp_path):
    def measure(asked, size):
        if size == 8:
            raise MemoryError("no 8")
        return [{"via": "bare", "pairs_per_s": 1.0, "fault": None}]

    report = Report(tmp_path / "report", 60)
    sizes = BundleManifest.read(tiny_bundle).sizes
    contest.measure_points(report, {"engine": "e"}, sizes, pairs, (8, 4), measure)
    found = [(row["batch"], row["wordpieces"], row["fault"]) for row in report.values["rows"]]
    fault = "MemoryError: no 8"
    assert found == [(8, 3, fault), (8, 13, fault), (4, 3, None), (4, 13, None)]
    late = Report(tmp_path / "late", -1)
    contest.measure_points(late, {}, sizes, pairs, (8,), lambda *_: pytest.fail("started"))
    assert [point["wordpieces"] for point in late.values["left_out"]] == [3, 13]


def test_a_point_is_measured_bare_piped_and_resident(
    open_float32, pairs, pretended_gpu, monkeypatch
):
    monkeypatch.setattr(contest, "NUM_PAIRS", 24)
    profile = contest.profile_of([3, 13], [8, 4])
    assert (profile.max_pairs, profile.text_buckets) == (8, (5, 15))
    engine = open_float32(profile)
    for size in (8, 4):
        bare, *piped = contest.measure_point(engine, pairs[1], size)
        assert [row["via"] for row in (bare, *piped)] == ["bare", "pipeline", "resident"]
        for row in piped:
            assert list(row["stages_ms"]) == ["gather_ms", "upload_ms", "compute_ms", "download_ms"]
            assert row["pairs_per_s"] > 0
            assert row["share_of_bare"] == pytest.approx(
                row["pairs_per_s"] / bare["pairs_per_s"], abs=1e-3
            )
        for row in (bare, *piped):
            assert row["fault"] is None
            assert row["agreement"]["max_abs_diff"] < 1e-4
            assert row["agreement"]["num_pairs"] == max(4, 24 // size) * size
    assert engine.manifest.profile == profile
    assert pretended_gpu.alive["device"] == 0
    assert pretended_gpu.alive["pinned"] == 1, "all that stays is what uploads were staged in"


@pytest.mark.gpu
def test_the_compiled_engine_on_a_gpu_scores_as_float32_does(tiny_bundle):
    pytest.importorskip("torch").cuda.init()
    from edje.perf.gpu_engines import TorchEngine

    made = contest.make_pairs(tiny_bundle, [3], num_pairs=24)
    engine = TorchEngine(tiny_bundle, contest.profile_of([3], [8]))
    rows = contest.measure_point(engine, made[0], 8)
    engine.close()
    assert [row["via"] for row in rows] == ["bare", "pipeline", "resident"]
    for row in rows:
        assert row["fault"] is None
        assert row["agreement"]["max_abs_diff"] < 0.05
