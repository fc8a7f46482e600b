"""The arithmetic of a pair, against figures worked out by hand."""

import pytest

from edje.perf.gpu_run import random_sizes
from edje.perf.roofline import (
    activation_bytes_per_pair,
    flops_per_pair,
    roofs,
    slots_of,
    token_bytes_per_pair,
)

SIZES = random_sizes()


@pytest.mark.parametrize(
    ("slots", "whole", "cls_only"), [(79, 3.470, 3.230), (96, 4.247, 3.953), (128, 5.738, 5.338)]
)
def test_flops_of_a_pair(slots, whole, cls_only):
    assert flops_per_pair(slots, SIZES, cls_only=False) / 1e9 == pytest.approx(whole, abs=6e-4)
    assert flops_per_pair(slots, SIZES) / 1e9 == pytest.approx(cls_only, abs=6e-4)


def test_slots_and_bytes():
    assert [slots_of(words, SIZES) for words in (12, 13, 29, 61)] == [79, 80, 96, 128]
    assert token_bytes_per_pair(SIZES) == 49_152
    # 14 hidden + 2 FFN values of two bytes, for each slot of each of 12 layers.
    assert activation_bytes_per_pair(79, SIZES) == 12 * 79 * (14 * 384 + 2 * 1536) * 2


def test_roofs_come_from_the_ceilings_that_were_measured():
    found = roofs(79, SIZES, {"fp16": 790e12, "h2d": 55e9})
    assert set(found) == {"fp16", "h2d"}
    assert found["fp16"] == pytest.approx(790e12 / 3.230e9, rel=1e-3)
    assert found["h2d"] == pytest.approx(1.119e6, rel=1e-3)
