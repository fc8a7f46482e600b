"""The benchmark of int8 tokens on the tiny model: what is compared, judged and said."""

import json

import numpy as np
import pytest

from capabilities import needs_int8
from edje.bundle import BundleManifest
from edje.errors import EdjeError
from edje.perf import bench_int8_tokens as bench
from edje.runtime.store import TokenStore

NUM_IMAGES = 24
IDS = [f"{number}.png" for number in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def demo(tiny_bundle, tmp_path_factory):
    """What the benchmark reads of a finished demo, over random tokens."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "calibration").mkdir()
    (folder / "bundle").symlink_to(tiny_bundle)
    manifest = BundleManifest.read(tiny_bundle)
    shape = (NUM_IMAGES, manifest.sizes.num_tokens, manifest.sizes.hidden)
    tokens = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    for place in (folder, folder / "calibration"):
        with TokenStore.create(
            place / "scenes.store",
            num_tokens=shape[1],
            hidden=shape[2],
            fingerprint_encoder=manifest.fingerprint_encoder,
        ) as store:
            store.append(IDS, tokens)
        lines = [
            {"query": text, "target": "3.png", "candidates": IDS[number:]}
            for number, text in enumerate(("a dog", "two cats", "a red kite", "no", "a bird"))
        ]
        content = "\n".join(map(json.dumps, lines))
        (place / "queries.jsonl").write_text(content, encoding="utf-8")
    return folder


@needs_int8
def test_every_way_to_read_int8_tokens_ranks_the_queries(demo, tmp_path):
    queries = bench.read_queries(demo / "queries.jsonl")
    assert [query.target for query in queries] == [3, 2, 1, 0, None]
    rows = bench.measure_ranking(demo, queries, "onnxruntime", tmp_path, lambda line: None)
    assert list(rows) == list(bench.ROWS)
    assert rows[bench.REFERENCE]["max_abs_diff"] == 0
    dequantised, taken = rows["fp32, int8 tokens dequantised"], rows["fp32, int8 tokens"]
    for row in (dequantised, taken):
        assert 0 < row["max_abs_diff"] < 0.5
        assert row["num_pairs"] == sum(len(query.candidates) for query in queries)
    # The graph multiplies in float32, the gather rounds to float16.
    assert abs(dequantised["mean_abs_diff"] - taken["mean_abs_diff"]) < 0.01
    assert bench.REFERENCE in bench.table(rows)


@pytest.mark.parametrize(
    ("name", "loss", "broken"),
    [
        ("fp32, int8 tokens", 0.2, False),
        ("fp32, int8 tokens", 0.21, True),
        ("fp32, int8 tokens dequantised", 0.3, True),
        ("int8, int8 tokens", 0.3, False),
    ],
)
def test_only_what_the_tokens_lose_is_judged(name, loss, broken):
    assert bench.is_broken(name, {"loss_of_r1_points": loss}) is broken


def test_lost_points_are_counted_against_float16_tokens():
    first, second = np.array([2, 1], np.float32), np.array([1, 2], np.float32)
    found = {bench.REFERENCE: [first, first], "fp32, int8 tokens": [first, second]}
    rows = bench.compare(found, [0, 0])
    assert rows["fp32, int8 tokens"]["loss_of_r1_points"] == 50
    assert rows["fp32, int8 tokens"]["top_1"] == 0.5
    with pytest.raises(EdjeError, match="knows its target"):
        bench.compare(found, [None, None])


def test_gathers_are_checked_and_sized(tmp_path, monkeypatch):
    for name, value in (("NUM_RECORDS", 40), ("GATHERED", 16), ("NUM_TOKENS", 4), ("HIDDEN", 8)):
        monkeypatch.setattr(bench, name, value)
    found = bench.measure_gathers(tmp_path, 2)
    assert [record["name"] for record in found["records"]] == list(found["timings"])
    assert len(found["records"]) == 3
    assert set(found["bytes_an_image"]) == {"float16", "int8"}
