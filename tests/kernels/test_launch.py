"""Kernels are chosen for the GPU, loaded once, and passed what the manifest says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edje.errors import EngineError
from edje.kernels.launch import KernelLibrary, LoadedKernel, choose_cubin
from edje.kernels.manifest import CUBINS, read_manifest
from edje.kernels.variant import Variant
from edje.kernels.variants import all_variants
from launches import VARIANTS, Launch, NotedKernels, bind, fake_memory
from recording_device import RecordingDevice

NAME = "gather_tokens_int8_by_int64"
MAPPED = "product_tma_float16_exact_128x64x64"
SIZES = {"i32": 4, "i64": 8, "fp32": 4, "map": 128}
VALUES = {
    "tokens": 0x7F0000000010,
    "scales": 0x7F0000001002,
    "rows": 0x7F0000002008,
    "out_tokens": 0x7F0000003000,
    "out_scales": 0x7F0000004004,
    "num_records": 2**40,
    "record_vectors": 1536,
    "num_scales": 64,
}


def load(name: str = NAME) -> tuple[RecordingDevice, LoadedKernel]:
    device = RecordingDevice(0, kernels=NotedKernels())
    return device, KernelLibrary(device, (9, 0)).kernel(name)


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [
        ((8, 0), "8.0"),
        ((8, 6), "8.6"),
        ((8, 7), "8.6"),
        ((8, 9), "8.9"),
        ((9, 0), "9.0"),
        ((10, 0), "10.0"),
        ((10, 3), "10.0"),
        ((12, 1), "12.0"),
    ],
)
def test_the_cubin_is_the_latest_that_runs_on_the_gpu(
    capability: tuple[int, int], chosen: str
) -> None:
    cubin = choose_cubin(read_manifest().kernels[NAME], capability)
    assert cubin.compute_capability == chosen


def test_a_cubin_for_one_very_chip_runs_on_no_other() -> None:
    entry = read_manifest().kernels[MAPPED]
    exact = {cubin.compute_capability: cubin.exact for cubin in entry.cubins}
    assert exact == {"9.0": True, "10.0": True, "12.0": False}
    assert choose_cubin(entry, (9, 0)).compute_capability == "9.0"
    assert choose_cubin(entry, (12, 1)).compute_capability == "12.0"
    with pytest.raises(EngineError, match=r"compute capability 10\.3, only for 9\.0, 10\.0"):
        choose_cubin(entry, (10, 3))
    capabilities = [(8, 9), (9, 0), (10, 0), (10, 3), (12, 1)]
    device = RecordingDevice(0, kernels=NotedKernels())
    runs = [KernelLibrary(device, capability).has(MAPPED) for capability in capabilities]
    assert runs == [False, True, True, False, True]
    assert not KernelLibrary(device, (9, 0)).has("product")


@pytest.mark.parametrize("capability", [(7, 5), (11, 0), (13, 0)])
def test_a_gpu_without_kernels_is_named(capability: tuple[int, int]) -> None:
    with pytest.raises(EngineError, match=rf"{capability[0]}\.{capability[1]}, only for 8\.0"):
        choose_cubin(read_manifest().kernels[NAME], capability)


def test_a_kernel_is_loaded_once_and_launched_as_the_manifest_says() -> None:
    device = RecordingDevice(0, kernels=NotedKernels())
    library = KernelLibrary(device, (8, 9))
    assert device.loaded == []
    name = "gather_tokens_float16_by_int32"
    kernel = library.kernel(name)
    assert library.kernel(name) is kernel
    assert device.loaded == [(CUBINS / f"{name}.sm_89.cubin").read_bytes()]
    values = {"tokens": 16, "rows": 32, "out_tokens": 48, "num_records": 7, "record_vectors": 5}
    with device.current():
        kernel.launch(stream := device.stream(), 3, **values)
    arguments = (*map(np.uint64, (16, 32, 48)), np.int64(7), np.int32(5))
    shared_bytes = kernel.cubin.shared_bytes
    how = ((3, 1, 1), (128, 1, 1), shared_bytes, (*arguments, np.uint64(0), np.uint64(0)))
    assert device.launches == [Launch(name, "gather_tokens", stream, *how)]


def mapped_type(descriptor: str) -> str:
    """Return a NumPy type of the size of a descriptor's elements."""
    element = descriptor.removeprefix("tensordesc<").partition("[")[0]
    return "float16" if element in ("fp16", "bf16") else "int8"


