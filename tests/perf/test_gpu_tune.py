"""`make tune` times every tile, refuses wrong ones, and writes a table that builds read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edje.errors import EdjeError
from edje.kernels import tuning
from edje.kernels.launch import KernelLibrary
from edje.perf import gpu_tune
from edje.perf.gpu_tune import Bench, table_of, tiles_of, tune, write_table
from recording_device import RecordingDevice


@pytest.fixture
def bench(interpreted: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(gpu_tune, "STEPS", (("qkv", 128, 128, "none"), ("ffn1", 128, 128, "exact")))
    monkeypatch.setattr(gpu_tune, "CALLS_A_GRAPH", 2)
    monkeypatch.setattr(gpu_tune, "NUM_ROUNDS", 1)
    device = RecordingDevice(None, kernels=interpreted)
    with device.current():
        yield Bench(device, KernelLibrary(device, (9, 0)), device.stream(), num_pairs=1)
    assert not device.races, device.races


@pytest.mark.parametrize("element", ["float16", "bfloat16"])
def test_every_tile_is_timed_and_the_fastest_is_written(
    bench: Bench, element: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {element: tune(bench, element, 60.0)}
    for step, times in measured[element].items():
        gelu = "exact" if step == "ffn1" else "none"
        assert set(times) == set(tiles_of(bench.library, element, gelu))
        assert all(us > 0 for us in times.values())
    kept = {"int8": {"qkv": "64x128x128"}}
    table = table_of(measured, "a pretended GPU", kept)
    assert table.tiles["int8"] == kept["int8"]
    write_table(tmp_path, "9.0", table)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.read_tuning.cache_clear()
    try:
        assert tuning.read_tuning("9.0").table == table
    finally:
        tuning.read_tuning.cache_clear()
    for step, tile in table.tiles[element].items():
        assert measured[element][step][tile] == min(measured[element][step].values())


def test_a_tile_that_computes_something_else_ends_the_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu_tune.TOLERANCE, "float16", 1e-9)
    with pytest.raises(EdjeError, match=r"the product \w+ of float16 differs from its reference"):
        tune(bench, "float16", 60.0)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_tune.main([]) == 2
    assert "make tune needs an NVIDIA GPU" in capsys.readouterr().err
