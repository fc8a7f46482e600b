"""Product, residual and norm in one compute what their references say, and refuse the rest.

On the machine of threads that `emulated_kernels` describes, or with `-m gpu` the compiled code.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edje.errors import EngineError
from edje.kernels import layer_references
from edje.kernels.cuda_variants import product_norm_name
from edje.kernels.launch import KernelLibrary
from edje.kernels.product_norm_call import ProductNorm
from launches import NotedKernels, fake_memory
from recording_device import RecordingDevice

WIDTH, EPSILON, STALE = 384, 1e-12, 7.0
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# Half a unit in the last place of the largest results, and what float32 sums lose before it.
TOLERANCE = {"float16": 2.0**-10, "bfloat16": 2.0**-7}


class Problem:
    """Random arrays of one call; bfloat16 travels as uint16."""

    def __init__(self, seed: int, dtype: str, num_rows: int, num_in: int, step: int = 1):
        """Draw `num_rows` rows of `x`; every `step`-th row of the residual belongs to them."""
        rng, kind = np.random.default_rng(seed), DTYPES[dtype]
        self.dtype, self.step = dtype, step
        self.x = rng.standard_normal((num_rows, num_in)).astype(kind)
        self.weight = (rng.standard_normal((WIDTH, num_in)) / np.sqrt(num_in)).astype(kind)
        self.residual = rng.standard_normal((num_rows * step, WIDTH)).astype(kind)
        vectors = rng.standard_normal((3, WIDTH)).astype(np.float32)
        self.bias, self.norm_weight, self.norm_bias = vectors
        self.out = np.full((num_rows + 200, WIDTH), STALE, kind)

    def enqueue(
        self, device: Any, num_pairs: int, most_pairs: int, rows_per_pair: int, programs: int = 1
    ) -> None:
        """Run it on a device and wait; `out` has the result."""
        call = ProductNorm(
            device.library, dtype=self.dtype, epsilon=EPSILON, num_processors=programs
        )
        names = ("x", "weight", "bias", "residual", "norm_weight", "norm_bias", "out")
        held = {name: device.memory(_bits(getattr(self, name))) for name in names}
        call.enqueue(
            held["x"],
            (held["weight"], held["bias"]),
            held["residual"],
            (held["norm_weight"], held["norm_bias"]),
            held["out"],
            device.memory(np.array([0, num_pairs], np.int64)),
            num_pairs=most_pairs,
            rows_per_pair=rows_per_pair,
            stream=device.stream,
            residual_stride=self.step * WIDTH if self.step > 1 else None,
        )
        device.finish()

    def fault(self, num_rows: int) -> str | None:
        """Say what the first rows differ by from the reference, or that others were written."""
        rows, weight = (each.astype(np.float64) for each in (self.x[:num_rows], self.weight))
        product = layer_references.product(rows, weight, self.bias, "none")
        residual = self.residual[:: self.step][:num_rows].astype(np.float64)
        vectors = self.norm_weight, self.norm_bias, EPSILON
        expected = layer_references.add_norm(product, residual, *vectors)
        found, most = self.out[:num_rows].astype(np.float64), TOLERANCE[self.dtype]
        if not np.allclose(found, expected, rtol=most, atol=most):  # NaN is not close
            return f"off by {np.abs(found - expected).max()}, expected {most} at most"
        written = np.flatnonzero((self.out[num_rows:] != STALE).any(axis=1))
        return f"rows {num_rows + written} were written" if len(written) else None


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype == DTYPES["bfloat16"] else array


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(list(DTYPES)),
    num_pairs=st.integers(1, 5),
    rows_per_pair=st.sampled_from([1, 41, 80]),
    num_in=st.sampled_from([64, 128, 320]),
    programs=st.integers(1, 2),
)
def test_it_computes_what_its_references_say(
    device: Any,
    seed: int,
    dtype: str,
    num_pairs: int,
    rows_per_pair: int,
    num_in: int,
    programs: int,
) -> None:
    problem = Problem(seed, dtype, (num_pairs + 1) * rows_per_pair, num_in)
    problem.enqueue(device, num_pairs, num_pairs + 1, rows_per_pair, programs)
    assert problem.fault(num_pairs * rows_per_pair) is None


@pytest.mark.parametrize("num_in", [384, 1536])
def test_the_sizes_of_the_full_model(device: Any, num_in: int) -> None:
    problem = Problem(num_in, "float16", 160, num_in)
    problem.enqueue(device, 2, 2, 80)
    assert problem.fault(160) is None


def test_rows_of_the_residual_may_lie_apart(device: Any) -> None:
    problem = Problem(3, "float16", 5, 128, step=41)
    problem.enqueue(device, 5, 5, 1)
    assert problem.fault(5) is None


def test_a_row_is_the_same_bits_in_every_batch(device: Any) -> None:
    found = []
    for num_rows in (1, 100, 300):
        problem = Problem(0, "float16", 300, 128)
        problem.enqueue(device, num_rows, 300, 1, programs=2)
        found.append(problem.out)
    assert found[0][:1].tobytes() == found[2][:1].tobytes()
    assert found[1][:100].tobytes() == found[2][:100].tobytes()


def test_a_row_is_the_same_bits_at_every_place(device: Any) -> None:
    problem = Problem(1, "bfloat16", 150, 64)
    problem.enqueue(device, 150, 150, 1)
    turned = Problem(1, "bfloat16", 150, 64)
    turned.x, turned.residual = turned.x[::-1].copy(), turned.residual[::-1].copy()
    turned.enqueue(device, 150, 150, 1)
    assert problem.out[:150][::-1].tobytes() == turned.out[:150].tobytes()


def test_a_row_that_is_not_finite_spoils_itself_only(device: Any) -> None:
    problem = Problem(2, "float16", 140, 64)
    problem.enqueue(device, 140, 140, 1)
    right = problem.out[:140].copy()
    problem.x[77, 3] = np.nan
    problem.enqueue(device, 140, 140, 1)
    others = np.arange(140) != 77
    assert np.isnan(problem.out[77].astype(np.float32)).all()
    assert problem.out[:140][others].tobytes() == right[others].tobytes()


def test_the_residual_may_be_where_the_result_goes(device: Any) -> None:
    problem = Problem(4, "float16", 300, 64)
    problem.enqueue(device, 300, 300, 1)
    call = ProductNorm(device.library, dtype="float16", epsilon=EPSILON, num_processors=1)
    states = problem.residual.copy()
    held = device.memory(states)
    call.enqueue(
        device.memory(problem.x),
        (device.memory(problem.weight), device.memory(problem.bias)),
        held,
        (device.memory(problem.norm_weight), device.memory(problem.norm_bias)),
        held,
        device.memory(np.array([0, 300], np.int64)),
        num_pairs=300,
        rows_per_pair=1,
        stream=device.stream,
    )
    device.finish()
    assert states.tobytes() == problem.out[:300].tobytes()


def test_arrays_that_do_not_fit_are_named() -> None:
    noted = RecordingDevice(0, kernels=NotedKernels())
    library = KernelLibrary(noted, (9, 0))
    call = ProductNorm(library, dtype="float16", epsilon=EPSILON, num_processors=4)
    vector = fake_memory(1 << 20, (WIDTH,), "float32")
    with pytest.raises(EngineError) as raised:
        call.enqueue(
            fake_memory(1 << 20, (10, 100), "float16"),
            (fake_memory(1 << 20, (WIDTH, 100), "float32"), vector),
            fake_memory(1 << 20, (10, 512), "float16"),
            (vector, fake_memory(1 << 20, (100,), "float32")),
            fake_memory(1 << 20, (5, WIDTH), "float16"),
            fake_memory(1 << 20, (2,), "int64"),
            num_pairs=10,
            rows_per_pair=1,
            stream=noted.stream(),
            residual_stride=100,
        )
    for name in ("weight", "residual", "norm_bias", "out", "inputs", "residual_stride"):
        assert f"{name}: got" in str(raised.value), name


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_it_is_for_its_own_chip_alone(capability: tuple[int, int]) -> None:
    library = KernelLibrary(RecordingDevice(0), capability)
    assert not library.has(product_norm_name("float16"))
    with pytest.raises(EngineError, match="no kernel was compiled for compute capability"):
        ProductNorm(library, dtype="float16", epsilon=EPSILON, num_processors=1)


def test_choices_that_no_kernel_takes_are_named() -> None:
    library = KernelLibrary(RecordingDevice(0), (9, 0))
    with pytest.raises(EngineError, match="dtype: got 'int8'"):
        ProductNorm(library, dtype="int8", epsilon=EPSILON, num_processors=1)
