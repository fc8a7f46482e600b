"""What a launch of one of our kernels says, and who can run one without a GPU.

`interpreted_kernels` runs any of them, but slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from edje.arrays import DeviceArray
from edje.kernels.cuda_variants import cuda_variants
from edje.kernels.manifest import read_manifest
from edje.kernels.variant import Parameter, Variant
from edje.kernels.variants import all_variants
from pretended_gpu import copy_of

VARIANTS = {variant.name: variant for variant in (*all_variants(), *cuda_variants())}
DESCRIPTOR = "tensordesc<"
MAP_BYTES, MAP_MARK = 128, 0x70616D20726F736E  # a real map is no such number


@dataclass(frozen=True, slots=True)
class TensorMap:
    """What a descriptor says of its array, as a pretended device puts it into 128 bytes.

    Attributes:
        address: of the first element.
        shape, strides: in elements; outermost first, as NumPy has them.
        block: what one load or store moves.
        num_bytes: of an element.
        swizzle, element: as the caller gave them; the interpreter has no use for them.
    """

    address: int
    shape: tuple[int, int]
    strides: tuple[int, int]
    block: tuple[int, int]
    num_bytes: int
    swizzle: int
    element: int

    def encoded(self) -> np.void:
        """Return the 128 bytes."""
        fields = [MAP_MARK, self.address, *self.shape, *self.strides, *self.block]
        fields += [self.num_bytes, self.swizzle, self.element]
        return np.void(np.array(fields, np.int64).tobytes().ljust(MAP_BYTES, b"\0"))

    @classmethod
    def decoded(cls, value: np.void) -> TensorMap:
        """Read what `encoded` wrote."""
        code = value.tobytes()
        assert len(code) == MAP_BYTES, f"a tensor map has {MAP_BYTES} bytes, got {len(code)}"
        mark, address, *fields = np.frombuffer(code, np.int64)[:11].tolist()
        assert mark == MAP_MARK, "not a tensor map of a pretended device"
        pairs = [(fields[place], fields[place + 1]) for place in (0, 2, 4)]
        return cls(address, *pairs, *fields[6:])


def tensor_map(
    array: Any,
    block: tuple[int, ...],
    *,
    swizzle: int = 0,
    element: int = 0,
    row_stride: int | None = None,
) -> np.void:
    """Return the map of a 2-D array as a pretended device encodes it.

    Args:
        array: has an address, a shape and a dtype.
        block: rows and columns that one load moves.
        row_stride: elements between rows where they are further apart than their length.
    """
    rows, columns = array.shape
    size = array.dtype.itemsize
    strides = (columns if row_stride is None else row_stride, 1)
    height, width = block
    assert array.address % 16 == 0, f"a tensor map starts on 16 bytes, got {array.address:#x}"
    assert strides[0] * size % 16 == 0, f"rows of a tensor map lie on 16 bytes, got {strides[0]}"
    assert height <= 256 >= width, f"a block has at most 256 rows and columns, got {block}"
    assert columns <= strides[0], f"rows of {columns} overlap, they are {strides[0]} apart"
    fields = (rows, columns), strides, (height, width), size, swizzle, element
    return TensorMap(array.address, *fields).encoded()


def bind(variant: Variant, arguments: Sequence[np.generic]) -> dict[str, Any]:
    """Return a launch's arguments by name: numbers, and a `TensorMap` for a descriptor.

    A descriptor is passed as its map, its shape and its strides, which must agree. Addresses of
    scratch memory follow at the end, which must be 0.
    """
    rest, values = iter(arguments), {}
    for parameter in variant.parameters:
        values[parameter.name] = _bound(variant, parameter, next(rest), rest)
    assert not any(int(scratch) for scratch in rest), f"{variant.name}: more arguments than it has"
    return values


def _bound(
    variant: Variant, parameter: Parameter, value: np.generic, rest: Iterator[np.generic]
) -> Any:
    if not parameter.type.startswith(DESCRIPTOR):
        return value.item()
    assert isinstance(value, np.void), f"{variant.name}: {parameter.name} is no tensor map"
    found = TensorMap.decoded(value)
    passed = [int(next(rest)) for _ in range(4)]
    told = [*found.shape, *found.strides]
    assert passed == told, f"{variant.name}: {parameter.name} maps {told}, was passed {passed}"
    # A block may be moved in parts: with a swizzle of 128 bytes none is wider than that.
    block = block_of(parameter.type)
    parts = [whole % part for whole, part in zip(block, found.block, strict=True)]
    assert parts == [0, 0], f"{variant.name}: {parameter.name} maps {found.block} at once"
    return replace(found, block=block)


def block_of(descriptor: str) -> tuple[int, ...]:
    """Return the block of a type such as `tensordesc<fp16[128,64]>`."""
    numbers = descriptor.partition("[")[2].partition("]")[0]
    return tuple(int(number) for number in numbers.split(","))


def pointed(variant: Variant, values: Mapping[str, Any]) -> Iterator[tuple[Parameter, int]]:
    """Yield the parameters that are addresses, and where they point."""
    for parameter in variant.parameters:
        value = values[parameter.name]
        if isinstance(value, TensorMap):
            yield parameter, value.address
        elif parameter.type.startswith("*") or parameter.written:
            yield parameter, value


@dataclass(frozen=True)
class Launch:
    """One launch as a device was asked for it; `name` is the variant's."""

    name: str
    symbol: str
    stream: Any
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    arguments: tuple[np.generic, ...]

    @property
    def values(self) -> dict[str, Any]:
        """Its arguments by name, as `bind` has them."""
        return bind(VARIANTS[self.name], self.arguments)

    def addresses(self, *, written: bool) -> list[int]:
        """Where its arguments point: those that the kernel writes, or those it only reads."""
        found = pointed(VARIANTS[self.name], self.values)
        return [address for parameter, address in found if parameter.written == written]


class Kernels(Protocol):
    """What runs the launches of a pretended device.

    Attributes:
        by_address: whether engines see device memory by its address only, as on a GPU.
    """

    by_address: bool

    def memory(self, num_elements: int, dtype: Any, name: str) -> np.ndarray:
        """Return memory that the kernels reach."""
        ...

    def work(
        self, name: str, grid: tuple[int, ...], arguments: Sequence[np.generic]
    ) -> Callable[[], None]:
        """Return what runs a launch of a variant."""
        ...


class CopyingKernels:
    """Runs gathers and scatters at once, by their references; no other kernel."""

    by_address = False

    def memory(self, num_elements: int, dtype: Any, name: str) -> np.ndarray:
        return np.empty(num_elements, dtype)

    def work(
        self, name: str, grid: tuple[int, ...], arguments: Sequence[np.generic]
    ) -> Callable[[], None]:
        return copy_of(read_manifest().kernels[name], grid[0], arguments).run


class NotedKernels(CopyingKernels):
    """Runs nothing: addresses may be anything."""

    def work(
        self, name: str, grid: tuple[int, ...], arguments: Sequence[np.generic]
    ) -> Callable[[], None]:
        return lambda: None


def fake_memory(address: int, shape: tuple[int, ...], dtype: str) -> DeviceArray:
    """Return device memory that does not exist, for launches that are only noted."""
    return DeviceArray(address, shape, np.dtype(dtype))
