"""Compiled kernels without Triton: arrays checked, cubins chosen, loaded once, launched."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..arrays import DeviceArray
from ..errors import EngineError, named
from .cuda_manifest import all_kernels
from .device.contract import Device, Kernel, Stream
from .manifest import Cubin, KernelEntry, TensorMap, read_manifest
from .variant import MAX_SHARED_BYTES, Parameter

DTYPES = {
    name: np.dtype(name)
    for name in ("float16", "float32", "int8", "int32", "int64", "uint8", "uint16")
}


def raise_faults(operation: str, faults: Iterator[str]) -> None:
    """Raise one EngineError that lists `faults`; return where there are none."""
    if listed := list(faults):
        raise EngineError(f"{operation} does not take these arrays", faults=listed)


def array_faults(
    name: str, array: DeviceArray, dtype: str, shape: tuple[int, ...]
) -> Iterator[str]:
    if not _has_dtype(array, dtype) or array.shape != shape:
        yield f"{name}: got {array.dtype} {list(array.shape)}, expected {dtype} {list(shape)}"


def rows_faults(
    name: str, array: DeviceArray, dtype: str, num_rows: int, columns: int
) -> Iterator[str]:
    """Yield what is wrong with rows, of which there may be more than are used."""
    shape = array.shape
    if (
        len(shape) != 2
        or shape[0] < num_rows
        or shape[1] != columns
        or not _has_dtype(array, dtype)
    ):
        expected = f"{dtype} [at least {num_rows}, {columns}]"
        yield f"{name}: got {array.dtype} {list(shape)}, expected {expected}"


def _has_dtype(array: DeviceArray, dtype: str) -> bool:
    """Compare dtypes; bfloat16, no dtype of NumPy's own, may be called uint16."""
    known = DTYPES.get(dtype)  # a dtype's name takes microseconds to make
    if known is not None:
        return array.dtype == known
    return array.dtype == DTYPES["uint16"] or array.dtype.name == dtype


def stride_faults(name: str, stride: int, row: int) -> Iterator[str]:
    if stride < row or stride % 16:
        yield f"{name}: got {stride}, expected a multiple of 16, at least the row's {row}"


def scales_faults(
    name: str, array: DeviceArray | None, wanted: bool, shape: tuple[int, ...]
) -> Iterator[str]:
    """Yield what is wrong with scales, which int8 tokens have and float16 tokens have not."""
    if array is None and wanted:
        yield f"{name}: got none, int8 tokens need float16 {list(shape)}"
    elif array is not None and not wanted:
        yield f"{name}: got an array, float16 tokens have none"
    elif array is not None:
        yield from array_faults(name, array, "float16", shape)


def choice_faults(name: str, value: str, known: Sequence[str]) -> Iterator[str]:
    if value not in known:
        yield f"{name}: got {value!r}, expected one of {list(known)}"


def bounds_faults(name: str, value: int, most: int) -> Iterator[str]:
    if not 1 <= value <= most:
        yield f"{name}: got {value}, expected 1 to {most}"


def multiple_faults(name: str, sizes: tuple[int, ...], unit: int) -> Iterator[str]:
    if any(size % unit or size < 1 for size in sizes):
        yield f"{name}: got {', '.join(map(str, sizes))}, expected multiples of {unit}"


REGISTERS = 1 << 16  # of a multiprocessor
DRIVER_SHARED_BYTES = 1 << 10  # of a block, beside its own


def fitting_programs(kernel: LoadedKernel) -> int:
    """Return how many programs of a persistent kernel to start on a multiprocessor: 1 or 2."""
    cubin = kernel.cubin
    shared = MAX_SHARED_BYTES[cubin.compute_capability] + DRIVER_SHARED_BYTES
    by_memory = shared // (cubin.shared_bytes + DRIVER_SHARED_BYTES)
    by_registers = REGISTERS // (cubin.registers * kernel.num_threads)
    return max(1, min(2, by_memory, by_registers))


MOST_SLOTS = 2**31 - 256  # of all pairs together: places are 32-bit numbers
SCALARS: dict[str, type[np.generic]] = {"i32": np.int32, "i64": np.int64, "fp32": np.float32}
RANGES = {"i32": (-(2**31), 2**31 - 1), "i64": (-(2**63), 2**63 - 1)}
ADDRESSES = (1, 2**64 - 1)
SCRATCH = ("global_scratch", "profile_scratch")
# What a launch gives for a parameter: a number, or for a tensor map an array of rows, with the
# elements from one row to the next where they do not follow each other.
Value = float | DeviceArray | tuple[DeviceArray, int]


