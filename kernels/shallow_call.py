"""The score of a shallow engine as a typed call: checks, launch.

As in `layers`, whose rules hold here.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..arrays import DeviceArray
from .device.contract import Stream
from .launch import (
    MOST_SLOTS,
    KernelLibrary,
    array_faults,
    bounds_faults,
    choice_faults,
    multiple_faults,
    raise_faults,
    rows_faults,
)
from .layer_variants import ACTIVATIONS, NORM_COLUMNS, UNIT, shallow_score_name


class ShallowScore:
    """`layer_references.shallow_score` on the device: a linear head over every slot's row."""

    def __init__(self, library: KernelLibrary, *, dtype: str, width: int):
        """Load the kernel.

        Args:
            dtype: `float16` or `bfloat16`, of the rows; sums are float32.
            width: values of a row, a multiple of 128: at most 1,024.

        Raises:
            EngineError: choices that no kernel takes (all at once), or no kernel for this GPU.
        """
        raise_faults("shallow_score", _choice_faults(dtype, width))
        self._kernel = library.kernel(shallow_score_name(dtype))
        self._dtype, self._width = dtype, width

    def enqueue(
        self,
        hidden_states: DeviceArray,
        lengths: DeviceArray,
        weight: DeviceArray,
        bias: DeviceArray,
        control: DeviceArray,
        *,
        num_pairs: int,
        num_slots: int,
        text_slots: int,
        stream: Stream,
    ) -> None:
        """Write a float32 score of each pair where `control` says; returns at once.

        Args:
            hidden_states: [at least the pairs' slots, width] of the dtype, on 16 bytes.
            lengths: int32 [at least the pairs]: text slots of each pair that are no padding.
            weight: float32 [3, width], on 16 bytes: of CLS, of the mean of the real text slots, of
                the mean of the visual slots.
            bias: float32 [1].
            control: int64 [2].
            num_pairs: the most pairs that `control` will say.
            num_slots: of a pair: text, at least one visual slot, SEP.
            text_slots: at a pair's begin.

        Raises:
            EngineError: arrays that do not fit (all faults at once).
        """
        arrays = (hidden_states, lengths, weight, bias, control)
        raise_faults("shallow_score", self._faults(arrays, num_pairs, num_slots, text_slots))
        self._kernel.launch(
            stream,
            num_pairs,
            hidden_states=hidden_states.address,
            lengths=lengths.address,
            weight=weight.address,
            bias=bias.address,
            control=control.address,
            num_slots=num_slots,
            text_slots=text_slots,
            width=self._width,
        )

    def _faults(
        self, arrays: tuple[DeviceArray, ...], num_pairs: int, num_slots: int, text_slots: int
    ) -> Iterator[str]:
        hidden_states, lengths, weight, bias, control = arrays
        num_rows = num_pairs * num_slots
        yield from rows_faults("hidden_states", hidden_states, self._dtype, num_rows, self._width)
        yield from array_faults("lengths", lengths, "int32", (max(num_pairs, *lengths.shape),))
        yield from array_faults("weight", weight, "float32", (3, self._width))
        yield from array_faults("bias", bias, "float32", (1,))
        yield from array_faults("control", control, "int64", (2,))
        yield from bounds_faults("slots of all pairs", num_rows, MOST_SLOTS)
        yield from bounds_faults("text_slots", text_slots, num_slots - 2)


def _choice_faults(dtype: str, width: int) -> Iterator[str]:
    yield from choice_faults("dtype", dtype, ACTIVATIONS)
    yield from multiple_faults("width", (width,), UNIT)
    yield from bounds_faults("width", width, NORM_COLUMNS[-1])
