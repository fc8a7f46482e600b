"""The cascade's benchmark on the tiny model: what is compared, counted and said."""

import json
from types import SimpleNamespace

import pytest

from edje.engines.builder.build import build_engine
from edje.engines.manifest import MANIFEST, EngineManifest
from edje.perf import bench_cascade as bench
from edje.perf.harness import Times
from edje.perf.random_model import image_id, random_tokens, write_store

NUM_IMAGES = 60
IDS = [image_id(number) for number in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def engines(tiny_bundle, tmp_path_factory):
    """Two float32 engines; the one that plays the fast one claims real pairs."""
    root = tmp_path_factory.mktemp("cascade")
    build_engine(tiny_bundle, root / "precise", backend="onnxruntime", precision="fp32")
    build_engine(tiny_bundle, root / "fast", backend="openvino", precision="fp32")
    manifest = json.loads((root / "fast" / MANIFEST).read_text())
    manifest["fidelity"] |= {"random": False, "max_underrating": 1e-3}
    (root / "fast" / MANIFEST).write_text(json.dumps(manifest))
    return root


def test_the_cascade_is_compared_with_both_engines_on_every_query(engines, tmp_path):
    bundle = EngineManifest.read(engines / "fast").bundle
    tokens, store = random_tokens(NUM_IMAGES, bundle.sizes), tmp_path / "store"
    write_store(store, tokens, encoder=bundle.fingerprint_encoder).close()
    queries = [bench.Query("a dog", IDS), bench.Query("two cats above a red circle", IDS[5:])]
    result = bench.measure(queries, store, engines / "precise", engines / "fast", print)
    assert result["num_queries"] == 2
    assert (result["share_equal"], result["faults"]) == (1.0, [])
    assert result["max_score_diff"] < 1e-5
    assert set(result["pairs_per_s"]) == {bench.PRECISE, bench.FAST, bench.CASCADE}
    assert bench.TOP_K / NUM_IMAGES <= result["mean_share_rescored"] < 1
    assert result["conditions"]["engines"][bench.PRECISE].startswith("onnxruntime")
    assert json.loads(json.dumps(result))["conditions"]["candidates"] == NUM_IMAGES
    text = bench.summary(result)
    assert "on 100.00% of 2 queries" in text
    assert f"{result['speedup']:.2f} times" in text


def test_another_top_k_is_counted_and_fails_the_benchmark():
    """One of two queries: the cascade's second place is not the precise engine's."""

    def top(*ids):
        hits = [SimpleNamespace(id=name, score=1.0) for name in ids]
        return Top(hits)

    tops = {name: [top("a", "b"), top("a", "b")] for name in (bench.PRECISE, bench.FAST)}
    tops[bench.CASCADE] = [top("a", "b"), top("a", "c")]
    times = {name: Times([2.0, 2.0], [1.0, 1.0]) for name in tops}
    found = bench.compare(tops, times, [10, 10])
    assert (found["share_equal"], found["fast_share_equal"]) == (0.5, 1.0)
    assert (found["speedup"], found["mean_share_rescored"]) == (1.0, 0.2)
    assert found["faults"] == ["a top 10 differs from the precise engine's"]


class Top(list):
    """A ranking that a cascade gave after rescoring two of its candidates."""

    rescoring = SimpleNamespace(num_rescored=2, num_widened=0)


def test_a_folder_that_no_demo_wrote_ends_in_one_sentence(tmp_path, capsys):
    assert bench.main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
