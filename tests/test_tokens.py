"""int8 tokens: near the float16 ones, exact to dequantise, and never finite out of NaN."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edje.engines.contract import Batch
from edje.engines.samples import int8_batch
from edje.tokens import dequantize_tokens, not_finite, quantize_tokens

FLOAT16_MAX = 65504
finite = arrays(np.float16, (2, 3, 5), elements=st.floats(-FLOAT16_MAX, FLOAT16_MAX, width=16))


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float16)


@settings(max_examples=200, deadline=None)
@given(finite)
def test_values_lie_within_half_a_step_of_the_float16_ones(tokens):
    values, scales = quantize_tokens(tokens)
    assert (values.dtype, values.shape) == (np.int8, (2, 3, 5))
    assert (scales.dtype, scales.shape) == (np.float16, (2, 3))
    assert (scales > 0).all()
    assert values.min() >= -127
    steps = scales.astype(np.float64)[:, :, None]
    error = np.abs(values * steps - tokens.astype(np.float64))
    assert (error <= steps * 0.5001).all()
    assert np.isfinite(dequantize_tokens(values, scales)).all()


@settings(max_examples=200, deadline=None)
@given(
    arrays(np.int8, (2, 3, 5), elements=st.integers(-128, 127)),
    arrays(np.float16, (2, 3), elements=st.floats(width=16)),
)
def test_dequantising_is_the_product_rounded_to_float16(values, scales):
    found = dequantize_tokens(values, scales)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (values * scales.astype(np.float32)[:, :, None]).astype(np.float16)
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=200, deadline=None)
@given(
    arrays(np.int8, (2, 3, 5), elements=st.integers(-127, 127)),
    arrays(np.float16, (2, 3), elements=st.floats(2**-13, 515.5, width=16)),
)
def test_tokens_that_were_int8_become_the_same_values_again(values, scales):
    values[:, :, 2] = 127  # as every token but zeros has after quantising
    again, scales_again = quantize_tokens(dequantize_tokens(values, scales))
    np.testing.assert_array_equal(again, values)
    np.testing.assert_allclose(scales_again, scales, rtol=2**-10)


def test_values_may_lie_in_the_last_half_of_what_is_written():
    values, scales = quantize_tokens(normal(11, 3, 5))
    out = np.empty(values.shape, np.float16)
    last_half = out.reshape(-1).view(np.int8)[out.size :].reshape(out.shape)
    last_half[:] = values
    assert dequantize_tokens(last_half, scales, out) is out
    np.testing.assert_array_equal(out, dequantize_tokens(values, scales))


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_records_that_are_not_finite_are_found(value):
    tokens = normal(20, 3, 5)
    tokens[0, 0, 0], tokens[1, 0, 0] = 65504, -65504
    assert not_finite(tokens).tolist() == []
    tokens[3, 2, 4] = tokens[19, 0, 0] = value
    assert not_finite(tokens).tolist() == [3, 19]
    assert not_finite(*quantize_tokens(tokens)).tolist() == [3, 19]
    assert not_finite(tokens[:0]).tolist() == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_comes_back_as_nan_and_no_other_does(value):
    tokens = normal(20, 3, 5)
    tokens[17, 1, 4] = value
    found = dequantize_tokens(*quantize_tokens(tokens))
    assert np.isnan(found[17, 1]).all()
    found[17, 1] = 0
    assert np.isfinite(found).all()


def test_each_record_is_quantised_by_itself_and_zeros_stay_zeros():
    tokens = normal(37, 4, 6)
    tokens[30] = 0
    values, scales = quantize_tokens(tokens)
    for place in (0, 7, 8, 36):
        value, scale = quantize_tokens(tokens[place : place + 1])
        np.testing.assert_array_equal(value[0], values[place])
        np.testing.assert_array_equal(scale[0], scales[place])
    assert (values[30] == 0).all()
    assert (scales[30] == 1).all()
    strided = quantize_tokens(tokens[::-1])[0]
    np.testing.assert_array_equal(strided[::-1], values)
    assert quantize_tokens(tokens[:0])[1].shape == (0, 4)


def test_a_batch_becomes_int8_with_its_scales():
    tokens = normal(2, 3, 5)
    batch = Batch(np.zeros((1, 4), np.int32), *np.zeros((2, 1), np.int32), tokens)
    found = int8_batch(batch)
    values, scales = quantize_tokens(tokens)
    np.testing.assert_array_equal(found.visual_tokens, values)
    np.testing.assert_array_equal(found.visual_scales, scales)
    assert found.text_ids is batch.text_ids
