"""A native engine's memory: weights, and activations at addresses that never change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np

from ...arrays import Array, DeviceArray
from ...kernels.device.contract import Device
from ...kernels.layer_variants8 import KINDS
from ...kernels.scaled import Scaled
from .plan import ALIGNMENT, Plan

# bfloat16 is no type of NumPy's own: its bits travel as uint16.
NUMPY_TYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(np.uint16)}


def allocate(device: Device, dtype: np.dtype[Any], *shape: int) -> DeviceArray:
    """Return device memory of undefined values; `device` is current and owns it.

    Raises:
        EngineError: the device has too little memory.
    """
    return cast(DeviceArray, device.memory(math.prod(shape), dtype).view(shape))


def upload(device: Device, arrays: Mapping[str, Array]) -> dict[str, DeviceArray]:
    """Copy arrays into device memory, through pinned memory that is freed again.

    Raises:
        EngineError: the device has too little memory.
    """
    bytes_of = np.dtype(np.uint8)
    held = {name: device.memory(array.nbytes, bytes_of) for name, array in arrays.items()}
    staging = device.sibling()
    try:
        pinned = staging.pinned(max(array.nbytes for array in arrays.values()), bytes_of)
        stream, copied = staging.stream(), staging.event()
        for name, array in arrays.items():
            pinned.view((array.nbytes,))[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            stream.upload(held[name], pinned, array.nbytes)
            stream.record(copied)
            copied.synchronize()
    finally:
        staging.close()
    views = {name: cast(DeviceArray, each.view((1,))) for name, each in held.items()}
    return {
        name: DeviceArray(views[name].address, array.shape, array.dtype)
        for name, array in arrays.items()
    }


def columns(array: DeviceArray, first: int, width: int) -> DeviceArray:
    """Return the columns from `first` on as rows of `width` values, the stride being the array's.

    Whoever reads them is told that stride.
    """
    address = array.address + first * array.dtype.itemsize
    return DeviceArray(address, (array.shape[0], width), array.dtype)


def as_rows_of(array: DeviceArray, width: int) -> DeviceArray:
    """Return the same memory as rows of `width` values."""
    return replace(array, shape=(math.prod(array.shape) // width, width))


class Rows(NamedTuple):
    """Rows of activations: in the plan's element type, and in 8 bits where some step reads those.

    Steps write either or both; whoever reads them knows which.
    """

    exact: DeviceArray
    scaled: Scaled | None = None


class ClsRows(NamedTuple):
    """The last layer's rows where it goes on with each pair's first row only.

    Attributes:
        queries: [P, A].
        states: [P, W]: the hidden states.
    """

    queries: DeviceArray
    states: Rows


class Activations:
    """What the kernels of one forward write and read, with room for the plan's largest batch.

    R rows are the slots of all pairs, P pairs; W, A, I the plan's `width`, `attention`, `wide`.
    `hidden`, `wide` and what `cls` has of them have room for their 8-bit form where the plan
    quantises anything.

    Attributes:
        hidden: [R, W]: the hidden states; every layer overwrites them.
        qkv: [R, 3 A]: queries, keys and values.
        context: [R, A]: what attention gives; its padded columns are 0 from the start.
        update: [R, W]: what is added to the hidden states next.
        wide: [R, I]: between the two products of the feed-forward.
        cls: the last layer's rows; None in a shallow engine, whose layers are all whole.
        lengths: int32 [P]: the text slots of each pair that are no padding.
        control: int64 [2]: where the scores go, and how many pairs there are.
        order: int32 [P]: 0, 1, ...: a batch's own tokens, as records by their numbers.
    """

    def __init__(self, device: Device, plan: Plan):
        """Allocate everything; `device` is current and owns it.

        Raises:
            EngineError: the device has too little memory.
        """
        pairs, element = plan.max_pairs, NUMPY_TYPES[plan.element]
        rows = pairs * plan.num_slots(plan.text_buckets[-1])
        known: dict[str, Array] = {
            "context": np.zeros((rows, plan.attention), element),
            "control": np.zeros(2, np.int64),
            "order": np.arange(pairs, dtype=np.int32),
        }
        held = upload(device, known)
        self.context, self.control, self.order = (held[name] for name in known)
        self.hidden = self._rows(device, plan, rows, plan.width)
        self.qkv = allocate(device, element, rows, 3 * plan.attention)
        self.update = allocate(device, element, rows, plan.width)
        self.wide = self._rows(device, plan, rows, plan.wide)
        self.cls: ClsRows | None = None
        if not plan.shallow:
            queries = allocate(device, element, pairs, plan.attention)
            self.cls = ClsRows(queries, self._rows(device, plan, pairs, plan.width))
        self.lengths = allocate(device, np.dtype(np.int32), pairs)

    def _rows(self, device: Device, plan: Plan, num_rows: int, width: int) -> Rows:
        exact = allocate(device, NUMPY_TYPES[plan.element], num_rows, width)
        if not plan.quantized:
            return Rows(exact)
        values = allocate(device, np.dtype(KINDS[plan.kind].numpy), num_rows, width)
        scales = allocate(device, np.dtype(np.float32), num_rows, width // ALIGNMENT)
        return Rows(exact, Scaled(values, scales))


def activation_bytes(plan: Plan) -> int:
    """Return about how many bytes `Activations` takes."""
    rows = plan.max_pairs * plan.num_slots(plan.text_buckets[-1])
    of_a_row = 2 * plan.width + 4 * plan.attention + plan.wide
    cls_rows = 0 if plan.shallow else plan.max_pairs
    of_a_cls = plan.width + plan.attention
    exact = (rows * of_a_row + cls_rows * of_a_cls) * NUMPY_TYPES[plan.element].itemsize
    if not plan.quantized:
        return exact
    values = rows * (plan.width + plan.wide) + cls_rows * plan.width
    return exact + values + values // ALIGNMENT * np.dtype(np.float32).itemsize
