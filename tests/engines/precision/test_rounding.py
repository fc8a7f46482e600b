"""Weights rounded by calibration: what their products give on rows that calibration never saw."""

import numpy as np
import pytest

from edje.engines.precision.calibrate import Activations, observe, smooth
from edje.engines.precision.dynamic import quantize_dynamic
from edje.engines.precision.emulate import runner
from edje.engines.precision.lower import numpy_type
from edje.engines.precision.rounding import Rounding, round_by
from edje.engines.precision.static import find_linears, quantize, round_to

from .conftest import with_outliers

NUM_IN, NUM_OUT = 96, 40


@pytest.fixture(scope="module")
def layer():
    """Rows whose channels go together, some of them large: 2,000 to calibrate, 500 to judge by."""
    random = np.random.default_rng(0)
    mixed = random.standard_normal((2500, 24)) @ random.standard_normal((24, NUM_IN))
    rows = (mixed + 0.3 * random.standard_normal(mixed.shape) + 1).astype(np.float32)
    rows[:, [5, 17]] *= 25
    weight = random.standard_normal((NUM_IN, NUM_OUT), np.float32)
    return rows[:2000], rows[2000:], weight


def errors(layer, precision, largest):
    """Return the squared error of held-out products: rounded by calibration, and to the nearest."""
    calibration, held_out, weight = layer
    kind = numpy_type(precision)
    scales = np.abs(weight).max(axis=0, keepdims=True) / np.float32(largest)
    moments = calibration.T @ calibration
    found = round_by(moments, weight, scales, kind, largest)
    assert (found.shape, found.dtype) == (weight.shape, kind)
    assert np.abs(found.astype(np.float32)).max() <= largest
    nearest = round_to(weight / scales, kind, largest)
    return [
        float((held_out @ (steps.astype(np.float32) * scales - weight)).var())
        for steps in (found, nearest)
    ]


@pytest.mark.parametrize(
    ("precision", "largest"), [("int8", 127.0), ("int8", 63.0), ("fp8", 448.0)]
)
def test_products_of_unseen_rows_err_less_than_a_quarter_as_much(layer, precision, largest):
    by_calibration, nearest = errors(layer, precision, largest)
    assert 0 < by_calibration < 0.25 * nearest


def test_inputs_that_never_speak_and_all_of_them_silent_are_rounded_to_the_nearest(layer):
    calibration, _, weight = layer
    scales = np.full((1, NUM_OUT), 0.02, np.float32)
    nearest = round_to(weight / scales, np.dtype(np.int8), 127.0)
    silent = np.zeros((NUM_IN, NUM_IN), np.float32)
    np.testing.assert_array_equal(
        round_by(silent, weight, scales, np.dtype(np.int8), 127.0), nearest
    )
    some = calibration * (np.arange(NUM_IN) % 2)
    found = round_by(some.T @ some, weight, scales, np.dtype(np.int8), 127.0)
    np.testing.assert_array_equal(found[::2], nearest[::2])
    assert (found[1::2] != nearest[1::2]).any()


def made(graph, form, rounding):
    """Return the graph in int8, in one of its forms."""
    if form == "static":
        amax = {linear.value: 8.0 for linear in find_linears(graph)}
        return quantize(graph, "int8", amax, rounding=rounding)
    return quantize_dynamic(graph, "int8", block=16, rounding=rounding)


@pytest.mark.parametrize("form", ["static", "dynamic"])
@pytest.mark.parametrize("smoothed", [False, True])
def test_every_product_of_a_graph_errs_less_on_pairs_that_were_not_seen(
    graph, queries, form, smoothed
):
    planted = with_outliers(graph, 8.0)
    seen = observe(planted, [batch for query in queries[:3] for batch in query])
    source = smooth(planted, seen, 2.0) if smoothed else planted
    linears = find_linears(source)
    read = runner(source, [linear.value for linear in linears])(queries[3][0])
    rounded, nearest = (made(source, form, each) for each in (Rounding(seen), None))
    better = 0
    for linear, values in zip(linears, read, strict=True):
        weight = source.array(linear.weight)
        rows = values.reshape(-1, len(weight))
        by_form = [
            float((rows @ (dequantized(each, linear.weight) - weight)).var())
            for each in (rounded, nearest)
        ]
        better += by_form[0] < by_form[1]
    assert better > 0.8 * len(linears)


def dequantized(graph, weight):
    """Return what the steps of a weight stand for, by the graph's own scales."""
    steps = graph.array(f"{weight}.quantized").astype(np.float32)
    if f"{weight}.scales" in graph.weights:
        scales = graph.array(f"{weight}.scales")
        return steps * np.repeat(scales, len(steps) // len(scales), axis=0)
    (item,) = (item for item in graph.nodes if f"{weight}.quantized" in item.input)
    return steps * graph.array(item.input[1])


def test_the_moments_are_the_sums_over_a_third_of_the_slots_and_every_single_row():
    random = np.random.default_rng(1)
    many, single = (random.standard_normal((4, slots, 6)).astype(np.float32) for slots in (7, 1))
    for values, rows in ((many, many[:, ::3]), (single, single)):
        seen = Activations.none(6)
        seen.add(values)
        flat = rows.reshape(-1, 6)
        np.testing.assert_allclose(seen.moments, flat.T @ flat, rtol=1e-5, atol=1e-5)
