"""The pretended devices run kernels as a GPU would, and find what a GPU would not tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edje.arrays import DeviceArray
from edje.kernels.launch import KernelLibrary
from edje.kernels.records import GatherTokens
from edje.kernels.variant import Parameter, Variant
from interpreted_kernels import Interpreter
from launches import VARIANTS
from recording_device import RecordingDevice, RecordingModule, RecordingStream

TILE = "tensordesc<fp16[16,32]>"
OUT = Parameter("out", "*fp32", written=True)
NOTHING = np.zeros((1, 1, 8), np.float16)
CONTROL = Parameter("control", "*i64")


def odd(function: str, *parameters: Parameter, **constants: int) -> Variant:
    return Variant(function, "odd_kernels", function, parameters, constants)


FILL = odd("fill", OUT, Parameter("first", "i32"), COUNT=16)
READS = odd("fill", Parameter("out", "*fp32"), Parameter("first", "i32"), COUNT=16)
KEEP = odd(
    "keep_address",
    Parameter("control", "*i64", written=True),
    Parameter("scores", "i64", written=True),
)
THERE = odd("fill_there", CONTROL, COUNT=16)
COPY = odd(
    "copy_tile",
    *(Parameter("source", TILE), Parameter("out", TILE, written=True)),
    *(Parameter("row", "i32"), Parameter("column", "i32")),
)


@pytest.fixture
def device(interpreted: Interpreter, monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingDevice]:
    for kernel in (FILL, KEEP, THERE, COPY):
        monkeypatch.setitem(VARIANTS, kernel.name, kernel)
    opened = RecordingDevice(5, kernels=interpreted)
    with opened.current():
        yield opened
    opened.close()


def enqueue(device: RecordingDevice, stream: RecordingStream, kernel: Variant, *given: Any) -> None:
    """Launch one program of a kernel that no release has."""
    module = RecordingModule(device, kernel.name).kernel(kernel.function)
    how: dict[str, Any] = {"grid": (1, 1, 1), "block": (128, 1, 1), "shared_bytes": 0}
    module.launch(stream, arguments=given, **how)


def wait_for(device: RecordingDevice, stream: RecordingStream) -> None:
    event = device.event()
    stream.record(event)
    event.synchronize()


@pytest.mark.parametrize("first", [5, -1])
def test_a_kernel_that_writes_beside_an_array_is_named(
    interpreted: Interpreter, first: int
) -> None:
    out = np.zeros(20, np.float32)
    with pytest.raises(AssertionError, match="fill wrote beside out"):
        interpreted.run(FILL, 1, {"out": out, "first": first})
    filled = interpreted.run(FILL, 1, {"out": out, "first": 2})["out"]
    assert filled.tolist() == [0] * 2 + [1] * 16 + [0] * 2
    assert not out.any()


def test_a_kernel_that_writes_what_it_says_it_reads_is_named(interpreted: Interpreter) -> None:
    with pytest.raises(AssertionError, match="fill wrote to out, which it only reads"):
        interpreted.run(READS, 1, {"out": np.zeros(20, np.float32), "first": 0})


def test_an_address_of_nothing_is_named(interpreted: Interpreter) -> None:
    with pytest.raises(AssertionError, match="fill: out points to no array: 0x1000"):
        interpreted.launch(FILL, (1,), [np.uint64(4096), np.int32(0)])


def test_a_kernel_that_kills_the_interpreter_is_named_and_the_next_one_runs(
    interpreted: Interpreter,
) -> None:
    with pytest.raises(AssertionError, match="fill touched memory that is nobody's"):
        interpreted.run(FILL, 1, {"out": np.zeros(20, np.float32), "first": 2**31 - 99})
    assert interpreted.run(FILL, 1, {"out": np.zeros(16, np.float32), "first": 0})["out"].all()


def test_what_a_launch_did_wrong_is_told_with_the_races(device: RecordingDevice) -> None:
    out, stream = device.memory(8, np.dtype(np.float32)).view((8,)), device.stream()
    enqueue(device, stream, FILL, np.uint64(out.address), np.int32(0))
    with pytest.raises(AssertionError, match="fill wrote beside memory 0"):
        wait_for(device, stream)
    assert device.races == ["fill wrote beside memory 0"]


def tiles(device: RecordingDevice, *arrays: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
    """Yield each array in device memory, and its values there."""
    for array in arrays:
        buffer = device.memory(array.size, array.dtype)
        buffer.memory[:] = array.ravel()
        yield buffer.view(array.shape), buffer.memory.reshape(array.shape)


@pytest.mark.parametrize("apart", [1, 3])
def test_descriptors_move_tiles_and_nothing_past_the_array(
    device: RecordingDevice, apart: int
) -> None:
    """Rows may be `apart`: every third is the array, what lies between is somebody else's."""
    rng, stream = np.random.default_rng(apart), device.stream()
    given = rng.integers(0, 99, (24 * apart, 64)).astype(np.float16)
    (source, _), (out, found) = tiles(device, given, np.zeros_like(given))
    rows = (24, 64)
    maps: list[Any] = []
    for array in (source, out):
        part = DeviceArray(array.address, rows, array.dtype)
        maps += [device.tensor_map(part, (16, 32), row_stride=64 * apart)]
        maps += [*np.int32(rows), np.int64(64 * apart), np.int64(1)]
    enqueue(device, stream, COPY, *maps, np.int32(16), np.int32(32))
    wait_for(device, stream)
    expected = np.zeros_like(given)
    expected[16 * apart :: apart, 32:] = given[16 * apart :: apart, 32:] + 1
    np.testing.assert_array_equal(found, expected)
    assert device.races == []