class LoadedKernel:
    """A kernel of this package, loaded and ready to launch."""

    def __init__(self, name: str, entry: KernelEntry, cubin: Cubin, kernel: Kernel, device: Device):
        self.name, self.cubin, self._kernel, self._device = name, cubin, kernel, device
        self._maps = {each.name: each for each in cubin.tensor_maps}
        self.constants = entry.constants
        self.num_threads = 32 * entry.num_warps
        self._block = (self.num_threads, 1, 1)
        self._parameters = tuple(item for item in entry.parameters if item.name not in SCRATCH)
        self._names = {item.name for item in self._parameters}
        self._scratch = (np.uint64(0),) * (len(entry.parameters) - len(self._parameters))

    def launch(self, stream: Stream, num_programs: int, **values: Value) -> None:
        """Run `num_programs` programs in the order of `stream`; returns at once.

        Args:
            stream: a stream of the device that loaded the kernel.
            num_programs: blocks, in x; 1 to 2^31 - 1.
            values: every parameter by name: addresses, integers, floats; for a tensor map a
                `DeviceArray` of rows, or that and the elements from one row to the next.

        Raises:
            EngineError: arguments that do not fit the kernel (all at once).
        """
        self._kernel.launch(
            stream,
            grid=(num_programs, 1, 1),
            block=self._block,
            shared_bytes=self.cubin.shared_bytes,
            arguments=self.arguments(**values),
        )

    def arguments(self, **values: Value) -> tuple[np.generic, ...]:
        """Return the scalars that a launch passes, in the kernel's order and of its types.

        A tensor map is 128 bytes, followed by its array's shape and strides.

        Raises:
            EngineError: as `launch`.
        """
        if values.keys() != self._names:
            missing = sorted(self._names - values.keys())
            unknown = sorted(values.keys() - self._names)
            message = f"{self.name}: missing [{named(missing)}], unknown [{named(unknown)}]"
            raise EngineError(message)
        faults = [
            fault
            for item in self._parameters
            if item.name in self._maps or not _fits(item, values[item.name])
            for fault in _value_faults(item, values[item.name], self._maps.get(item.name))
        ]
        if faults:
            raise EngineError(f"{self.name} does not take these arguments", faults=faults)
        scalars: list[np.generic] = []
        for item in self._parameters:
            value = values[item.name]
            if isinstance(value, (DeviceArray, tuple)):
                scalars += self._encoded(self._maps[item.name], *_rows(value))
            else:
                scalars.append(SCALARS.get(item.type, np.uint64)(value))
        return (*scalars, *self._scratch)

    def _encoded(self, form: TensorMap, array: DeviceArray, stride: int) -> Iterator[np.generic]:
        yield self._device.tensor_map(
            array, form.block, row_stride=stride, swizzle=form.swizzle, element=form.element
        )
        yield from map(np.int32, array.shape)
        yield from (np.int64(stride), np.int64(1))


class KernelLibrary:
    """The compiled kernels, for one GPU. Load them at set-up, never while requests run."""

    def __init__(
        self,
        device: Device,
        compute_capability: tuple[int, int],
        *,
        folder: Path | None = None,
    ):
        """Read what there is; loads nothing yet.

        Args:
            device: loads the cubins and keeps them as long as it lives.
            compute_capability: of the GPU, major and minor.
            folder: where cubins and their manifest lie; None: all of the package's own.

        Raises:
            EngineError: the manifest is missing or damaged.
        """
        self._device, self._capability = device, compute_capability
        self._kernels = all_kernels()
        if folder is not None:
            kernels = read_manifest(folder).kernels
            self._kernels = {name: (folder, entry) for name, entry in kernels.items()}
        self._loaded: dict[str, LoadedKernel] = {}

    def has(self, name: str) -> bool:
        """Return whether a kernel of this name runs on this GPU."""
        return name in self._kernels and runs_on(self._kernels[name][1], self._capability)

    def kernel(self, name: str) -> LoadedKernel:
        """Return a kernel by the name of its variant, loaded at the first call.

        Raises:
            EngineError: no such kernel, none for this GPU, or its file is damaged.
        """
        if name not in self._loaded:
            if name not in self._kernels:
                raise EngineError(f"no kernel is called {name!r}", hint="see kernels/variants.py")
            folder, entry = self._kernels[name]
            cubin = choose_cubin(entry, self._capability)
            module = self._device.load_module(_read(folder / cubin.file, cubin))
            kernel = module.kernel(entry.symbol, cubin.shared_bytes)
            self._loaded[name] = LoadedKernel(name, entry, cubin, kernel, self._device)
        return self._loaded[name]


