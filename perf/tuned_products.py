"""What `make tune` times: a layer's product in one type, which every tile computes alike."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np

from ..arrays import Array, DeviceArray, Float32
from ..engines.native.memory import NUMPY_TYPES, allocate, upload
from ..engines.precision.lower import numpy_type
from ..engines.precision.static import round_to
from ..errors import EdjeError
from ..kernels import layer_references
from ..kernels.device.contract import Device, DeviceBuffer, Stream
from ..kernels.launch import KernelLibrary
from ..kernels.layer_variants import (
    POINTER_TILES,
    TMA_TILES,
    UNIT,
    product_name,
    product_tma_name,
)
from ..kernels.layer_variants8 import (
    KINDS,
    POINTER_TILES8,
    TMA_TILES8,
    WIDE,
    product8_name,
    product8_tma_name,
)
from ..kernels.layers import Product
from ..kernels.layers8 import Product8
from ..kernels.scaled import Copy, Scaled

SLOTS = 80
NUM_INPUTS = 4  # together more than any L2 cache
NUM_DRAWN = 1 << 16  # random numbers, which fill arrays in random order
ROWS_COMPARED = 64
# Of the largest value. 16 bit: half a unit in the last place, and the order of sums (fp8's lie in
# some 14 bits on 9.0). 8 bit: half a step.
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2, "int8": 6e-3, "fp8": 5e-2}

Call = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where products are timed.

    Attributes:
        device: current; owns what is allocated.
        num_pairs: pairs of a batch, of `SLOTS` rows each.
    """

    device: Device
    library: KernelLibrary
    stream: Stream
    num_pairs: int

    @property
    def num_rows(self) -> int:
        """Rows of a batch."""
        return self.num_pairs * SLOTS

    def wait(self) -> None:
        """Block until the stream's work until now has run."""
        passed = self.device.event()
        self.stream.record(passed)
        passed.synchronize()

    def fetched(self, array: DeviceArray, source: DeviceBuffer) -> Array:
        """Return what lies in an array, the first elements of `source`."""
        num_elements = math.prod(array.shape)
        pinned = self.device.pinned(num_elements, array.dtype)
        self.stream.download(pinned, source, num_elements)
        self.wait()
        return pinned.view(array.shape)


class TunedProduct(ABC):
    """A product of random rows and weights; `NUM_INPUTS` inputs and outputs take turns."""

    def __init__(self, place: Place, element: str, num_in: int, num_out: int, gelu: str):
        """Draw and upload the inputs.

        Args:
            element: type of rows and weights: `float16`, `bfloat16`, `int8` or `fp8`.
            num_in, num_out: columns of the input and of the result, multiples of 128.
            gelu: behind it: `none`, `exact` or `tanh`.
        """
        self._place, self._element, self._gelu = place, element, gelu
        self._num_in, self._num_out = num_in, num_out
        random = np.random.default_rng(0)
        self._host: dict[str, Array] = {
            "bias": random.standard_normal(num_out).astype(np.float32),
            "control": np.array([0, place.num_pairs], np.int64),
            **self._drawn(random),
        }
        self._held = upload(place.device, self._host)

    def check(self, tile: str) -> Sequence[Call]:
        """Run a tile once; return its calls, one an input, each to be given a stream.

        Raises:
            EdjeError: its rows differ from the reference.
        """
        sizes = {"rows_per_pair": SLOTS, "num_pairs": self._place.num_pairs}
        calls = [partial(call, **sizes) for call in self._calls(tile)]
        calls[0](stream=self._place.stream)
        some = np.linspace(0, self._place.num_rows - 1, ROWS_COMPARED).astype(int)
        found, expected = self._found(some), self._expected(some)
        size = max(1.0, float(np.abs(expected).max()))
        worst, most = float(np.abs(found - expected).max() / size), self._tolerance
        if not worst <= most:
            raise EdjeError(
                f"the product {tile} of {self._element} differs from its reference by "
                f"{worst:.1e} of the largest value, expected at most {most:.1e}"
            )
        return calls

    @property
    def _tolerance(self) -> float:
        return TOLERANCE[self._element]

    @abstractmethod
    def tiles(self) -> list[str]:
        """Return the tiles that this GPU has a product for: the copy engine's where it has one."""

    @abstractmethod
    def _drawn(self, random: np.random.Generator) -> dict[str, Array]:
        """Return the host arrays beside the bias."""

    @abstractmethod
    def _calls(self, tile: str) -> Sequence[Call]:
        """Return what computes each input's rows by a tile."""

    @abstractmethod
    def _found(self, some: Array) -> Float32:
        """Return rows of the first input's result."""

    @abstractmethod
    def _expected(self, some: Array) -> Float32:
        """Return the same rows of the reference."""

    def _offered(self, named: Mapping[str, str], others: Mapping[str, str]) -> list[str]:
        """Return the tiles of kernels that run here, by tile; `others` where none of `named` do."""
        has = self._place.library.has
        found = [tile for tile, name in named.items() if has(name)]
        return found or [tile for tile, name in others.items() if has(name)]