@pytest.mark.parametrize("variant", all_variants(), ids=lambda variant: variant.name)
def test_the_arguments_have_the_sizes_of_the_parameters(variant: Variant) -> None:
    device = RecordingDevice(0, kernels=NotedKernels())
    major, _, minor = variant.capabilities[-1].partition(".")
    kernel = KernelLibrary(device, (int(major), int(minor))).kernel(variant.name)
    entry = read_manifest().kernels[variant.name]
    values: dict[str, Any] = {
        item.name: fake_memory(16 * place, (256, 256), mapped_type(item.type))
        if item.type.startswith("tensordesc")
        else 16 * place
        for place, item in enumerate(variant.parameters, 1)
    }
    arguments = kernel.arguments(**dict(reversed(values.items())))
    types = entry.passed_types()
    assert [item.nbytes for item in arguments] == [SIZES.get(kind, 8) for kind in types]
    for argument, kind in zip(arguments, types, strict=True):
        assert isinstance(argument, np.uint64) == kind.startswith("*")
        assert isinstance(argument, np.float32) == (kind == "fp32")
    bound = bind(variant, arguments)
    for name, value in values.items():
        found = bound[name]
        assert found == value if isinstance(value, int) else found.address == value.address


def test_an_array_of_rows_becomes_a_map_its_shape_and_strides() -> None:
    device, kernel = load(MAPPED)
    rows = fake_memory(64, (300, 384), "float16")
    values: dict[str, Any] = {"weight": rows, "out": rows, "x": (rows, 80 * 384), "bias": 16}
    sizes = {"control": 8, "rows_per_pair": 1, "num_out": 384, "num_in": 384}
    bound = bind(VARIANTS[MAPPED], kernel.arguments(**values, **sizes))
    assert (bound["x"].shape, bound["x"].strides) == ((300, 384), (80 * 384, 1))
    assert (bound["x"].block, bound["weight"].block) == ((128, 64), (64, 64))
    assert (bound["weight"].strides, bound["out"].block) == ((384, 1), (128, 64))
    assert bound["x"].swizzle == 3  # 128 bytes
    assert bound["x"].element == 6  # float16
    wrong: dict[str, Any] = {
        "x": (rows, 100 * 384 + 4),
        "weight": fake_memory(64, (300, 384), "float32"),
        "out": 64,
        "bias": rows,
    }
    with pytest.raises(EngineError) as raised:
        kernel.arguments(**{**values, **sizes, **wrong})
    assert [fault.split(":")[0] for fault in raised.value.faults] == ["x", "weight", "bias", "out"]
    assert device.launches == []


def test_wrong_names_are_named() -> None:
    _, kernel = load()
    values = {**VALUES, "row": 1}
    del values["rows"]
    with pytest.raises(EngineError, match=r"missing \['rows'\], unknown \['row'\]"):
        kernel.arguments(**values)


def test_all_values_that_do_not_fit_are_named_at_once() -> None:
    device, kernel = load()
    wrong = {"tokens": 8, "rows": 0, "num_records": 2**63, "record_vectors": 2**31}
    with pytest.raises(EngineError) as raised:
        kernel.launch(None, 1, **{**VALUES, **wrong})
    assert [fault.split(":")[0] for fault in raised.value.faults] == list(wrong)
    assert raised.value.faults[0] == "tokens: got 8, expected an address that 16 divides"
    assert device.launches == []


@given(st.integers(-(2**33), 2**33), st.sampled_from(["num_scales", "record_vectors"]))
def test_32_bit_values_are_passed_whole_or_refused(value: int, name: str) -> None:
    _, kernel = load()
    if -(2**31) <= value < 2**31:
        arguments = kernel.arguments(**{**VALUES, name: value})
        places = [item.name for item in read_manifest().kernels[NAME].parameters]
        assert int(arguments[places.index(name)]) == value
    else:
        with pytest.raises(EngineError, match=name):
            kernel.arguments(**{**VALUES, name: value})


def test_a_fraction_is_no_integer() -> None:
    _, kernel = load()
    with pytest.raises(EngineError, match=r"num_scales: got 1\.5"):
        kernel.arguments(**{**VALUES, "num_scales": 1.5})


def test_an_unknown_kernel_is_named() -> None:
    with pytest.raises(EngineError, match="'gather'"):
        KernelLibrary(RecordingDevice(0), (9, 0)).kernel("gather")


@pytest.mark.parametrize(("damage", "fault"), [(b"\0", "is damaged"), (None, "cannot be read")])
def test_a_damaged_or_missing_cubin_is_refused(
    tmp_path: Path, damage: bytes | None, fault: str
) -> None:
    folder = shutil.copytree(CUBINS, tmp_path / "cubins")
    path = folder / f"{NAME}.sm_90.cubin"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + damage + b"\0")
    library = KernelLibrary(RecordingDevice(0), (9, 0), folder=folder)
    with pytest.raises(EngineError, match=fault):
        library.kernel(NAME)


def test_nothing_at_run_time_imports_triton() -> None:
    code = (
        "import sys\n"
        "import edje.kernels.operations, edje.kernels.records, edje.kernels.references\n"
        "from edje.kernels.launch import KernelLibrary\n"
        "KernelLibrary(None, (9, 0))\n"
        "print([name for name in sys.modules if name.startswith('triton')])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
