"""The roof on small products: right results, the best of two libraries, shares."""

from __future__ import annotations

import numpy as np
import pytest

from edje.engines.manifest import EngineManifest
from edje.errors import EdjeError
from edje.perf.gpu_ceilings import flops_per_pair, slots_of
from edje.perf.report import Measured
from edje.perf.roof import Roof, open_roof


def test_every_library_computes_the_product(small_roof):
    with open_roof(1) as stages:
        assert {"memcpy", "fp32 openvino", "fp32 onnxruntime", "int8 openvino"} <= set(stages)
        for stage in stages.values():
            stage.run()
            stage.check()
            assert (stage.group, stage.pairs) == ("roof", 0)


@pytest.mark.parametrize("name", ["fp32 openvino", "fp32 onnxruntime"])
def test_a_wrong_product_is_found(small_roof, name, monkeypatch):
    with open_roof(1) as stages:
        product = stages[name].check.__self__
        product.out[0] *= 1.1
        with pytest.raises(EdjeError, match=r"fp32: 10\.0% off NumPy's"):
            stages[name].check()


def measured(name, rate, group="roof"):
    return Measured(name, group, [1.0], rates={"flops_per_s": rate})


def test_the_best_library_counts_and_others_are_no_roof():
    runs = [measured("int8 openvino", 3e9), measured("int8 onnxruntime", 5e9)]
    assert Roof.of([*runs, measured("rank", 9e9, "stages")]).rates == {"int8": 5e9}


def test_shares_follow_from_flops_and_bytes_a_pair(tiny_engine):
    manifest = EngineManifest.read(tiny_engine)
    sizes = manifest.bundle.sizes
    flops = flops_per_pair(slots_of(5, sizes), sizes)
    record = 2 * sizes.num_tokens * sizes.hidden
    roof = Roof({"fp32": 100.0 * flops, "memcpy": 40.0 * record})

    def share(name, pairs=10):
        one = Measured(name, "stages", [1.0], pairs=pairs)
        return roof.with_share(one, "fp32", 5, manifest).share_of_roof

    assert share("rank") == pytest.approx(0.1)
    assert share("read") == pytest.approx(0.25)
    assert share("tokenise") is None
    assert share("upload") is None
    unknown = roof.with_share(Measured("rank", "stages", [1.0], pairs=1), "bf16", 5, manifest)
    assert unknown.share_of_roof is None
    assert np.isclose(roof.pairs_per_s("fp32", 5, sizes), 100.0)
