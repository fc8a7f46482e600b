"""Places and turns of `product_norm`: the source's own functions against the mathematical layout.

And the machine of threads sees what it is there for: each fault below is one line of the source.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import emulated_kernels
from edje.kernels import layer_references
from edje.kernels.cuda_variants import BLOCK_IN, COLUMNS, ROWS, STAGES, cuda_variants, shared_bytes
from launches import TensorMap

HALF, GROUP = COLUMNS // 2, ROWS // 2
VARIANT = next(each for each in cuda_variants() if not each.constants["BFLOAT16"])


@pytest.fixture(scope="module")
def source() -> ctypes.CDLL:
    """The library of the float16 kernel."""
    return emulated_kernels.library(VARIANT.name)


def test_the_threads_of_a_warpgroup_hold_every_sum_once(source: ctypes.CDLL) -> None:
    places = {
        (source.place_of_sum_row(thread, number), source.place_of_sum_column(thread, number))
        for thread in range(128)
        for number in range(HALF // 2)
    }
    assert places == {(row, column) for row in range(GROUP) for column in range(HALF)}


def test_four_lanes_hold_a_row_and_neighbours_hold_pairs(source: ctypes.CDLL) -> None:
    for thread in range(256):
        for number in range(0, HALF // 2, 2):
            row, column = (
                place(thread, number)
                for place in (source.place_of_sum_row, source.place_of_sum_column)
            )
            assert source.place_of_sum_row(thread, number + 1) == row
            assert source.place_of_sum_column(thread, number + 1) == column + 1
            # A warp has 16 rows; whoever shares a row is in one group of four lanes.
            assert row // 16 == thread % 128 // 32
            assert row % 8 == thread % 32 // 4
            assert column % 8 // 2 == thread % 4


def test_elements_of_a_block_lie_where_the_copy_engine_puts_them(source: ctypes.CDLL) -> None:
    box = ROWS * BLOCK_IN * 2
    found = {}
    for row in range(ROWS):
        for column in range(HALF):
            # Boxes follow each other; of a byte's address in a box, bits 4 to 6 are xored with
            # bits 7 to 9.
            plain = row * BLOCK_IN * 2 + column % BLOCK_IN * 2
            place = column // BLOCK_IN * box + (plain ^ (plain >> 7 & 7) << 4)
            assert source.place_of_element(row, column) == place
            found[place] = row, column
    assert len(found) == ROWS * HALF
    assert max(found) < (ROWS + COLUMNS) * BLOCK_IN * 2, "a block of the residual fits a stage"


def test_a_thread_reads_the_residual_of_its_own_sums(source: ctypes.CDLL) -> None:
    for thread in range(256):
        first = thread // 128 * GROUP
        for number in range(0, HALF // 2, 2):
            row = first + source.place_of_sum_row(thread, number)
            element = source.place_of_element(row, source.place_of_sum_column(thread, number))
            assert source.place_of_sum(thread, first, number) == element


def test_a_warp_reads_the_residual_from_every_bank_once(source: ctypes.CDLL) -> None:
    for number in range(0, HALF // 2, 2):
        words = {source.place_of_sum(lane, 0, number) // 4 % 32 for lane in range(32)}
        assert len(words) == 32


@given(block=st.integers(0, 226))
def test_a_descriptor_says_address_stride_and_swizzle(source: ctypes.CDLL, block: int) -> None:
    value = source.descriptor_of(block * 1024)
    fields = [(value >> low) & ((1 << width) - 1) for low, width in ((0, 14), (32, 14), (49, 3))]
    assert fields == [block * 64, 64, 0]  # in units of 16 bytes: where, 8 rows, no offset
    assert value >> 62 == 1  # the 128-byte swizzle


def test_the_source_needs_the_shared_memory_that_launches_ask_for(source: ctypes.CDLL) -> None:
    assert source.shared_bytes() == shared_bytes() <= 227 << 10


class Barrier:
    """An mbarrier as the PTX ISA has it: arrivals that are left, and a phase."""

    def __init__(self, count: int):
        self.count = self.left = count
        self.phase = 0

    def arrive(self) -> None:
        assert self.left > 0
        self.left -= 1
        if not self.left:
            self.left, self.phase = self.count, self.phase + 1

    def passes(self, parity: int) -> bool:
        """Tell whether a wait for this parity returns: the phase before the current has it."""
        return self.phase % 2 != parity


@settings(max_examples=50, deadline=None)
@given(items=st.integers(0, 20), warps=st.just(8), data=st.data())
def test_the_ring_neither_stops_nor_loses_an_item(
    items: int, warps: int, data: st.DataObject
) -> None:
    """One writer and eight warps in any order: the protocol at the head of the source."""
    full = [Barrier(1) for _ in range(STAGES)]
    empty = [Barrier(warps) for _ in range(STAGES)]
    held: list[int | None] = [None] * STAGES
    places = [0] * (warps + 1)  # the writer's comes last
    while min(places) < items:
        ready = []
        for who, item in enumerate(places):
            stage, phase = item % STAGES, item // STAGES % 2
            barrier, parity = (empty, phase ^ 1) if who == warps else (full, phase)
            if item < items and barrier[stage].passes(parity):
                ready.append(who)
        assert ready, f"nobody can go on: {places}"
        who = data.draw(st.sampled_from(ready))
        item, stage = places[who], places[who] % STAGES
        if who == warps:
            assert min(places[:warps]) > item - STAGES, "written before all have read"
            held[stage] = item
            full[stage].arrive()
        else:
            assert held[stage] == item, "read before it was written"
            empty[stage].arrive()
        places[who] += 1
    assert all(each.left == each.count for each in (*full, *empty))


# One line of the source each, and what stands there instead. Which way a fault shows is a race of
# threads: rows that are wrong or NaN, or a wait without end.
FAULTS = {
    "a stage is released while it is multiplied": ("products_wait<1>();", ""),
    "products are read before they have ended": ("products_wait<0>();", "products_wait<1>();"),
    "more bytes are announced than come": (
        "open_stage(ring, RESIDUAL_BYTES)",
        "open_stage(ring, BLOCK_BYTES)",
    ),
    "the swizzle is forgotten": ("(turn ^ group", "(group"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_machine_sees_a_fault(fault: str) -> None:
    line, instead = FAULTS[fault]
    machine = emulated_kernels.compiled(VARIANT, {line: instead}, patience_s=2)
    try:
        found = difference(machine)
    except emulated_kernels.MachineFault:
        return
    assert not found < 0.1


def test_without_a_fault_it_sees_none(source: ctypes.CDLL) -> None:
    assert difference(source) < 0.01


def difference(machine: ctypes.CDLL) -> float:
    """Return how far two tiles are from the reference; NaN where anything is."""
    rng, num_rows, num_in = np.random.default_rng(0), 2 * ROWS, 4 * BLOCK_IN
    arrays = {
        "x": rng.standard_normal((num_rows, num_in)).astype(np.float16),
        "weight": (rng.standard_normal((COLUMNS, num_in)) / 16).astype(np.float16),
        "residual": rng.standard_normal((num_rows, COLUMNS)).astype(np.float16),
    }
    held = {
        "bias": np.zeros(COLUMNS, np.float32),
        "norm_weight": np.ones(COLUMNS, np.float32),
        "norm_bias": np.zeros(COLUMNS, np.float32),
        "out": np.zeros((num_rows, COLUMNS), np.float16),
        "control": np.array([0, num_rows], np.int64),
    }
    maps = {name: _map(array, HALF if name == "weight" else ROWS) for name, array in arrays.items()}
    addresses = {name: array.ctypes.data for name, array in held.items()}
    numbers = {"rows_per_pair": 1, "num_in": num_in, "epsilon": 1e-12}
    emulated_kernels.run_with(machine, (1,), {**maps, **addresses, **numbers}, seed=1)
    x, weight, residual = (array.astype(np.float64) for array in arrays.values())
    zeros, ones = np.zeros(COLUMNS), np.ones(COLUMNS)
    product = layer_references.product(x, weight, zeros, "none")
    expected = layer_references.add_norm(product, residual, ones, zeros, 1e-12)
    return float(np.abs(held["out"].astype(np.float64) - expected).max())


def _map(array: np.ndarray, rows: int) -> TensorMap:
    shape, (row_bytes, size) = array.shape, array.strides
    strides = row_bytes // size, 1
    return TensorMap(array.ctypes.data, shape, strides, (rows, BLOCK_IN), size, 3, 6)
