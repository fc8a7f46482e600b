"""What one kernel to build is, and the GPUs that kernels are built for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

COMPUTE_CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
TMA_CAPABILITIES = ("9.0", "10.0", "12.0")  # a copy engine fetches tiles by a tensor map
# Of a product that loads through pointers; on 9.0 for devices that pass no tensor maps.
POINTER_CAPABILITIES = ("8.0", "8.6", "8.9", "9.0")

MAX_REGISTERS = 255  # of a thread, on every GPU
# Of a block, when the driver is asked for it; 1 kB of the multiprocessor's is the driver's.
MAX_SHARED_BYTES = {
    "8.0": 163 << 10,
    "8.6": 99 << 10,
    "8.9": 99 << 10,
    "9.0": 227 << 10,
    "10.0": 227 << 10,
    "12.0": 99 << 10,
}

# NumPy's name -> Triton's; fp8 (E4M3) is no type of NumPy's own.
ELEMENTS = {"float16": "fp16", "bfloat16": "bf16", "int8": "i8", "fp8": "fp8e4nv"}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a compiled kernel.

    Attributes:
        type: Triton's name: `*fp16` is an address, `i32`, `i64` and `fp32` are values,
            `tensordesc<fp16[128,64]>` is a tensor map of a 2-D array and its block.
        multiple_of: what the compiler took for granted that the address or value divides by.
        written: whether the kernel writes what this points to.
    """

    name: str
    type: str
    multiple_of: int = 1
    written: bool = False


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel to build: a Triton function with types and constants.

    Attributes:
        name: unique, names the cubins.
        source, function: the module without `.py`, and the Triton function in it.
        parameters: in order, without those that are constants.
        constants: constexpr arguments; None is an array that this variant has not.
        num_stages: of a loop's loads: how many rounds are in flight.
        capabilities: the architectures that it is built for.
    """

    name: str
    source: str
    function: str
    parameters: tuple[Parameter, ...]
    constants: Mapping[str, int | None]
    num_warps: int = 4
    num_stages: int = 3
    capabilities: tuple[str, ...] = COMPUTE_CAPABILITIES
