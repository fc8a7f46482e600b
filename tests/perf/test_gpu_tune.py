"""`make tune` times every tile, refuses wrong ones, and writes a table that builds read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edje.errors import EdjeError
from edje.kernels import tuning
from edje.kernels.launch import KernelLibrary
from edje.kernels.layer_variants import TMA_TILES
from edje.kernels.layer_variants8 import TMA_TILES8
from edje.perf import gpu_tune, tuned_products
from edje.perf.gpu_tune import table_of, try_fused, tune, with_fused, write_table
from edje.perf.tuned_products import Place
from recording_device import RecordingDevice


@pytest.fixture
def bench(interpreted: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(gpu_tune, "STEPS", (("qkv", 128, 128, "none"), ("ffn1", 128, 128, "exact")))
    monkeypatch.setattr(gpu_tune, "CALLS_A_GRAPH", 2)
    monkeypatch.setattr(gpu_tune, "NUM_ROUNDS", 1)
    device = RecordingDevice(None, kernels=interpreted)
    with device.current():
        yield Place(device, KernelLibrary(device, (9, 0)), device.stream(), num_pairs=1)
    assert not device.races, device.races


TILES = {
    "float16": {"qkv": set(TMA_TILES), "ffn1": set(TMA_TILES)},
    "bfloat16": {"qkv": set(TMA_TILES), "ffn1": set(TMA_TILES)},
    "int8": {"qkv": set(TMA_TILES8), "ffn1": {"64x128x128", "128x128x128"}},
    "fp8": {"qkv": set(TMA_TILES8), "ffn1": {"64x128x128", "128x128x128"}},
}


@pytest.mark.parametrize("element", TILES)
def test_every_tile_is_timed_and_the_fastest_is_written(
    bench: Place, element: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {element: tune(bench, element, 60.0)}
    assert {step: set(times) for step, times in measured[element].items()} == TILES[element]
    assert all(us > 0 for times in measured[element].values() for us in times.values())
    kept = {"another": {"qkv": "64x128x128"}}
    table = table_of(measured, "a pretended GPU", kept)
    assert table.tiles["another"] == kept["another"]
    write_table(tmp_path, "9.0", table)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.read_tuning.cache_clear()
    try:
        assert tuning.read_tuning("9.0").table == table
    finally:
        tuning.read_tuning.cache_clear()
    for step, tile in table.tiles[element].items():
        assert measured[element][step][tile] == min(measured[element][step].values())


@pytest.mark.parametrize("element", ["float16", "int8"])
def test_a_tile_that_computes_something_else_ends_the_run(
    bench: Place, monkeypatch: pytest.MonkeyPatch, element: str
) -> None:
    monkeypatch.setattr(tuned_products, "TOLERANCE", dict.fromkeys(tuned_products.TOLERANCE, 1e-9))
    with pytest.raises(
        EdjeError, match=rf"the product \w+ of {element} differs from its reference"
    ):
        tune(bench, element, 60.0)


def test_what_a_gpu_has_no_products_of_is_left_out(
    interpreted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_tune, "STEPS", (("qkv", 128, 128, "none"),))
    device = RecordingDevice(None, kernels=interpreted)
    device.compute_capability = (8, 0)
    with device.current():
        place = Place(device, KernelLibrary(device, (8, 0)), device.stream(), num_pairs=1)
        assert tune(place, "fp8", 60.0) == {}


def test_a_product_with_its_norm_is_timed_beside_what_it_would_replace(
    interpreted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_tune, "STEPS", (("ffn2", 128, 384, "none"), ("qkv", 128, 128, "none")))
    monkeypatch.setattr(gpu_tune, "CALLS_A_GRAPH", 2)
    monkeypatch.setattr(gpu_tune, "NUM_ROUNDS", 1)
    device = RecordingDevice(None, kernels=interpreted)
    with device.current():
        place = Place(device, KernelLibrary(device, (9, 0)), device.stream(), num_pairs=1)
        tiles = {"ffn2": "64x64x64", "qkv": "64x64x64"}
        timed = try_fused(place, "float16", tiles, 60.0)
    assert not device.races, device.races
    assert {step: set(times) for step, times in timed.items()} == {
        "ffn2": {"64x64x64", "cuda"},
        "norm": {"norm"},
    }
    assert all(us > 0 for times in timed.values() for us in times.values())


def test_a_gpu_without_such_a_kernel_times_none(interpreted: Any) -> None:
    device = RecordingDevice(None, kernels=interpreted)
    place = Place(device, KernelLibrary(device, (8, 0)), device.stream(), num_pairs=1)
    assert try_fused(place, "float16", {"ffn2": "64x64x64"}, 1.0) == {}


@pytest.mark.parametrize(("fused_us", "chosen"), [(49.9, ("ffn2",)), (50.0, ())])
def test_a_product_with_its_norm_is_chosen_only_where_it_was_measured_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused_us: float, chosen: tuple[str, ...]
) -> None:
    plain = table_of({"float16": {"ffn2": {"a": 40.0, "b": 38.0}}}, "a pretended GPU")
    timed = {"float16": {"ffn2": {"b": 38.0, "cuda": fused_us}, "norm": {"norm": 12.0}}}
    table = with_fused(plain, timed)
    assert table.tiles == {"float16": {"ffn2": "b"}}
    assert table.fused.get("float16", ()) == chosen
    assert table.measured_us["float16"]["ffn2"] == {"a": 40.0, "b": 38.0, "cuda": fused_us}
    write_table(tmp_path, "9.0", table)
    write_table(tmp_path, "8.0", replace(plain, fused={"float16": ("ffn2",)}))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.read_tuning.cache_clear()
    try:
        assert tuning.read_tuning("9.0").table == table
        with pytest.raises(EdjeError, match="ffn2 with residual and norm in one was not measured"):
            tuning.read_tuning("8.0")
    finally:
        tuning.read_tuning.cache_clear()


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_tune.main([]) == 2
    assert "make tune needs an NVIDIA GPU" in capsys.readouterr().err
