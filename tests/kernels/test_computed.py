"""The kernels compute what their references say.

Without a GPU Triton's interpreter runs the sources: it shows the arithmetic and every address, not
races or layouts; writing beside an array fails. With a GPU, the same tests run the compiled code.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edje.kernels import references
from edje.kernels.operations import Assemble, DeviceEmbeddings
from edje.kernels.records import GatherTokens, ScatterTokens
from edje.kernels.references import Embeddings

a_few = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


def tokens_of(
    rng: np.random.Generator, shape: tuple[int, int, int], dtype: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return random records, and their scales where they are int8."""
    if dtype == "float16":
        return rng.standard_normal(shape).astype(np.float16), None
    scales = rng.uniform(0.001, 0.1, shape[:2]).astype(np.float16)
    return rng.integers(-127, 128, shape, dtype=np.int8), scales


COPIES = {
    "seed": st.integers(0, 2**32 - 1),
    "token_dtype": st.sampled_from(["float16", "int8"]),
    "row_dtype": st.sampled_from(["int32", "int64"]),
    "num_records": st.integers(1, 5),
    "num_tokens": st.sampled_from([1, 3, 64, 150]),
    "hidden": st.sampled_from([16, 64, 144]),
    "num_pairs": st.integers(1, 6),
}


@a_few
@given(**COPIES)
def test_gather_tokens(
    device: Any,
    seed: int,
    token_dtype: str,
    row_dtype: str,
    num_records: int,
    num_tokens: int,
    hidden: int,
    num_pairs: int,
) -> None:
    rng = np.random.default_rng(seed)
    records, scales = tokens_of(rng, (num_records, num_tokens, hidden), token_dtype)
    rows = rng.integers(-2, num_records + 2, num_pairs).astype(row_dtype)
    out = np.full((num_pairs, num_tokens, hidden), 3, token_dtype)
    out_scales = np.full((num_pairs, num_tokens), 3, np.float16)
    expected, expected_scales = out.copy(), out_scales.copy()
    references.gather_tokens(records, rows, expected, scales=scales, out_scales=expected_scales)
    memory = device.memory
    with_scales = {} if scales is None else {"scales": scales, "out_scales": out_scales}
    GatherTokens(device.library, token_dtype=token_dtype, row_dtype=row_dtype).enqueue(
        memory(records),
        memory(rows),
        memory(out),
        stream=device.stream,
        **{name: memory(array) for name, array in with_scales.items()},
    )
    device.finish()
    assert out.tobytes() == expected.tobytes()
    assert out_scales.tobytes() == expected_scales.tobytes()


def places_of(rng: np.random.Generator, num_records: int, num_pairs: int, dtype: str) -> np.ndarray:
    """Return places: distinct ones in a pool of `num_records`, and others outside it."""
    places = rng.permutation(np.arange(-3, num_records + 3))[:num_pairs].astype(dtype)
    outside = np.flatnonzero((places < 0) | (places >= num_records))
    limits = np.iinfo(dtype)
    places[outside] = rng.choice([-1, -2, num_records, limits.min, limits.max], len(outside))
    return places


@a_few
@given(**COPIES)
def test_scatter_tokens(
    device: Any,
    seed: int,
    token_dtype: str,
    row_dtype: str,
    num_records: int,
    num_tokens: int,
    hidden: int,
    num_pairs: int,
) -> None:
    rng = np.random.default_rng(seed)
    tokens, scales = tokens_of(rng, (num_pairs, num_tokens, hidden), token_dtype)
    places = places_of(rng, num_records, num_pairs, row_dtype)
    pool, pool_scales = tokens_of(rng, (num_records, num_tokens, hidden), token_dtype)
    expected = pool.copy()
    expected_scales = None if pool_scales is None else pool_scales.copy()
    references.scatter_tokens(tokens, places, expected, scales=scales, pool_scales=expected_scales)
    memory = device.memory
    ScatterTokens(device.library, token_dtype=token_dtype, place_dtype=row_dtype).enqueue(
        memory(tokens),
        memory(places),
        memory(pool),
        stream=device.stream,
        scales=None if scales is None else memory(scales),
        pool_scales=None if pool_scales is None else memory(pool_scales),
    )
    device.finish()
    assert pool.tobytes() == expected.tobytes()
    if pool_scales is not None:
        assert pool_scales.tobytes() == expected_scales.tobytes()


def random_embeddings(rng: np.random.Generator, hidden: int) -> Embeddings:
    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    positions = references.add_types(normal(40, hidden), normal(2, hidden))
    return Embeddings(
        normal(50, hidden), positions, normal(hidden), normal(hidden), 1e-12, sep_id=3
    )


def random_batch(rng: np.random.Generator, num_pairs: int) -> list[np.ndarray]:
    """Return text_ids, text_length and query_of_pair of queries of up to 8 slots."""
    num_queries = int(rng.integers(1, 4))
    return [
        rng.integers(0, 50, (num_queries, 8), dtype=np.int32),
        rng.integers(2, 9, num_queries, dtype=np.int32),
        rng.integers(0, num_queries, num_pairs, dtype=np.int32),
    ]


