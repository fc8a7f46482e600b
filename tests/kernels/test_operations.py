"""The typed calls check their arrays, count programs, and pass on what the kernel asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edje.arrays import DeviceArray
from edje.errors import EngineError
from edje.kernels.launch import KernelLibrary
from edje.kernels.manifest import CUBINS
from edje.kernels.operations import Assemble, DeviceEmbeddings
from edje.kernels.records import GatherTokens, ScatterTokens
from edje.kernels.variant import COMPUTE_CAPABILITIES
from launches import Launch, NotedKernels, fake_memory
from recording_device import RecordingDevice

RECORDS = fake_memory(1 << 20, (1000, 64, 384), "int8")
SCALES = fake_memory(2 << 20, (1000, 64), "float16")


@pytest.fixture
def device() -> Iterator[RecordingDevice]:
    opened = RecordingDevice(0, kernels=NotedKernels())
    with opened.current():
        yield opened


@pytest.fixture
def library(device: RecordingDevice) -> KernelLibrary:
    return KernelLibrary(device, (9, 0))


def passed(launch: Launch, kernel: str) -> dict[str, float]:
    """Return the arguments of a recorded launch of this kernel by name."""
    assert launch.name == kernel
    return launch.values


def gather_arrays(**changes: DeviceArray | None) -> dict[str, Any]:
    arrays: dict[str, Any] = {
        "records": RECORDS,
        "rows": fake_memory(4096, (32,), "int64"),
        "out": fake_memory(3 << 20, (32, 64, 384), "int8"),
        "scales": SCALES,
        "out_scales": fake_memory(4 << 20, (32, 64), "float16"),
    }
    return {**arrays, **changes}


def test_gather_launches_one_program_for_8_kb(
    device: RecordingDevice, library: KernelLibrary
) -> None:
    gather, stream = GatherTokens(library, token_dtype="int8"), device.stream()
    gather.enqueue(**gather_arrays(), stream=stream)
    (launch,) = device.launches
    assert (launch.grid, launch.stream) == ((32 * 3, 1, 1), stream)  # 24,576 bytes each
    values = passed(launch, "gather_tokens_int8_by_int64")
    assert values["num_records"] == 1000
    assert values["record_vectors"] * 16 == 64 * 384
    assert values["num_scales"] == 64
    assert [values[name] for name in ("tokens", "out_tokens")] == [1 << 20, 3 << 20]
    assert [values[name] for name in ("scales", "out_scales")] == [2 << 20, 4 << 20]


def test_gather_of_float16_has_no_scales(device: RecordingDevice, library: KernelLibrary) -> None:
    gather = GatherTokens(library, token_dtype="float16", row_dtype="int32")
    gather.enqueue(
        fake_memory(1 << 20, (5, 64, 384), "float16"),
        fake_memory(64, (2,), "int32"),
        fake_memory(2 << 20, (2, 64, 384), "float16"),
        stream=device.stream(),
    )
    (launch,) = device.launches
    assert launch.grid == (2 * 6, 1, 1)
    assert "scales" not in passed(launch, "gather_tokens_float16_by_int32")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"rows": fake_memory(4096, (32,), "int32")}, r"rows: got int32 \[32\], expected int64"),
        ({"rows": fake_memory(4096, (0,), "int64")}, "records, rows"),
        ({"out": fake_memory(16, (31, 64, 384), "int8")}, r"out: got int8 \[31, 64, 384\]"),
        ({"records": fake_memory(16, (9, 64, 384), "float16")}, "records: got float16"),
        ({"scales": None}, r"scales: got none, int8 tokens need float16 \[1000, 64\]"),
        ({"out_scales": fake_memory(16, (32, 63), "float16")}, "out_scales: got float16"),
        ({"out": fake_memory(24, (32, 64, 384), "int8")}, "out_tokens: got 24, expected an addr"),
    ],
)
def test_gather_refuses_what_does_not_fit(
    device: RecordingDevice, library: KernelLibrary, changes: dict[str, Any], fault: str
) -> None:
    gather = GatherTokens(library, token_dtype="int8")
    with pytest.raises(EngineError, match=fault):
        gather.enqueue(**gather_arrays(**changes), stream=None)
    assert device.launches == []


def test_gather_names_all_faults_at_once(library: KernelLibrary) -> None:
    odd = {
        "records": fake_memory(16, (9, 3, 5), "int8"),
        "out": fake_memory(16, (32, 3, 4), "int8"),
        "scales": fake_memory(16, (9, 4), "float16"),
    }
    with pytest.raises(EngineError) as raised:
        GatherTokens(library, token_dtype="int8").enqueue(**gather_arrays(**odd), stream=None)
    names = [fault.split(":")[0] for fault in raised.value.faults]
    assert names == ["out", "scales", "out_scales", "records"]
    assert raised.value.faults[-1] == "records: 15 bytes each, expected a multiple of 16"


def test_unknown_dtypes_are_refused(library: KernelLibrary) -> None:
    with pytest.raises(EngineError) as raised:
        GatherTokens(library, token_dtype="float32", row_dtype="uint32")
    assert len(raised.value.faults) == 2
    with pytest.raises(EngineError, match="scatter_tokens") as raised:
        ScatterTokens(library, token_dtype="float32", place_dtype="uint32")
    assert len(raised.value.faults) == 2


def scatter_arrays(**changes: DeviceArray | None) -> dict[str, Any]:
    arrays: dict[str, Any] = {
        "tokens": fake_memory(3 << 20, (32, 64, 384), "int8"),
        "places": fake_memory(4096, (32,), "int64"),
        "pool": RECORDS,
        "scales": fake_memory(4 << 20, (32, 64), "float16"),
        "pool_scales": SCALES,
    }
    return {**arrays, **changes}


def test_scatter_launches_one_program_for_8_kb(
    device: RecordingDevice, library: KernelLibrary
) -> None:
    scatter, stream = ScatterTokens(library, token_dtype="int8"), device.stream()
    scatter.enqueue(**scatter_arrays(), stream=stream)
    (launch,) = device.launches
    assert (launch.symbol, launch.stream) == ("scatter_tokens", stream)
    assert launch.grid == (32 * 3, 1, 1)  # 24,576 bytes each
    values = passed(launch, "scatter_tokens_int8_by_int64")
    assert values["num_records"] == 1000  # the pool's: places past it are skipped
    assert values["record_vectors"] * 16 == 64 * 384
    assert (values["num_scales"], values["places"]) == (64, 4096)
    assert [values[name] for name in ("tokens", "out_tokens")] == [3 << 20, 1 << 20]
    assert [values[name] for name in ("scales", "out_scales")] == [4 << 20, 2 << 20]


def test_scatter_of_float16_has_no_scales(device: RecordingDevice, library: KernelLibrary) -> None:
    scatter = ScatterTokens(library, token_dtype="float16", place_dtype="int32")
    scatter.enqueue(
        fake_memory(2 << 20, (2, 64, 384), "float16"),
        fake_memory(64, (2,), "int32"),
        fake_memory(1 << 20, (5, 64, 384), "float16"),
        stream=device.stream(),
    )
    (launch,) = device.launches
    assert launch.grid == (2 * 6, 1, 1)
    values = passed(launch, "scatter_tokens_float16_by_int32")
    assert values["num_records"] == 5
    assert "scales" not in values


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"places": fake_memory(16, (32,), "int32")}, r"places: got int32 \[32\], expected int64"),
        ({"places": fake_memory(16, (0,), "int64")}, "pool, places"),
        ({"tokens": fake_memory(16, (31, 64, 384), "int8")}, r"tokens: got int8 \[31, 64, 384\]"),
        ({"pool": fake_memory(16, (9, 64, 384), "float16")}, "pool: got float16"),
        ({"scales": None}, r"scales: got none, int8 tokens need float16 \[32, 64\]"),
        ({"pool_scales": fake_memory(16, (32, 64), "float16")}, "pool_scales: got float16"),
        ({"pool": fake_memory(24, (1000, 64, 384), "int8")}, "out_tokens: got 24, expected an ad"),
    ],
)
def test_scatter_refuses_what_does_not_fit(
    device: RecordingDevice, library: KernelLibrary, changes: dict[str, Any], fault: str
) -> None:
    scatter = ScatterTokens(library, token_dtype="int8")
    with pytest.raises(EngineError, match=fault):
        scatter.enqueue(**scatter_arrays(**changes), stream=None)
    assert device.launches == []


@pytest.mark.parametrize("capability", COMPUTE_CAPABILITIES)
@pytest.mark.parametrize("token_dtype", ["float16", "int8"])
@pytest.mark.parametrize("row_dtype", ["int32", "int64"])
def test_records_of_every_dtype_are_copied_on_every_gpu(
    device: RecordingDevice, capability: str, token_dtype: str, row_dtype: str
) -> None:
    major, _, minor = capability.partition(".")
    library = KernelLibrary(device, (int(major), int(minor)))
    GatherTokens(library, token_dtype=token_dtype, row_dtype=row_dtype)
    ScatterTokens(library, token_dtype=token_dtype, place_dtype=row_dtype)
    end = f"_tokens_{token_dtype}_by_{row_dtype}.sm_{capability.replace('.', '')}.cubin"
    expected = [(CUBINS / f"{kernel}{end}").read_bytes() for kernel in ("gather", "scatter")]
    assert device.loaded == expected


def embeddings(**changes: Any) -> DeviceEmbeddings:
    tables = {
        "words": fake_memory(1 << 20, (30522, 384), "float32"),
        "positions": fake_memory(1 << 24, (2, 512, 384), "float32"),
        "norm_weight": fake_memory(4096, (384,), "float32"),
        "norm_bias": fake_memory(8192, (384,), "float32"),
        "epsilon": 1e-12,
        "sep_id": 102,
    }
    return DeviceEmbeddings(**{**tables, **changes})


def batch_arrays(**changes: DeviceArray | None) -> dict[str, Any]:
    arrays: dict[str, Any] = {
        "text_ids": fake_memory(64, (2, 16), "int32"),
        "text_length": fake_memory(256, (2,), "int32"),
        "query_of_pair": fake_memory(512, (10,), "int32"),
        "records": RECORDS,
        "rows": fake_memory(1024, (10,), "int32"),
        "hidden_states": fake_memory(2048, (896, 384), "float16"),
        "lengths": fake_memory(4096, (12,), "int32"),
        "control": fake_memory(8192, (2,), "int64"),
        "scores": fake_memory(1 << 40, (10,), "float32"),
        "scales": SCALES,
    }
    return {**arrays, **changes}


def make_assemble(library: KernelLibrary) -> Assemble:
    tables = embeddings()
    return Assemble(library, tables, token_dtype="int8", out_dtype="float16", width=384)


def test_assemble_launches_a_program_for_four_slots(
    device: RecordingDevice, library: KernelLibrary
) -> None:
    assemble = make_assemble(library)
    assemble.enqueue(**batch_arrays(), stream=device.stream())
    (launch,) = device.launches
    assert launch.grid == (203, 1, 1)  # 810 slots
    values = passed(launch, "assemble_int8_to_float16_512")
    sizes = ("num_pairs", "num_queries", "text_slots", "num_tokens", "num_records", "vocab_size")
    assert [values[name] for name in sizes] == [10, 2, 16, 64, 1000, 30522]
    assert values["num_fresh"] == 0
    rest = ("max_positions", "sep_id", "hidden", "words", "scales", "rows", "hidden_states")
    assert [values[name] for name in rest] == [512, 102, 384, 1 << 20, 2 << 20, 1024, 2048]
    assert values["epsilon"] == np.float32(1e-12)
    rest = ("width", "lengths", "control", "scores")
    assert [values[name] for name in rest] == [384, 4096, 8192, 1 << 40]


def test_assemble_takes_the_smallest_kernel_that_holds_a_row(
    device: RecordingDevice, library: KernelLibrary
) -> None:
    for width in (640, 512):
        dtypes = {"token_dtype": "float16", "out_dtype": "bfloat16"}
        Assemble(library, embeddings(), **dtypes, width=width)
    files = [
        library.kernel(f"assemble_float16_to_bfloat16_{columns}").cubin.sha256
        for columns in (1024, 512)
    ]
    assert len(device.loaded) == len(set(files)) == 2


def test_tables_that_do_not_fit_are_named_at_once(library: KernelLibrary) -> None:
    wrong = embeddings(
        words=fake_memory(16, (99, 1032), "float32"),
        norm_weight=fake_memory(16, (1032,), "float32"),
        norm_bias=fake_memory(16, (1032,), "float16"),
    )
    with pytest.raises(EngineError) as raised:
        Assemble(library, wrong, token_dtype="int4", out_dtype="float32", width=1024)
    names = [fault.split(":")[0] for fault in raised.value.faults]
    assert names == ["token_dtype", "out_dtype", "positions", "norm_bias", "hidden", "width"]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"text_length": fake_memory(256, (3,), "int32")}, r"text_length: got int32 \[3\]"),
        ({"rows": fake_memory(256, (10,), "int64")}, "rows: got int64"),
        ({"scales": None}, "scales: got none"),
        ({"fresh": fake_memory(16, (2, 64, 383), "int8")}, r"fresh: got int8 \[2, 64, 383\]"),
        ({"fresh": fake_memory(16, (2, 64, 384), "int8")}, "fresh_scales: got none"),
        ({"hidden_states": fake_memory(16, (809, 384), "float16")}, r"hidden_states: got"),
        ({"hidden_states": fake_memory(16, (810, 384), "float32")}, r"expected float16"),
        ({"lengths": fake_memory(16, (9,), "int32")}, r"lengths: got int32 \[9\]"),
        ({"control": fake_memory(16, (2,), "int32")}, "control: got int32"),
        ({"scores": fake_memory(16, (9,), "float32")}, r"scores: got float32 \[9\], .* \[10\]"),
        ({"text_ids": fake_memory(16, (16,), "int32")}, r"expected \[Q, T\]"),
        ({"query_of_pair": fake_memory(16, (0,), "int32")}, "pairs: got 0 of 81 slots"),
    ],
)
def test_assemble_refuses_what_does_not_fit(
    device: RecordingDevice, library: KernelLibrary, changes: dict[str, Any], fault: str
) -> None:
    assemble = make_assemble(library)
    with pytest.raises(EngineError, match=fault):
        assemble.enqueue(**batch_arrays(**changes), stream=None)
    assert device.launches == []
