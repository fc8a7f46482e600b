"""8-bit products, rows made 8 bit and norms that copy compute what their references say.

As in `test_computed`: Triton's interpreter, or with `-m gpu` the compiled code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edje.errors import EngineError
from edje.kernels import layer_references
from edje.kernels.launch import KernelLibrary
from edje.kernels.layer_variants8 import KINDS, POINTER_TILES8, TMA_TILES8
from edje.kernels.layers import AddNorm
from edje.kernels.layers8 import Product8, Quantize
from edje.kernels.scaled import Copy, Scaled
from launches import NotedKernels, fake_memory
from recording_device import RecordingDevice

a_few = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
VALUES = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
STALE = 7
kinds = st.sampled_from(list(KINDS))
seeds = st.integers(0, 2**32 - 1)


class HostScaled(NamedTuple):
    """8-bit rows on the host: as `Scaled`."""

    values: np.ndarray
    scales: np.ndarray

    def wide(self) -> np.ndarray:
        """Return what they stand for."""
        return self.values.astype(np.float64) * np.repeat(self.scales, 128, axis=1)

    def on(self, device: Any) -> Scaled:
        """Return them in device memory; E4M3 travels as uint8."""
        values = self.values if self.values.dtype == np.int8 else self.values.view(np.uint8)
        return Scaled(device.memory(values), device.memory(self.scales))


def scaled_rows(rng: np.random.Generator, num_rows: int, width: int, kind: str) -> HostScaled:
    """Return rows of full range, with scales of several orders of magnitude."""
    exact = rng.standard_normal((num_rows, width)) * 10.0 ** rng.integers(-3, 3, (num_rows, 1))
    ratio, scales = layer_references.quantize(exact, np.ones(width), KINDS[kind].largest)
    return HostScaled(rounded(ratio, kind), scales)


def rounded(ratio: np.ndarray, kind: str) -> np.ndarray:
    return (np.rint(ratio) if kind == "int8" else ratio).astype(VALUES[kind])


def stale(num_rows: int, width: int, kind: str) -> HostScaled:
    values = np.full((num_rows, width), STALE, VALUES[kind])
    return HostScaled(values, np.full((num_rows, width // 128), STALE, np.float32))


def control_of(device: Any, num_pairs: int) -> Any:
    return device.memory(np.array([0, num_pairs], np.int64))


def steps_apart(found: HostScaled, exact: np.ndarray, kind: str) -> float:
    """Return how far values lie from the exact ones at most, in steps at that place."""
    difference = np.abs(found.wide() - exact)
    step = np.repeat(found.scales, 128, axis=1).astype(np.float64)
    if kind == "fp8":
        # Three bits of mantissa; below 2^-6 of the scale's unit steps are all the same.
        step = step * np.exp2(np.maximum(np.floor(np.log2(np.abs(exact) / step + 1e-30)), -6) - 3)
    return float((difference / step).max())


@a_few
@given(
    seed=seeds,
    kind=kinds,
    width=st.sampled_from([128, 384, 1024]),
    num_pairs=st.integers(1, 3),
    num_slots=st.sampled_from([1, 13, 80]),
)
def test_quantize(
    device: Any, seed: int, kind: str, width: int, num_pairs: int, num_slots: int
) -> None:
    rng = np.random.default_rng(seed)
    num_rows = num_pairs * num_slots
    x = rng.standard_normal((num_rows + 3, width)).astype(np.float16)
    x[0] = 0
    smooth = rng.uniform(0.2, 5, width).astype(np.float32)
    out = stale(num_rows + 3, width, kind)
    Quantize(device.library, kind=kind, width=width).enqueue(
        device.memory(x),
        Copy(out.on(device), device.memory(smooth)),
        control_of(device, num_pairs),
        num_pairs=num_pairs,
        rows_per_pair=num_slots,
        stream=device.stream,
    )
    device.finish()
    ratio, scales = layer_references.quantize(x[:num_rows], smooth, KINDS[kind].largest)
    np.testing.assert_array_equal(out.scales[:num_rows], scales)
    found = HostScaled(out.values[:num_rows], scales)
    exact = ratio.astype(np.float64) * np.repeat(scales, 128, axis=1)
    assert steps_apart(found, exact, kind) <= 0.5 + 1e-5
    assert (out.values[num_rows:].astype(np.float32) == STALE).all()
    assert (out.scales[num_rows:] == STALE).all()


@a_few
@given(
    seed=seeds,
    kind=kinds,
    hidden=st.sampled_from([16, 96, 384, 768]),
    num_pairs=st.integers(2, 4),
    num_slots=st.sampled_from([3, 13]),
    is_cls=st.booleans(),
)
def test_a_norm_copies_what_it_writes(
    device: Any,
    seed: int,
    kind: str,
    hidden: int,
    num_pairs: int,
    num_slots: int,
    is_cls: bool,
) -> None:
    rng = np.random.default_rng(seed)
    width = -(-hidden // 128) * 128
    residual = np.zeros((num_pairs * num_slots, width), np.float16)
    residual[:, :hidden] = rng.standard_normal((len(residual), hidden))
    num_rows = num_pairs if is_cls else len(residual)
    x = residual[::-1][:num_rows].copy()
    x[-1, 0] = np.nan
    weight, bias, smooth = rng.uniform(0.2, 2, (3, width)).astype(np.float32)
    out, copy = np.full((num_rows + 5, width), STALE, np.float16), stale(num_rows + 5, width, kind)
    arrays = [device.memory(each) for each in (x, residual, weight, bias, out)]
    norm = AddNorm(
        device.library, dtype="float16", hidden=hidden, width=width, epsilon=1e-12, copy=kind
    )
    norm.enqueue(
        *arrays,
        control_of(device, num_pairs),
        num_pairs=num_pairs,
        rows_per_pair=1 if is_cls else num_slots,
        residual_stride=num_slots * width if is_cls else None,
        copy=Copy(copy.on(device), device.memory(smooth)),
        stream=device.stream,
    )
    device.finish()
    added = (residual[::num_slots] if is_cls else residual)[:num_rows, :hidden]
    parts = (x[:, :hidden], added, weight[:hidden], bias[:hidden])
    expected = layer_references.add_norm(*parts, 1e-12)
    np.testing.assert_allclose(out[:-5, :hidden], expected, rtol=2.0**-11, atol=1e-5)
    whole = out[: num_rows - 1]
    ratio, scales = layer_references.quantize(whole, smooth, KINDS[kind].largest)
    np.testing.assert_allclose(copy.scales[: num_rows - 1], scales, rtol=1e-6)
    exact = ratio.astype(np.float64) * np.repeat(scales, 128, axis=1)
    found = HostScaled(copy.values[: num_rows - 1], copy.scales[: num_rows - 1])
    assert steps_apart(found, exact, kind) <= 0.5 + 1e-5
    assert np.isnan(copy.scales[num_rows - 1, : -(-hidden // 128)]).all()
    assert (copy.values[num_rows:].astype(np.float32) == STALE).all()
    assert (copy.scales[num_rows:] == STALE).all()


def check_product(
    device: Any,
    rng: np.random.Generator,
    kind: str,
    gelu: str,
    tile: str,
    *,
    writes8: bool,
    is_cls: bool,
) -> None:
    """Run a product of random shape and compare it with its reference."""
    num_pairs, num_slots = int(rng.integers(2, 4)), int(rng.choice([41, 80]))
    num_out, num_in = ((128, 384), (256, 128))[rng.integers(2)]
    x = scaled_rows(rng, (num_pairs + 1) * num_slots, num_in, kind)
    x.scales[0] = np.nan
    weight = scaled_rows(rng, num_out, num_in, kind)
    bias = rng.standard_normal(num_out).astype(np.float32)
    smooth = rng.uniform(0.2, 5, num_out).astype(np.float32)
    num_rows, step = (num_pairs, num_slots) if is_cls else (num_pairs * num_slots, 1)
    copy = stale(num_rows + 200, num_out, kind)
    out = np.full((num_rows + 200, num_out), STALE, np.float16)
    product = Product8(
        device.library, kind=kind, gelu=gelu, tile=tile, num_processors=1, writes8=writes8
    )
    product.enqueue(
        x.on(device),
        weight.on(device),
        device.memory(bias),
        Copy(copy.on(device), device.memory(smooth)) if writes8 else device.memory(out),
        control_of(device, num_pairs),
        num_pairs=num_pairs + 1,
        rows_per_pair=num_rows // num_pairs,
        row_step=step,
        stream=device.stream,
    )
    device.finish()
    read = HostScaled(*(each[::step][:num_rows] for each in x))
    exact = layer_references.product8(*read, *weight, bias, gelu)[1:]
    size = np.abs(read.wide()) @ np.abs(weight.wide()).T
    if writes8:
        found = HostScaled(copy.values[1:num_rows], copy.scales[1:num_rows])
        exact = exact * smooth
        blocks = np.abs(exact).reshape(num_rows - 1, -1, 128).max(axis=2)
        np.testing.assert_allclose(found.scales, blocks / KINDS[kind].largest, rtol=1e-4)
        assert steps_apart(found, exact, kind) <= 0.5 + 1e-2
        assert np.isnan(copy.scales[0]).all()
        assert (copy.scales[num_rows:] == STALE).all()
    else:
        near = 2.0**-11 * np.abs(exact) + 2e-6 * (size[1:] + 1)
        large = np.abs(exact) > 6e4
        assert (large | (np.abs(out[1:num_rows] - exact) <= near)).all()
        assert np.isnan(out[0]).all()
    last = copy.values if writes8 else out
    whole_tiles = -(-num_rows // 128) * 128
    assert (last[whole_tiles if product.uses_tma else num_rows :].astype(np.float32) == STALE).all()


forms = st.sampled_from([("none", False)] + [(g, w) for g in ("exact", "tanh") for w in (0, 1)])


@settings(a_few, max_examples=20)
@given(
    seed=seeds, kind=kinds, form=forms, tile=st.sampled_from(list(TMA_TILES8)), cls=st.booleans()
)
def test_product8(
    device: Any, seed: int, kind: str, form: tuple[str, bool], tile: str, cls: bool
) -> None:
    (gelu, writes8), shape = form, TMA_TILES8[tile]
    if not shape.takes(gelu):
        tile = "64x128x128"
    rng = np.random.default_rng(seed)
    check_product(device, rng, kind, gelu, tile, writes8=bool(writes8), is_cls=cls)


@settings(a_few, max_examples=15)
@given(seed=seeds, kind=kinds, form=forms, tile=st.sampled_from(list(POINTER_TILES8)))
def test_product8_that_loads_through_pointers(
    older_device: Any, seed: int, kind: str, form: tuple[str, bool], tile: str
) -> None:
    rng, (gelu, writes8) = np.random.default_rng(seed), form
    check_product(older_device, rng, kind, gelu, tile, writes8=bool(writes8), is_cls=seed % 2 == 0)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_row_is_the_same_bits_in_every_batch(device: Any, kind: str) -> None:
    rng = np.random.default_rng(0)
    x, weight = scaled_rows(rng, 300, 256, kind), scaled_rows(rng, 128, 256, kind)
    bias, smooth = rng.standard_normal((2, 128)).astype(np.float32)
    product = Product8(
        device.library,
        kind=kind,
        gelu="exact",
        tile="64x128x128",
        num_processors=2,
        writes8=True,
    )
    found = []
    for num_rows in (1, 100, 300):
        out = stale(300, 128, kind)
        product.enqueue(
            x.on(device),
            weight.on(device),
            device.memory(bias),
            Copy(out.on(device), device.memory(smooth)),
            control_of(device, num_rows),
            num_pairs=300,
            rows_per_pair=1,
            stream=device.stream,
        )
        device.finish()
        found.append(out)
    for some in found[:2]:
        num_rows = 1 if some is found[0] else 100
        for left, right in zip(some, found[2], strict=True):
            assert left[:num_rows].tobytes() == right[:num_rows].tobytes()


@pytest.fixture
def noted() -> Any:
    opened = RecordingDevice(0, kernels=NotedKernels())
    with opened.current():
        yield opened


def scaled_memory(num_rows: int, width: int, kind: str = "int8") -> Scaled:
    values = fake_memory(16, (num_rows, width), KINDS[kind].numpy)
    return Scaled(values, fake_memory(8, (num_rows, width // 128), "float32"))


def product_arrays(**changes: Any) -> dict[str, Any]:
    arrays = {
        "x": scaled_memory(20480, 384),
        "weight": scaled_memory(1536, 384),
        "bias": fake_memory(48, (1536,), "float32"),
        "out": fake_memory(64, (20480, 1536), "float16"),
        "control": fake_memory(8, (2,), "int64"),
    }
    return {**arrays, **changes}


@pytest.mark.parametrize(("num_pairs", "programs"), [(256, 264), (1, 24)])
def test_a_product_fills_the_processors(noted: Any, num_pairs: int, programs: int) -> None:
    library = KernelLibrary(noted, (9, 0))
    product = Product8(library, kind="int8", gelu="exact", tile="64x128x128", num_processors=132)
    assert product.uses_tma
    how = {"num_pairs": num_pairs, "rows_per_pair": 80, "stream": noted.stream()}
    product.enqueue(**product_arrays(), **how)
    (launch,) = noted.launches
    assert launch.grid == (programs, 1, 1)


def test_types_that_a_gpu_does_not_multiply_have_no_kernel(noted: Any) -> None:
    for capability, kind, tma in [((8, 0), "int8", False), ((8, 9), "fp8", False)]:
        library = KernelLibrary(noted, capability)
        product = Product8(library, kind=kind, gelu="none", tile="64x128x128", num_processors=1)
        assert product.uses_tma is tma
    for capability in ((8, 0), (8, 6)):
        library = KernelLibrary(noted, capability)
        with pytest.raises(EngineError, match="no kernel was compiled for compute capability 8"):
            Product8(library, kind="fp8", gelu="none", tile="64x128x128", num_processors=1)


def test_choices_that_no_kernel_takes_are_named_at_once(noted: Any) -> None:
    library = KernelLibrary(noted, (9, 0))

    def names(make: Any, **choices: Any) -> list[str]:
        with pytest.raises(EngineError) as raised:
            make(library, **choices)
        return [fault.split(":")[0] for fault in raised.value.faults]

    wrong: dict[str, Any] = {"kind": "int4", "gelu": "erf", "tile": "1x1x1", "num_processors": 0}
    assert names(Product8, **wrong) == list(wrong)
    how = {"kind": "int8", "gelu": "tanh", "num_processors": 1}
    assert names(Product8, **how, tile="128x64x128") == ["tile"]
    how = {"kind": "int8", "gelu": "none", "num_processors": 1}
    assert names(Product8, **how, tile="64x128x128", writes8=True) == ["writes8"]
    assert names(Quantize, kind="", width=100) == ["kind", "width"]
    how = {"dtype": "bfloat16", "hidden": 384, "width": 384, "epsilon": 0}
    assert names(AddNorm, **how, copy="int4") == ["dtype", "copy"]


def test_what_does_not_fit_is_refused(noted: Any) -> None:
    library, stream = KernelLibrary(noted, (9, 0)), noted.stream()
    how: dict[str, Any] = {"num_pairs": 1, "rows_per_pair": 80, "stream": stream}
    control, few = fake_memory(8, (2,), "int64"), fake_memory(16, (128,), "float32")

    def names(call: Any, *arrays: Any, **more: Any) -> list[str]:
        with pytest.raises(EngineError) as raised:
            call(*arrays, **how, **more)
        return [fault.split(":")[0] for fault in raised.value.faults]

    product = Product8(library, kind="fp8", gelu="none", tile="64x128x128", num_processors=1)
    short = scaled_memory(79, 384)
    out = fake_memory(16, (80, 1536), "float16")
    found = names(product.enqueue, short, scaled_memory(1536, 384, "fp8"), few, out, control)
    assert found == ["x", "x.scales", "bias"]
    step = names(
        product.enqueue,
        scaled_memory(80, 128, "fp8"),
        scaled_memory(128, 128, "fp8"),
        few,
        Copy(short, few),
        control,
        row_step=2,
    )
    assert step == ["x", "x.scales", "out"]
    quantize = Quantize(library, kind="int8", width=384)
    assert names(quantize.enqueue, out, Copy(short, few), control) == [
        *("x", "out", "out.scales", "out.smooth")
    ]
    norm = AddNorm(library, dtype="float16", hidden=384, width=384, epsilon=1e-12, copy="int8")
    row = fake_memory(16, (384,), "float32")
    rows = fake_memory(16, (80, 384), "float16")
    assert names(norm.enqueue, rows, rows, row, row, rows, control) == ["copy"]
    assert noted.launches == []