class Product16(TunedProduct):
    """Of float16 or bfloat16, whose bits travel as uint16."""

    def tiles(self) -> list[str]:
        """Return the tiles that this GPU has a product for."""
        of = self._element, self._gelu
        return self._offered(
            {tile: product_tma_name(*of, tile) for tile in TMA_TILES},
            {tile: product_name(*of, tile) for tile in POINTER_TILES},
        )

    def _drawn(self, random: np.random.Generator) -> dict[str, Array]:
        kind, drawn = numpy_type(self._element), random.standard_normal(NUM_DRAWN, np.float32)
        rows = self._place.num_rows, self._num_in
        inputs = {f"x{n}": spread(random, drawn.astype(kind), rows) for n in range(NUM_INPUTS)}
        scaled = (drawn / np.sqrt(self._num_in)).astype(kind)
        arrays = {**inputs, "weight": spread(random, scaled, (self._num_out, self._num_in))}
        return {name: array.view(NUMPY_TYPES[self._element]) for name, array in arrays.items()}

    def _calls(self, tile: str) -> Sequence[Call]:
        place, held = self._place, self._held
        shape, kind = (place.num_rows, self._num_out), NUMPY_TYPES[self._element]
        self._outs = [place.device.memory(shape[0] * shape[1], kind) for _ in range(NUM_INPUTS)]
        product = Product(
            place.library,
            dtype=self._element,
            gelu=self._gelu,
            tile=tile,
            num_processors=place.device.num_processors,
        )
        fixed = held["weight"], held["bias"]
        return [
            partial(product.enqueue, held[f"x{n}"], *fixed, view(out, shape), held["control"])
            for n, out in enumerate(self._outs)
        ]

    def _found(self, some: Array) -> Float32:
        out = view(self._outs[0], (self._place.num_rows, self._num_out))
        return self._wide(self._place.fetched(out, self._outs[0])[some])

    def _expected(self, some: Array) -> Float32:
        rows, weight = (self._wide(each) for each in (self._host["x0"][some], self._host["weight"]))
        found = layer_references.product(rows, weight, self._host["bias"], self._gelu)
        return found.astype(np.float32)

    def _wide(self, values: Array) -> Float32:
        return values.view(numpy_type(self._element)).astype(np.float32)


