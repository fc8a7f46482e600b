"""The benchmark of the token store on a few small records: what is compared, judged and said."""

import json
from pathlib import Path

import numpy as np
import pytest

from edje.errors import EdjeError
from edje.perf import bench_store as bench
from edje.runtime.store import TokenStore

SIZES: dict[str, object] = {
    "NUM_TOKENS": 2,
    "HIDDEN": 8,
    "NUM_RECORDS": 60,
    "GATHERED": 8,
    "NUM_SETS": 3,
    "NUM_DIRECT_ROUNDS": 1,
    "LEAST_OF_LOOP": {2: 0.0, 5: 0.95},
    "NUM_IDS": 300,
    "NUM_RESOLVED": 40,
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SIZES.items():
        monkeypatch.setattr(bench, name, value)


def test_every_contestant_is_timed_and_said(tmp_path: Path) -> None:
    result = bench.measure(4, tmp_path, lambda line: None)
    for dtype in ("float16", "int8"):
        found = result["gathers"][dtype]
        runs = {timing["name"]: timing["num_runs"] for timing in found["records"]}
        assert runs.pop("direct") == 1
        assert set(runs.values()) == {4}
        assert {bench.COPY, bench.MAPPED, bench.VERIFIED, bench.RESIDENT} <= runs.keys()
    assert result["ids"]["num_ids"] == 300
    cases = [(row["records"], row["buffer"]) for row in result["sizes"]]
    assert cases == [(2, "aligned"), (2, "np.empty"), (5, "aligned"), (5, "np.empty")]
    assert "float16 verified" in bench.summary(result)
    assert "5 records, np.empty" in bench.summary(result)
    json.dumps(result)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_wrong_record_ends_the_benchmark(dtype: str, tmp_path: Path) -> None:
    tokens, scales = bench.random_records(dtype, 20)
    sets = [np.arange(8), np.arange(8, 16)]
    out, out_scales = np.zeros_like(tokens[:8]), None if scales is None else scales[:8].copy()
    bench.write_store(tmp_path / "s", tokens, scales).close()
    with TokenStore.open(tmp_path / "s") as store:
        gathers = {"verified": bench.reading(store, out, out_scales)}
        assert bench.timed(gathers, sets, out, tokens, 1)["verified"].num_runs == 1
        tokens[9] = 0
        with pytest.raises(EdjeError, match=r"verified: set 1 differs"):
            bench.timed(gathers, sets, out, tokens, 1)


def test_the_plain_loop_verifies_as_the_store_does(tmp_path: Path) -> None:
    bench.write_store(tmp_path / "s", np.ones((3, 2, 8), np.float16)).close()
    with TokenStore.open(tmp_path / "s") as store:
        loop, out = bench.PlainLoop(store), np.empty((2, 2, 8), np.float16)
        loop.read(np.array([2, 0]), out)
        [file] = (tmp_path / "s/segments").iterdir()
        content = bytearray(file.read_bytes())
        content[store.layout.offset(2)] ^= 1
        file.write_bytes(content)
        with pytest.raises(EdjeError, match="record 2 is not whole"):
            loop.read(np.array([2, 0]), out)


def test_what_falls_short_is_named() -> None:
    ratios = {"verified / memcpy": 0.59, "unverified / memcpy": 0.8}
    ratios["verified / np.load mmap [rows]"] = 1.2
    ids = {"resolve_ms": 25.1, "open_s": 2.0, "open_mb": 61.0}
    sizes = [{"records": 5, "buffer": "np.empty", "ratio": at} for at in (0.94, 0.95)]
    result = {"gathers": {"float16": {"ratios": ratios}}, "ids": ids, "sizes": sizes}
    faults = list(bench.faults_of(result))
    assert faults == [
        "float16: verified has 0.59 times the speed of memcpy, expected 0.6",
        "5 records, np.empty: the store has 0.94 times the speed of a plain loop, expected 0.95",
        "ids: resolve_ms is 25.1, expected at most 25.0",
        "ids: open_mb is 61.0, expected at most 60.0",
    ]


def test_the_million_ids_lie_where_their_numbers_say(tmp_path: Path) -> None:
    path = bench.write_wide_store(tmp_path / "ids", 300)
    found = bench.resolve(path, 50)
    assert (found["num_ids"], found["num_resolved"]) == (300, 50)
    with TokenStore.open(path) as store:
        assert store.ids()[299] == "images/0000/0000299.jpg"
