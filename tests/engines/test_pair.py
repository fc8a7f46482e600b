"""Which two engines are fastest together: by hand, and as the builder writes them."""

from pathlib import Path

import pytest

from capabilities import needs_int8
from edje.bundle import BundleManifest
from edje.engines.builder.build import build_engine
from edje.engines.builder.options import EngineOptions
from edje.engines.builder.pair import WANTED, best_pair
from edje.engines.builder.trial import Trial
from edje.engines.manifest import EngineManifest
from edje.engines.samples import RandomSamples
from edje.errors import EngineError

PRECISE, ROUNDED = Path("fp32"), Path("bf16")
FIRST, FASTER = Path("int8-first"), Path("fp8-first")


class RealSamples(RandomSamples):
    """Random pairs that pass for real ones."""

    random = False


def trial(rate, **more):
    return Trial("openvino", "fp32", pairs_per_s=rate, **more)


def first(rate, rescored):
    return trial(rate, is_first=True, rescored=rescored)


def test_a_first_engine_pays_by_what_it_saves_less_what_is_scored_again():
    trials = {PRECISE: trial(100.0), FIRST: first(400.0, 0.04), FASTER: first(800.0, 0.5)}
    pair = best_pair(trials)
    assert (pair.engine, pair.first, pair.alone) == (PRECISE, FIRST, 100.0)
    assert pair.pairs_per_s == pytest.approx(1 / (1 / 400 + (0.04 + WANTED) / 100))
    assert pair.to_json(trials)["first"]["rescored"] == 0.04


@pytest.mark.parametrize("only", [first(110.0, 0.2), first(1e9, 1.0), trial(None, is_first=True)])
def test_an_engine_stands_alone_where_no_pair_is_faster(only):
    pair = best_pair({PRECISE: trial(100.0), ROUNDED: trial(130.0), FIRST: only})
    assert (pair.engine, pair.first, pair.pairs_per_s) == (ROUNDED, None, 130.0)
    assert pair.to_json({PRECISE: trial(100.0)})["first"] is None


def test_a_first_engine_is_no_result():
    assert best_pair({FIRST: first(100.0, 0.1), PRECISE: trial(None, refused="no")}) is None


@needs_int8
def test_the_builder_writes_both_or_says_that_one_is_enough(tiny_bundle, tmp_path):
    samples = RealSamples(BundleManifest.read(tiny_bundle), 4, 24)
    out, before = tmp_path / "engine", tmp_path / "first"
    manifest = build_engine(
        tiny_bundle, out, calibration=samples, first_out=before, options=EngineOptions(max_pairs=32)
    )
    told = manifest.build_options["pair"]
    assert told["pairs_per_s"] >= told["alone_pairs_per_s"] > 0
    assert before.exists() == (told["first"] is not None)
    tried = [t for t in manifest.build_options["auto"] if t["is_first"] and not t["not_tried"]]
    assert {t["precision"] for t in tried} == {"int8"}
    if before.exists():
        assert EngineManifest.read(before).build_options["role"] == "first"


def test_only_auto_chooses_two(tiny_bundle, tmp_path):
    with pytest.raises(EngineError, match="chosen by measuring") as caught:
        build_engine(tiny_bundle, tmp_path / "a", backend="openvino", first_out=tmp_path / "b")
    assert "--first-out" in caught.value.faults[0]