def choose_cubin(entry: KernelEntry, compute_capability: tuple[int, int]) -> Cubin:
    """Return the cubin for a GPU: its own, else the latest before it of the same major version.

    A cubin for one very chip runs on no later one.

    Raises:
        EngineError: there is none.
    """
    if fitting := _fitting(entry, compute_capability):
        return max(fitting, key=lambda cubin: _version(cubin.compute_capability))
    major, minor = compute_capability
    known = ", ".join(cubin.compute_capability for cubin in entry.cubins)
    raise EngineError(
        f"no kernel was compiled for compute capability {major}.{minor}, only for {known}",
        hint="add it to COMPUTE_CAPABILITIES in kernels/variant.py, then: make kernels",
    )


def runs_on(entry: KernelEntry, compute_capability: tuple[int, int]) -> bool:
    """Return whether a kernel has a cubin for a GPU."""
    return bool(_fitting(entry, compute_capability))


def _fitting(entry: KernelEntry, compute_capability: tuple[int, int]) -> list[Cubin]:
    major, minor = compute_capability
    versions = [(_version(cubin.compute_capability), cubin) for cubin in entry.cubins]
    return [
        cubin
        for version, cubin in versions
        if version == compute_capability
        or (not cubin.exact and version[0] == major and version[1] <= minor)
    ]


def _version(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def _read(path: Path, cubin: Cubin) -> bytes:
    """Read a cubin and compare its hash: a damaged one would fail somewhere in the driver."""
    try:
        code = path.read_bytes()
    except OSError as error:
        message = f"the compiled kernel {path} cannot be read: {error}"
        raise EngineError(message, hint="make kernels") from error
    digest = hashlib.sha256(code).hexdigest()
    if digest != cubin.sha256:
        message = f"{path} is damaged: its SHA-256 is {digest}, expected {cubin.sha256}"
        raise EngineError(message, hint="make kernels")
    return code


def _value_faults(parameter: Parameter, value: Value, form: TensorMap | None) -> Iterator[str]:
    if form is not None:
        yield from _map_faults(form, value)
    else:
        yield f"{parameter.name}: got {value}, expected {_domain(parameter)}"


def _map_faults(form: TensorMap, value: Value) -> Iterator[str]:
    """Yield what the copy engine does not take: it counts in units of 16 bytes."""
    if not isinstance(value, (DeviceArray, tuple)):
        yield f"{form.name}: got {value}, expected an array in device memory"
        return
    array, stride = _rows(value)
    if array.ndim != 2 or array.dtype.itemsize != form.element_bytes or not all(array.shape):
        shown = f"{array.dtype} {list(array.shape)}"
        yield f"{form.name}: got {shown}, expected rows of values of {form.element_bytes} bytes"
    elif array.address % 16 or stride * form.element_bytes % 16 or stride < array.shape[1]:
        yield (
            f"{form.name}: got address {array.address} and rows {stride} apart, expected both on "
            f"16 bytes, and rows of {array.shape[1]}"
        )


def _rows(value: DeviceArray | tuple[DeviceArray, int]) -> tuple[DeviceArray, int]:
    """Return an array and the elements from one of its rows to the next."""
    return value if isinstance(value, tuple) else (value, value.shape[-1])


def _fits(parameter: Parameter, value: Value) -> bool:
    if isinstance(value, (DeviceArray, tuple)):
        return False
    if parameter.type == "fp32":
        return True
    low, high = RANGES.get(parameter.type, ADDRESSES)
    whole = isinstance(value, (int, np.integer))
    return whole and low <= value <= high and value % parameter.multiple_of == 0


def _domain(parameter: Parameter) -> str:
    kind = "an address" if parameter.type.startswith("*") else f"a {parameter.type}"
    return kind if parameter.multiple_of == 1 else f"{kind} that {parameter.multiple_of} divides"
