"""Stores whose records are holes: sound for whoever reads what was said would be read."""

from __future__ import annotations

import numpy as np
import pytest

from edje.perf import wide_store
from edje.perf.random_model import image_id
from edje.perf.wide_store import row_of, write_wide_store
from edje.runtime.store import TokenStore


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_known_records_and_holes_are_read_as_they_are(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(wide_store, "APPENDED_AT_ONCE", 64)
    tokens = np.arange(3 * 2 * 8).reshape(3, 2, 8).astype(dtype)
    scales = np.ones((3, 2), np.float16) if dtype == "int8" else None
    path = write_wide_store(tmp_path / "s", 300, tokens, scales, asked=[2, 250, 299])
    with TokenStore.open(path) as store:
        assert len(store) == 300
        numbers = np.array([2, 250, 299])
        rows = store.rows([image_id(number) for number in numbers.tolist()])
        assert rows.tolist() == row_of(numbers, 3, store.layout).tolist()
        out, out_scales = store.layout.buffers(3)
        store.read(rows, out, out_scales)
        assert np.array_equal(out[0], tokens[2])
        assert not out[1:].any()
        damaged = store.read(store.rows([image_id(7)]), out[:1], _first(out_scales), bad="mark")
        assert [bad.id for bad in damaged] == [image_id(7)]


def _first(scales):
    return None if scales is None else scales[:1]


def test_a_store_of_holes_takes_hardly_any_space(tmp_path):
    path = write_wide_store(tmp_path / "s", 50_000)
    segments = list((path / "segments").iterdir())
    assert sum(file.stat().st_size for file in segments) > 50_000 * 49_152
    assert sum(file.stat().st_blocks * 512 for file in segments) < 1 << 20
