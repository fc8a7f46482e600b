"""An int8 store for engines that read float16: the dequantised values, and nothing else new."""

import numpy as np
import pytest

from edje import arrays
from edje.errors import StoreError
from edje.runtime.source import Float16Tokens, HeldTokens, float16_tokens
from edje.runtime.store import TokenStore
from edje.tokens import dequantize_tokens, quantize_tokens

NUM_TOKENS, HIDDEN = 3, 40
IDS = [f"img-{i}" for i in range(25)]
SIZES = {"num_tokens": NUM_TOKENS, "hidden": HIDDEN, "fingerprint_encoder": "f" * 64}
TOKENS = np.random.default_rng(0).standard_normal((25, NUM_TOKENS, HIDDEN)).astype(np.float16)


@pytest.fixture
def store(tmp_path):
    with TokenStore.create(tmp_path / "int8.store", dtype="int8", **SIZES) as store:
        store.append(IDS, TOKENS)
    with TokenStore.open(tmp_path / "int8.store") as store:
        yield store


@pytest.mark.parametrize("num_rows", [1, 2, 24])
def test_records_come_dequantised_in_any_order(store, num_rows):
    places = np.random.default_rng(num_rows).integers(0, len(IDS), num_rows)
    rows = store.rows([IDS[place] for place in places])
    out = np.full((num_rows, NUM_TOKENS, HIDDEN), np.nan, np.float16)
    source = Float16Tokens(store)
    source.prefetch(rows)
    assert source.read(rows, out) == []
    np.testing.assert_array_equal(out, dequantize_tokens(*quantize_tokens(TOKENS[places])))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 24, 25, 160])
def test_several_threads_dequantise_in_place_as_one_does(store, num_rows, monkeypatch):
    """The values lie in the last half of the memory that the tokens are written into."""
    monkeypatch.setattr(arrays, "BYTES_A_THREAD", NUM_TOKENS * HIDDEN * 2)
    places = np.random.default_rng(num_rows).integers(0, len(IDS), num_rows)
    rows = store.rows([IDS[place] for place in places])
    for _ in range(5):
        out = np.full((num_rows, NUM_TOKENS, HIDDEN), np.nan, np.float16)
        assert Float16Tokens(store).read(rows, out) == []
        np.testing.assert_array_equal(out, dequantize_tokens(*quantize_tokens(TOKENS[places])))


def test_held_records_come_as_they_are_in_the_store(store, monkeypatch):
    monkeypatch.setattr(arrays, "BYTES_A_THREAD", NUM_TOKENS * HIDDEN)
    rows = np.sort(store.rows(IDS))
    held = HeldTokens.read_from(store, rows, TOKENS.shape[1:], "int8")
    asked = np.random.default_rng(0).choice(rows, 60)
    out, scales = np.empty((60, *TOKENS.shape[1:]), np.int8), np.empty((60, NUM_TOKENS), np.float16)
    expected = out.copy(), scales.copy()
    store.read(asked, *expected)
    assert held.read(asked, out, scales) == []
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(scales, expected[1])


def test_a_float16_store_is_read_as_it_is(tmp_path):
    with TokenStore.create(tmp_path / "float16.store", **SIZES) as store:
        assert float16_tokens(store) is store


def test_damage_is_marked_or_raised_as_by_the_store(store):
    [segment] = sorted((store.path / "segments").iterdir())
    content = bytearray(segment.read_bytes())
    content[store.layout.offset(4) + 7] ^= 1
    segment.write_bytes(content)
    out = np.empty(TOKENS.shape, np.float16)
    [found] = Float16Tokens(store).read(store.rows(IDS), out, bad="mark")
    assert (found.position, found.id) == (4, "img-4")
    sound = np.arange(len(IDS)) != 4
    expected = dequantize_tokens(*quantize_tokens(TOKENS))
    np.testing.assert_array_equal(out[sound], expected[sound])
    with pytest.raises(StoreError, match="img-4"):
        Float16Tokens(store).read(store.rows(IDS), out)