class Product8Bit(TunedProduct):
    """Of int8 or E4M3 with scales; behind a GELU the result is 8 bit again, as engines have it."""

    def tiles(self) -> list[str]:
        """Return the tiles that this GPU has a product for."""
        of = self._element, self._gelu, self._element if self._writes8 else WIDE
        return self._offered(
            {tile: product8_tma_name(*of, tile) for tile in TMA_TILES8},
            {tile: product8_name(*of, tile) for tile in POINTER_TILES8},
        )

    @property
    def _writes8(self) -> bool:
        return self._gelu != "none"

    @property
    def _tolerance(self) -> float:
        return TOLERANCE[self._element] if self._writes8 else TOLERANCE["bfloat16"]

    def _drawn(self, random: np.random.Generator) -> dict[str, Array]:
        kind, largest = numpy_type(self._element), KINDS[self._element].largest
        drawn = random.standard_normal(NUM_DRAWN, np.float32) * np.float32(largest / 4)
        steps = round_to(drawn, kind, largest).view(KINDS[self._element].numpy)
        rows, weight = (self._place.num_rows, self._num_in), (self._num_out, self._num_in)
        shapes = {**{f"x{n}": rows for n in range(NUM_INPUTS)}, "weight": weight}
        found: dict[str, Array] = {"smooth": np.ones(self._num_out, np.float32)}
        for name, shape in shapes.items():
            size = 4 / largest / (np.sqrt(self._num_in) if name == "weight" else 1)
            scales = random.uniform(0.5 * size, 1.5 * size, (shape[0], shape[1] // UNIT))
            found[name] = spread(random, steps, shape)
            found[f"{name}.scales"] = scales.astype(np.float32)
        return found

    def _calls(self, tile: str) -> Sequence[Call]:
        place, kind = self._place, KINDS[self._element]
        shape = place.num_rows, self._num_out
        types = np.dtype(kind.numpy if self._writes8 else WIDE), np.dtype(np.float32)
        self._outs = [place.device.memory(shape[0] * shape[1], types[0]) for _ in range(NUM_INPUTS)]
        sizes = shape[0], shape[1] // UNIT
        self._scales = place.device.memory(sizes[0] * sizes[1], types[1])
        others = [allocate(place.device, types[1], *sizes) for _ in range(NUM_INPUTS - 1)]
        product = Product8(
            place.library,
            kind=self._element,
            gelu=self._gelu,
            tile=tile,
            num_processors=place.device.num_processors,
            writes8=self._writes8,
        )
        fixed = self._scaled("weight"), self._held["bias"]
        calls = []
        for n, scales in enumerate([view(self._scales, sizes), *others]):
            out: DeviceArray | Copy = view(self._outs[n], shape)
            if self._writes8:
                out = Copy(Scaled(view(self._outs[n], shape), scales), self._held["smooth"])
            rows = self._scaled(f"x{n}")
            calls.append(partial(product.enqueue, rows, *fixed, out, self._held["control"]))
        return calls

    def _found(self, some: Array) -> Float32:
        place, shape = self._place, (self._place.num_rows, self._num_out)
        values = place.fetched(view(self._outs[0], shape), self._outs[0])[some]
        if not self._writes8:
            return values.astype(np.float32)
        sizes = shape[0], shape[1] // UNIT
        scales = place.fetched(view(self._scales, sizes), self._scales)[some]
        found: Float32 = self._wide(values) * np.repeat(scales, UNIT, axis=1)
        return found

    def _expected(self, some: Array) -> Float32:
        host = self._host
        rows, weight = self._wide(host["x0"][some]), self._wide(host["weight"])
        scales = host["x0.scales"][some], host["weight.scales"]
        sums = rows, scales[0], weight, scales[1], host["bias"]
        return layer_references.product8(*sums, self._gelu).astype(np.float32)

    def _wide(self, values: Array) -> Float32:
        return values.view(numpy_type(self._element)).astype(np.float32)

    def _scaled(self, name: str) -> Scaled:
        return Scaled(self._held[name], self._held[f"{name}.scales"])


def spread(random: np.random.Generator, drawn: Array, shape: tuple[int, ...]) -> Array:
    """Return an array of some of `NUM_DRAWN` numbers, in random order."""
    found: Array = drawn[random.integers(0, NUM_DRAWN, shape, dtype=np.uint16)]
    return found


def view(memory: DeviceBuffer, shape: tuple[int, ...]) -> DeviceArray:
    """Return memory as an array of this shape."""
    return cast(DeviceArray, memory.view(shape))
