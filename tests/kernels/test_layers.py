"""Products, attention, norms and scores compute what their references say, and refuse the rest.

As in `test_computed`: Triton's interpreter, or with `-m gpu` the compiled code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edje.arrays import DeviceArray
from edje.errors import EngineError
from edje.kernels import layer_references
from edje.kernels.launch import KernelLibrary
from edje.kernels.layer_variants import POINTER_TILES, TMA_TILES
from edje.kernels.layers import AddNorm, Attention, Product, Score, ShallowScore
from launches import NotedKernels, fake_memory
from recording_device import RecordingDevice

a_few = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # half a unit in the last place
STALE = 7.0
dtypes = st.sampled_from(list(DTYPES))
seeds = st.integers(0, 2**32 - 1)


def rows_of(rng: np.random.Generator, num_rows: int, hidden: int, dtype: str) -> np.ndarray:
    """Return random rows, zeros after `hidden` values, as a kernel gets them."""
    width = -(-hidden // 128) * 128
    rows = np.zeros((num_rows, width), DTYPES[dtype])
    rows[:, :hidden] = rng.standard_normal((num_rows, hidden))
    return rows


def stale(num_rows: int, width: int, dtype: str) -> np.ndarray:
    return np.full((num_rows, width), STALE, DTYPES[dtype])


def upload(device: Any, array: np.ndarray) -> Any:
    """Return a copy in device memory; bfloat16 travels as uint16."""
    return device.memory(array.view(np.uint16) if array.dtype == DTYPES["bfloat16"] else array)


def control_of(device: Any, num_pairs: int, scores: int = 0) -> Any:
    return upload(device, np.array([scores, num_pairs], np.int64))


def wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


@a_few
@given(
    seed=seeds,
    dtype=dtypes,
    gelu=st.sampled_from(["none", "exact", "tanh"]),
    tile_of=st.sampled_from(
        [(True, tile) for tile in TMA_TILES] + [(False, tile) for tile in POINTER_TILES]
    ),
    num_pairs=st.integers(1, 4),
    num_slots=st.sampled_from([41, 80, 150]),
    is_cls=st.booleans(),
    sizes=st.sampled_from([(128, 384), (256, 128)]),
)
def test_product(
    device: Any,
    seed: int,
    dtype: str,
    gelu: str,
    tile_of: tuple[bool, str],
    num_pairs: int,
    num_slots: int,
    is_cls: bool,
    sizes: tuple[int, int],
) -> None:
    rng, (num_out, num_in), (tma, tile) = np.random.default_rng(seed), sizes, tile_of
    x = rows_of(rng, (num_pairs + 1) * num_slots, num_in, dtype)
    weight = rows_of(rng, num_out, num_in, dtype) / np.sqrt(num_in).astype(DTYPES[dtype])
    bias = rng.standard_normal(num_out).astype(np.float32)
    read = (x[::num_slots] if is_cls else x)[: num_pairs * (1 if is_cls else num_slots)]
    out = stale(len(read) + 200, num_out, dtype)
    product = Product(device.library, dtype=dtype, gelu=gelu, tile=tile, num_processors=1, tma=tma)
    product.enqueue(
        upload(device, x),
        upload(device, weight),
        upload(device, bias),
        upload(device, out),
        control_of(device, num_pairs),
        num_pairs=num_pairs + 1,
        rows_per_pair=1 if is_cls else num_slots,
        x_stride=num_slots * num_in if is_cls else None,
        stream=device.stream,
    )
    device.finish()
    expected = layer_references.product(read, weight, bias, gelu)
    found = wide(out[: len(read)])
    np.testing.assert_allclose(found, expected, rtol=ROUNDING[dtype], atol=2e-6)
    whole_tiles = -(-len(read) // 128) * 128
    assert (out[whole_tiles if tma else len(read) :] == STALE).all()


@pytest.mark.parametrize("tma", [True, False])
def test_a_row_is_the_same_bits_in_every_batch(device: Any, tma: bool) -> None:
    rng = np.random.default_rng(0)
    x, weight = rows_of(rng, 300, 256, "float16"), rows_of(rng, 128, 256, "float16")
    bias = rng.standard_normal(128).astype(np.float32)
    product = Product(
        device.library, dtype="float16", gelu="exact", tile="64x64x64", num_processors=2, tma=tma
    )
    found = []
    for num_rows in (1, 100, 300):
        out = stale(300, 128, "float16")
        arrays = [upload(device, each) for each in (x, weight, bias, out)]
        product.enqueue(
            *arrays,
            control_of(device, num_rows),
            num_pairs=300,
            rows_per_pair=1,
            stream=device.stream,
        )
        device.finish()
        found.append(out)
    assert found[0][:1].tobytes() == found[2][:1].tobytes()
    assert found[1][:100].tobytes() == found[2][:100].tobytes()


@settings(a_few, max_examples=15)
@given(
    seed=seeds,
    dtype=dtypes,
    head=st.sampled_from([32, 64]),
    num_heads=st.integers(1, 3),
    num_slots=st.sampled_from([41, 80, 88, 96, 112, 128, 150]),
    num_pairs=st.integers(1, 3),
    is_cls=st.booleans(),
)
def test_attention(
    device: Any,
    seed: int,
    dtype: str,
    head: int,
    num_heads: int,
    num_slots: int,
    num_pairs: int,
    is_cls: bool,
) -> None:
    """Padded text keys may be NaN; a pair that is NaN stays alone."""
    rng, hidden = np.random.default_rng(seed), head * num_heads
    text_slots = int(rng.integers(2, num_slots - 1))
    lengths = rng.integers(1, text_slots + 1, num_pairs, dtype=np.int32)
    width, num_queries = -(-hidden // 128) * 128, 1 if is_cls else num_slots
    slots = np.concatenate(
        [rows_of(rng, num_pairs * num_slots, hidden, dtype) for _ in range(3)], axis=1
    )
    slots[:, :width] /= np.sqrt(head).astype(DTYPES[dtype])
    pairs = slots.reshape(num_pairs, num_slots, 3, width)
    for pair, length in enumerate(lengths):
        pairs[pair, length:text_slots, 1:] = np.nan
    if num_pairs > 1:
        pairs[0, text_slots:] = np.nan
    queries, keys, values = (pairs[:, :, part, :hidden] for part in range(3))
    cls = np.ascontiguousarray(pairs[:, 0, 0])
    out = stale(num_pairs * num_queries + 3, width, dtype)

    held = upload(device, slots)
    shape, size = (len(slots), width), 2 * width
    q, k, v = (DeviceArray(held.address + n * size, shape, held.dtype) for n in range(3))
    attention = Attention(
        device.library,
        dtype=dtype,
        head=head,
        num_heads=num_heads,
        text_slots=text_slots,
        num_slots=num_slots,
        num_queries=num_queries,
    )
    attention.enqueue(
        upload(device, cls) if is_cls else q,
        k,
        v,
        upload(device, out),
        upload(device, lengths),
        control_of(device, num_pairs),
        num_pairs=num_pairs,
        query_stride=None if is_cls else 3 * width,
        key_stride=3 * width,
        stream=device.stream,
    )
    device.finish()
    expected = layer_references.attention(
        wide(queries[:, :num_queries]),
        wide(keys),
        wide(values),
        lengths,
        text_slots=text_slots,
        num_heads=num_heads,
    )
    found = wide(out[:-3]).reshape(num_pairs, num_queries, width)
    # Probabilities are rounded too, each by half a unit: values of 4 at most, weights of 1.
    limit = 4 * ROUNDING[dtype]
    np.testing.assert_allclose(found[:, :, :hidden], expected, rtol=0, atol=limit)
    assert np.isnan(found[:, :, :hidden]).any() == (num_pairs > 1)
    assert (found[:, :, hidden:] == STALE).all()
    assert (out[-3:] == STALE).all()


@a_few
@given(
    seed=seeds,
    dtype=dtypes,
    hidden=st.sampled_from([16, 96, 384, 768]),
    num_pairs=st.integers(1, 3),
    num_slots=st.sampled_from([3, 13]),
    is_cls=st.booleans(),
)
def test_add_norm(
    device: Any,
    seed: int,
    dtype: str,
    hidden: int,
    num_pairs: int,
    num_slots: int,
    is_cls: bool,
) -> None:
    rng = np.random.default_rng(seed)
    residual = rows_of(rng, num_pairs * num_slots, hidden, dtype)
    added = residual[::num_slots] if is_cls else residual
    x = rows_of(rng, len(added), hidden, dtype)
    x[-1, 0] = np.nan
    width = x.shape[1]
    weight, bias = (rows_of(rng, 1, hidden, "float16")[0].astype(np.float32) for _ in range(2))
    out = stale(len(added) + 5, width, dtype)
    arrays = [upload(device, each) for each in (x, residual, weight, bias, out)]
    AddNorm(device.library, dtype=dtype, hidden=hidden, width=width, epsilon=1e-12).enqueue(
        *arrays,
        control_of(device, num_pairs),
        num_pairs=num_pairs,
        rows_per_pair=1 if is_cls else num_slots,
        residual_stride=num_slots * width if is_cls else None,
        stream=device.stream,
    )
    device.finish()
    parts = (wide(x), wide(added), weight, bias)
    expected = layer_references.add_norm(*(part[..., :hidden] for part in parts), 1e-12)
    found = wide(out[:-5])
    np.testing.assert_allclose(found[:, :hidden], expected, rtol=ROUNDING[dtype], atol=1e-5)
    assert np.isnan(found[-1, :hidden]).all()
    assert (found[:, hidden:] == 0).all()
    assert (out[-5:] == STALE).all()


@a_few
@given(seed=seeds, dtype=dtypes, hidden=st.sampled_from([64, 384]), num_pairs=st.integers(1, 40))
def test_score(device: Any, seed: int, dtype: str, hidden: int, num_pairs: int) -> None:
    rng = np.random.default_rng(seed)
    cls = rows_of(rng, num_pairs, hidden, dtype)
    cls[-1, 0] = np.nan
    width = cls.shape[1]
    pooler = np.zeros((width, width), np.float32)
    pooler[:hidden, :hidden] = rng.standard_normal((hidden, hidden)) / np.sqrt(hidden)
    pooler_bias, classifier = (
        rows_of(rng, 1, hidden, "float16")[0].astype(np.float32) for _ in range(2)
    )
    weights = [pooler, pooler_bias, classifier, rng.standard_normal(1).astype(np.float32)]
    scores = np.full(num_pairs + 5, STALE, np.float32)
    target = upload(device, scores)
    arrays = [upload(device, each) for each in (cls, *weights)]
    Score(device.library, dtype=dtype, width=width).enqueue(
        *arrays,
        control_of(device, num_pairs, target.address),
        num_pairs=num_pairs,
        stream=device.stream,
    )
    device.finish()
    expected = layer_references.score(wide(cls), *weights)
    np.testing.assert_allclose(scores[:-5], expected, rtol=0, atol=5e-5)
    assert np.isnan(expected).nonzero()[0].tolist() == [num_pairs - 1]
    assert (scores[-5:] == STALE).all()


def shallow_arrays(
    rng: np.random.Generator, dtype: str, hidden: int, slots: tuple[int, int], num_pairs: int
) -> list[np.ndarray]:
    """Return hidden states of `slots` (text, all), lengths, and a head; what is not read is NaN."""
    text_slots, num_slots = slots
    rows = rows_of(rng, num_pairs * num_slots, hidden, dtype)
    lengths = rng.integers(1, text_slots + 1, num_pairs).astype(np.int32)
    by_pair = rows.reshape(num_pairs, num_slots, -1)
    by_pair[:, -1] = np.nan
    by_pair[:, :text_slots][np.arange(text_slots) >= lengths[:, None]] = np.nan
    weight = rows_of(rng, 3, hidden, "float16").astype(np.float32) / np.float32(hidden**0.5)
    return [rows, lengths, weight, rng.standard_normal(1).astype(np.float32)]


@a_few
@given(
    seed=seeds,
    dtype=dtypes,
    hidden=st.sampled_from([48, 128, 384]),
    text_slots=st.integers(1, 70),
    num_tokens=st.integers(1, 70),
    num_pairs=st.integers(1, 6),
)
def test_shallow_score(
    device: Any,
    seed: int,
    dtype: str,
    hidden: int,
    text_slots: int,
    num_tokens: int,
    num_pairs: int,
) -> None:
    rng, slots = np.random.default_rng(seed), (text_slots, text_slots + num_tokens + 1)
    arrays = shallow_arrays(rng, dtype, hidden, slots, num_pairs)
    rows, *rest = arrays
    width = rows.shape[1]
    by_pair = rows.reshape(num_pairs, slots[1], width)
    by_pair[-1, text_slots] = np.nan  # of a slot that counts: its own pair's score only
    scores = np.full(num_pairs + 5, STALE, np.float32)
    target = upload(device, scores)
    ShallowScore(device.library, dtype=dtype, width=width).enqueue(
        *(upload(device, each) for each in arrays),
        control_of(device, num_pairs, target.address),
        num_pairs=num_pairs,
        num_slots=slots[1],
        text_slots=text_slots,
        stream=device.stream,
    )
    device.finish()
    expected = layer_references.shallow_score(by_pair, *rest, text_slots=text_slots)
    np.testing.assert_allclose(scores[:-5], expected, rtol=0, atol=5e-6)
    assert np.isnan(expected).nonzero()[0].tolist() == [num_pairs - 1]
    assert (scores[-5:] == STALE).all()


def test_a_shallow_score_is_the_same_bits_in_every_batch(device: Any) -> None:
    arrays = shallow_arrays(np.random.default_rng(0), "float16", 384, (15, 80), 20)
    score, found = ShallowScore(device.library, dtype="float16", width=384), []
    for num_pairs in (1, 7, 20):
        scores = np.full(20, STALE, np.float32)
        target = upload(device, scores)
        score.enqueue(
            *(upload(device, each) for each in arrays),
            control_of(device, num_pairs, target.address),
            num_pairs=20,  # more than the batch has: the rest is left alone
            num_slots=80,
            text_slots=15,
            stream=device.stream,
        )
        device.finish()
        assert (scores[num_pairs:] == STALE).all()
        found.append(scores)
    for few in found[:-1]:
        known = few[few != STALE]
        assert known.tobytes() == found[-1][: len(known)].tobytes()


@pytest.fixture
def noted() -> Iterator[RecordingDevice]:
    opened = RecordingDevice(0, kernels=NotedKernels())
    with opened.current():
        yield opened


@pytest.fixture
def library(noted: RecordingDevice) -> KernelLibrary:
    return KernelLibrary(noted, (9, 0))


def product_arrays(**changes: DeviceArray) -> dict[str, Any]:
    arrays = {
        "x": fake_memory(16, (20480, 384), "float16"),
        "weight": fake_memory(32, (1152, 384), "float16"),
        "bias": fake_memory(48, (1152,), "float32"),
        "out": fake_memory(64, (20480, 1152), "float16"),
        "control": fake_memory(8, (2,), "int64"),
    }
    return {**arrays, **changes}


@pytest.mark.parametrize(
    ("tile", "num_pairs", "programs"),
    [("128x64x64", 256, 264), ("128x64x64", 1, 18), ("128x128x64", 256, 132)],
)
def test_a_product_fills_the_processors_as_far_as_their_memory_goes(
    noted: RecordingDevice, library: KernelLibrary, tile: str, num_pairs: int, programs: int
) -> None:
    product = Product(library, dtype="float16", gelu="none", tile=tile, num_processors=132)
    assert product.uses_tma
    product.enqueue(
        **product_arrays(), num_pairs=num_pairs, rows_per_pair=80, stream=noted.stream()
    )
    (launch,) = noted.launches
    assert launch.grid == (programs, 1, 1)
    assert launch.values["x"].shape == (num_pairs * 80, 384)  # no row but those asked for


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9)])
def test_without_a_copy_engine_a_product_loads_through_pointers(
    noted: RecordingDevice, capability: tuple[int, int]
) -> None:
    library = KernelLibrary(noted, capability)
    product = Product(library, dtype="float16", gelu="tanh", tile="128x64x64", num_processors=132)
    assert not product.uses_tma
    stride = 80 * 384
    more = {"num_pairs": 256, "rows_per_pair": 1, "x_stride": stride}
    product.enqueue(**product_arrays(), **more, stream=noted.stream())
    (launch,) = noted.launches
    assert (launch.name, launch.grid) == ("product_float16_tanh_128x64x64", (2 * 18, 1, 1))
    assert launch.values["x_stride"] == stride


def test_choices_that_no_kernel_takes_are_named_at_once(library: KernelLibrary) -> None:
    def names(make: Any, **choices: Any) -> list[str]:
        with pytest.raises(EngineError) as raised:
            make(library, **choices)
        return [fault.split(":")[0] for fault in raised.value.faults]

    wrong: dict[str, Any] = {"dtype": "float32", "gelu": "erf", "tile": "1x1x1"}
    assert names(Product, **wrong, num_processors=0) == [*wrong, "num_processors"]
    wrong = {"dtype": "int8", "head": 48, "num_heads": 0, "num_slots": 0}
    found = names(Attention, **wrong, text_slots=3, num_queries=81)
    assert found == [*wrong, "text_slots", "num_queries"]
    found = names(AddNorm, dtype="", hidden=24, width=1100, epsilon=0)
    assert found == ["dtype", "hidden", "width", "width"]
    assert names(Score, dtype="float64", width=100) == ["dtype", "width"]
    wrong = {"gelu": "none", "tile": "128x128x64", "tma": False}
    assert names(Product, dtype="float16", num_processors=1, **wrong) == ["tile"]


@pytest.mark.parametrize(
    ("changes", "how", "fault"),
    [
        ({"x": fake_memory(16, (79, 384), "float16")}, {}, r"x: got .*\[at least 80, 384\]"),
        ({"x": fake_memory(16, (80, 384), "uint16")}, {}, "x: got uint16"),
        ({"bias": fake_memory(16, (1152,), "float16")}, {}, "bias: got float16"),
        ({"out": fake_memory(16, (80, 1153), "float16")}, {}, r"out: got .* 1152\]"),
        ({"control": fake_memory(16, (3,), "int64")}, {}, r"control: got int64 \[3\]"),
        ({"weight": fake_memory(16, (96, 384), "float16")}, {}, "got 96, 384, expected multiples"),
        ({}, {"x_stride": 100}, "x_stride: got 100, expected a multiple of 16"),
        ({}, {"num_pairs": 0}, "rows: got 0, expected 1"),
        ({"x": fake_memory(8, (80, 384), "float16")}, {}, "x: got address 8"),
    ],
)
def test_a_product_refuses_what_does_not_fit(
    noted: RecordingDevice,
    library: KernelLibrary,
    changes: dict[str, DeviceArray],
    how: dict[str, int],
    fault: str,
) -> None:
    product = Product(library, dtype="float16", gelu="none", tile="64x64x64", num_processors=132)
    how = {"num_pairs": 1, "rows_per_pair": 80, **how}
    with pytest.raises(EngineError, match=fault):
        product.enqueue(**product_arrays(**changes), **how, stream=noted.stream())
    assert noted.launches == []


def test_other_steps_refuse_what_does_not_fit(
    noted: RecordingDevice, library: KernelLibrary
) -> None:
    stream, short = noted.stream(), fake_memory(16, (79, 384), "float16")
    few, control = fake_memory(16, (384,), "float32"), fake_memory(16, (2,), "int32")

    def names(step: Any, *arrays: DeviceArray, **how: int) -> list[str]:
        with pytest.raises(EngineError) as raised:
            step.enqueue(*arrays, control, stream=stream, **how)
        return [fault.split(":")[0] for fault in raised.value.faults]

    sizes = {"num_heads": 13, "text_slots": 15, "num_slots": 80, "num_queries": 80}
    attention = Attention(library, dtype="float16", head=32, **sizes)
    expected = ["queries", "keys", "values", "out", "lengths", "control", "width", "key_stride"]
    found = names(attention, *[short] * 4, few, num_pairs=1, key_stride=8)
    assert found == expected
    norm = AddNorm(library, dtype="bfloat16", hidden=384, width=384, epsilon=1e-12)
    how = {"num_pairs": 1, "rows_per_pair": 80, "residual_stride": 8}
    found = names(norm, short, short, short, few, short, **how)
    assert found == ["x", "residual", "out", "weight", "control", "residual_stride"]
    score = Score(library, dtype="float16", width=384)
    found = names(score, short, few, few, few, few, num_pairs=80)
    assert found == ["cls", "pooler_weight", "classifier_bias", "control"]
    shallow = ShallowScore(library, dtype="bfloat16", width=384)
    found = names(shallow, short, few, few, few, num_pairs=1, num_slots=80, text_slots=79)
    assert found == ["hidden_states", "lengths", "weight", "bias", "control", "text_slots"]
    assert noted.launches == []