def test_a_map_of_another_shape_than_passed_is_refused(device: RecordingDevice) -> None:
    ((array, _),) = tiles(device, np.zeros((16, 32), np.float16))
    maps = [device.tensor_map(array, (16, 32)), *np.int32((16, 32)), *np.int64((32, 1))]
    wrong = [maps[0], np.int32(17), *maps[2:]]
    with pytest.raises(AssertionError, match="copy_tile: out maps"):
        enqueue(device, device.stream(), COPY, *maps, *wrong, np.int32(0), np.int32(0))


def test_addresses_in_memory_are_real_and_seen_by_who_passes_them_on(
    device: RecordingDevice,
) -> None:
    stream, copies = device.stream(), device.stream()
    control = device.memory(2, np.dtype(np.int64)).view((2,))
    scores = device.memory(16, np.dtype(np.float32))
    pinned = device.pinned(16, np.dtype(np.float32))
    address = np.int64(scores.view((16,)).address)
    enqueue(device, stream, KEEP, np.uint64(control.address), address)
    enqueue(device, stream, THERE, np.uint64(control.address))
    wait_for(device, stream)
    copies.download(pinned, scores, 16)
    wait_for(device, copies)
    assert pinned.view((16,)).tolist() == [1] * 16
    assert device.races == []
    enqueue(device, stream, KEEP, np.uint64(control.address), address)
    copies.download(pinned, scores, 16)
    assert device.races == ["download of memory 1 reads memory 1, unordered to keep_address"]
    device.races.clear()


def test_a_graph_runs_its_kernels_again_on_what_lies_there_now(device: RecordingDevice) -> None:
    gather = GatherTokens(KernelLibrary(device, (9, 0)), token_dtype="float16", row_dtype="int32")
    stream, row = device.stream(), device.pinned(1, np.dtype(np.int32))
    records, out = tiles(device, np.arange(24, dtype=np.float16).reshape(3, 1, 8), NOTHING)
    rows = device.mirror(row)
    arrays = records[0], rows.view((1,)), out[0]
    graph = device.capture(lambda on: gather.enqueue(*arrays, stream=on), stream)
    assert (out[1] == NOTHING).all()
    for place in (2, 1):
        row.view((1,))[0] = place
        stream.upload(rows, row, 1)
        graph.launch(stream)
        wait_for(device, stream)
        assert out[1].tolist() == records[1][place : place + 1].tolist()
    graph.close()
    assert device.races == []


def test_kernels_on_two_streams_need_an_event_between_them(device: RecordingDevice) -> None:
    first, second = device.stream(), device.stream()
    out = device.memory(16, np.dtype(np.float32)).view((16,))
    given = np.uint64(out.address), np.int32(0)
    event = device.event()
    enqueue(device, first, FILL, *given)
    first.record(event)
    second.wait(event)
    enqueue(device, second, FILL, *given)
    assert device.races == []
    enqueue(device, first, FILL, *given)
    assert device.races == ["fill writes memory 0, unordered to fill"]
    device.races.clear()