def assembled(
    device: Any,
    embeddings: Embeddings,
    batch: list[np.ndarray],
    stored: tuple[np.ndarray, np.ndarray | None],
    rows: np.ndarray,
    out_dtype: str,
    num_held: int | None = None,
) -> np.ndarray:
    """Return what the kernel writes, as float32; the rest of its results are as they must be.

    Args:
        num_held: records that lie in one place, the others being fresh; None: all of them.
    """
    records, scales = stored
    held, fresh = slice(num_held), slice(len(records) if num_held is None else num_held, None)
    hidden, num_pairs = records.shape[2], len(rows)
    num_slots, width = batch[0].shape[1] + records.shape[1] + 1, -(-hidden // 128) * 128
    out = np.full((num_pairs * num_slots + 2, width), 7, DTYPES[out_dtype])
    lengths, control = np.full(num_pairs + 2, 7, np.int32), np.zeros(2, np.int64)
    memory: Any = device.memory
    names = ("words", "positions", "norm_weight", "norm_bias")
    tables = DeviceEmbeddings(
        *(memory(getattr(embeddings, name)) for name in names),
        embeddings.epsilon,
        embeddings.sep_id,
    )
    types = {"token_dtype": records.dtype.name, "out_dtype": out_dtype}
    Assemble(device.library, tables, **types, width=width).enqueue(
        *map(memory, batch),
        memory(records[held].copy()),
        memory(rows),
        memory(out.view(np.uint16) if out_dtype == "bfloat16" else out),
        lengths=memory(lengths),
        control=memory(control),
        scores=(scores := memory(np.zeros(num_pairs, np.float32))),
        stream=device.stream,
        scales=None if scales is None else memory(scales[held].copy()),
        fresh=None if num_held is None else memory(records[fresh].copy()),
        fresh_scales=None if scales is None or num_held is None else memory(scales[fresh].copy()),
    )
    device.finish()
    assert control.tolist() == [scores.address, num_pairs]
    known = (batch[2] >= 0) & (batch[2] < len(batch[1]))
    assert lengths[:-2].tolist() == np.where(known, batch[1][batch[2] * known], 0).tolist()
    assert lengths[-2:].tolist() == [7, 7]
    assert (out[-2:] == 7).all()
    assert (out[:-2, hidden:] == 0).all()
    return out[:-2, :hidden].astype(np.float32).reshape(num_pairs, num_slots, hidden)


DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # half a unit in the last place


@a_few
@given(
    seed=st.integers(0, 2**32 - 1),
    token_dtype=st.sampled_from(["float16", "int8"]),
    out_dtype=st.sampled_from(["float16", "bfloat16"]),
    num_tokens=st.integers(1, 9),
    hidden=st.sampled_from([16, 48, 384, 768]),
    num_pairs=st.integers(1, 5),
    num_held=st.sampled_from([None, 1, 3]),
)
def test_assemble(
    device: Any,
    seed: int,
    token_dtype: str,
    out_dtype: str,
    num_tokens: int,
    hidden: int,
    num_pairs: int,
    num_held: int | None,
) -> None:
    rng = np.random.default_rng(seed)
    embeddings, batch = random_embeddings(rng, hidden), random_batch(rng, num_pairs)
    stored = tokens_of(rng, (4, num_tokens, hidden), token_dtype)
    rows = rng.integers(0, 4, num_pairs, dtype=np.int32)
    found = assembled(device, embeddings, batch, stored, rows, out_dtype, num_held)
    expected = references.assemble(*batch, stored[0], rows, embeddings, scales=stored[1])
    np.testing.assert_allclose(found, expected, rtol=ROUNDING[out_dtype], atol=1e-4)


@pytest.mark.parametrize("num_held", [None, 2])
def test_indices_outside_their_tables_are_nan_and_touch_nothing_else(
    device: Any, num_held: int | None
) -> None:
    rng = np.random.default_rng(0)
    embeddings, stored = random_embeddings(rng, 16), tokens_of(rng, (4, 3, 16), "float16")
    ids = rng.integers(0, 50, (3, 8), dtype=np.int32)
    lengths = np.array([5, 8, 38], np.int32)  # 38 + 3 lies past the 40 positions
    ids[1, 2], ids[1, 6] = 50, -1
    queries = np.array([0, 1, 2, 3, -1, 0, 0], np.int32)
    rows = np.array([0, 1, 2, 3, 0, -1, 4], np.int32)
    batch = [ids, lengths, queries]
    found = assembled(device, embeddings, batch, stored, rows, "float16", num_held)
    is_nan = np.isnan(found).all(axis=2)
    assert (is_nan == np.isnan(found).any(axis=2)).all()
    expected = np.zeros((7, 12), bool)
    expected[1, [2, 6]] = True
    expected[2, 10:] = True
    expected[3:5] = True
    expected[5:, 8:11] = True
    np.testing.assert_array_equal(is_nan, expected)
    right = references.assemble(ids[:1], lengths[:1], queries[:1], stored[0], rows[:1], embeddings)
    np.testing.assert_allclose(found[0], right[0], rtol=2.0**-11, atol=1e-4)
