"""Run Triton kernels on the CPU, in a process of their own.

Triton reads `TRITON_INTERPRET` when it is imported, and whoever imports it in the tests' own
process would decide for all: so `interpreter()` starts a process that has it set.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np

from edje.arrays import DeviceArray
from edje.kernels.launch import KernelLibrary
from edje.kernels.manifest import read_manifest
from edje.kernels.variants import all_variants

VARIANTS = {variant.name: variant for variant in all_variants()}
TYPES = {"*i8": np.int8, "*i16": np.int16, "*i32": np.int32, "*i64": np.int64}
TYPES |= {"*fp16": np.float16, "*bf16": np.uint16, "*fp32": np.float32}
Run = Callable[..., dict[str, np.ndarray]]
# Bytes before and after every array that a kernel must leave as they are.
MARGIN, MARK = 1 << 18, 0xA5


@contextmanager
def interpreter() -> Iterator[Run]:
    """Yield `run(variant's name, number of programs, arguments, **other constants)`.

    It returns the arrays among the arguments as the kernel left them.
    """
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield lambda *values, **constants: pool.submit(_run, *values, **constants).result()
    finally:
        os.environ.pop("TRITON_INTERPRET")
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def _run(
    name: str, num_programs: int, arguments: Mapping[str, Any], **constants: int
) -> dict[str, np.ndarray]:
    """Run one launch; bfloat16 arrays travel as uint16. No array may be written beside."""
    import torch

    variant = VARIANTS[name]
    types = {parameter.name: parameter.type for parameter in variant.parameters}
    assert arguments.keys() == types.keys(), f"{name} takes {list(types)}"
    given = {key: value for key, value in arguments.items() if isinstance(value, np.ndarray)}
    memory = {key: _with_margins(array) for key, array in given.items()}
    arrays = {key: _inside(memory[key], array) for key, array in given.items()}
    tensors = {
        key: torch.from_numpy(array).view(torch.bfloat16)
        if types[key] == "*bf16"
        else torch.from_numpy(array)
        for key, array in arrays.items()
    }
    function = getattr(import_module(f"edje.kernels.{variant.source}"), variant.function)
    # NumPy warns of lanes that are masked out (0 / 0, inf - inf): no faults of the kernel.
    with np.errstate(all="ignore"):
        function[(num_programs,)](**{**arguments, **tensors, **variant.constants, **constants})
    for key, held in memory.items():
        margins = held[:MARGIN], held[-MARGIN:]
        assert all((margin == MARK).all() for margin in margins), f"{name} wrote beside {key}"
    return arrays


def _with_margins(array: np.ndarray) -> np.ndarray:
    """Return a copy of the array's bytes between two margins."""
    memory = np.full(array.nbytes + 2 * MARGIN, MARK, np.uint8)
    _inside(memory, array)[...] = array
    return memory


def _inside(memory: np.ndarray, array: np.ndarray) -> np.ndarray:
    return memory[MARGIN:-MARGIN].view(array.dtype).reshape(array.shape)


@dataclass
class InterpretedDevice:
    """A loader whose kernels run in the interpreter, on host arrays that it was shown.

    It is given the cubins, and runs the source that the manifest says they were made from.
    """

    run: Run
    stream: None = None
    arrays: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def memory(self, array: np.ndarray) -> DeviceArray:
        """Return an array as device memory, on 16 bytes as NumPy gives it."""
        assert array.flags.c_contiguous
        self.arrays[array.ctypes.data] = array
        return DeviceArray(array.ctypes.data, array.shape, array.dtype)

    @property
    def library(self) -> KernelLibrary:
        return KernelLibrary(self, (9, 0))

    def finish(self) -> None:
        """Forget the arrays: launches have run when they return."""
        self.arrays.clear()

    def load_module(self, code: bytes) -> InterpretedDevice._Module:
        sha256 = hashlib.sha256(code).hexdigest()
        (name,) = (
            name
            for name, entry in read_manifest().kernels.items()
            if sha256 in {cubin.sha256 for cubin in entry.cubins}
        )
        return InterpretedDevice._Module(self, name)

    @dataclass(frozen=True)
    class _Module:
        device: InterpretedDevice
        name: str

        def kernel(self, symbol: str, shared_bytes: int = 0) -> InterpretedDevice._Module:
            assert symbol == VARIANTS[self.name].function
            return self

        def launch(
            self,
            stream: object,
            *,
            grid: tuple[int, int, int],
            block: tuple[int, int, int],
            shared_bytes: int,
            arguments: Sequence[np.generic],
        ) -> None:
            parameters = VARIANTS[self.name].parameters
            assert [int(value) for value in arguments[len(parameters) :]] == [0, 0]
            values: dict[str, Any] = {}
            for parameter, scalar in zip(parameters, arguments, strict=False):
                dtype = TYPES.get(parameter.type)
                values[parameter.name] = (
                    scalar.item()
                    if dtype is None
                    else self.device.arrays[int(scalar)].reshape(-1).view(dtype)
                )
            for name, result in self.device.run(self.name, grid[0], values).items():
                values[name][...] = result
