"""Stand-ins for cuda.core, the driver's bindings and pycuda over one pretended machine.

"Device memory" is host memory, so every copy and every address is real. The machine keeps a stack
of current contexts for each thread and refuses, as CUDA does, what is made or used without one.
Work runs at once, in the order it is submitted. What a launch of our own copying kernels does is
told by the manifest's entry of the cubin, and done by the references.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edje.kernels import references
from edje.kernels.cuda_manifest import all_kernels
from edje.kernels.device import facts, measuring
from edje.kernels.manifest import KernelEntry

GPU_NAME = "NVIDIA Stand-in 80GB"
CUBIN = b"cubin of the stand-in"
NUM_PROCESSORS = 4
COPIES = ("gather_tokens", "scatter_tokens")
CUBIN_TYPES = ("*i8", "i32")  # what its kernel takes
SCALARS = {"i32": "int32", "i64": "int64", "fp32": "float32", "map": "V128"}
PRIMARY, FOREIGN = "primary context", "foreign context"


class Refused(Exception):
    """What the libraries raise."""


@dataclass
class Machine:
    """What was called, what is alive, which context is current, what shall fail."""

    calls: list[tuple[str, Any]] = field(default_factory=list)
    alive: dict[str, int] = field(default_factory=dict)
    memory: dict[int, Any] = field(default_factory=dict)
    capability: tuple[int, int] = (9, 0)
    clock: int = 0
    broken: str | None = None
    refused: str = ""
    free_bytes: int = 1 << 30
    capturing: list[Any] | None = None
    capturing_stream: int | None = None
    breaks_captures: bool = False
    threads: threading.local = field(default_factory=threading.local)

    @property
    def contexts(self) -> list[str]:
        if not hasattr(self.threads, "contexts"):
            self.threads.contexts = []
        return self.threads.contexts

    def call(self, name: str, argument: Any = None) -> None:
        """Note a call that needs a context; fail as a broken GPU does."""
        self.calls.append((name, argument))
        if self.broken is not None:
            raise Refused(self.broken)
        if not self.contexts or self.contexts[-1] == FOREIGN:
            raise Refused(f"{name}: invalid device context")

    def make(self, kind: str, by: int = 1) -> None:
        self.alive[kind] = self.alive.get(kind, 0) + by

    def allocate(self, kind: str, num_bytes: int) -> int:
        self.call(kind, num_bytes)
        if num_bytes > self.free_bytes:
            raise Refused("out of memory")
        memory = (ctypes.c_char * num_bytes)(*b"\xee" * min(num_bytes, 64))
        self.memory[ctypes.addressof(memory)] = memory
        self.make(kind)
        return ctypes.addressof(memory)

    def free(self, kind: str, address: int) -> None:
        self.call(f"free {kind}")
        del self.memory[address]
        self.make(kind, -1)

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        self.call("copy", (num_bytes, stream))
        if self.capturing is not None and stream == self.capturing_stream:
            self.capturing.append((target, source, num_bytes))
        else:
            ctypes.memmove(target, source, num_bytes)

    def named(self, name: str) -> list[Any]:
        return [argument for called, argument in self.calls if called == name]


class Thing:
    """A stream, an event, ...: alive until it is closed (cuda.core) or forgotten (pycuda)."""

    def __init__(self, machine: Machine, kind: str, options: Any = None):
        self.machine, self.kind, self.options = machine, kind, options
        machine.call(kind, options)
        machine.make(kind)
        self.is_alive = True
        self.time = 0

    def close(self) -> None:
        if self.is_alive:
            self.machine.call(f"close {self.kind}")
            self.machine.make(self.kind, -1)
            self.is_alive = False

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()

    def pass_now(self) -> None:
        self.machine.clock += 1
        self.time = self.machine.clock

    def sync(self) -> None:
        self.machine.call(f"sync {self.kind}")

    synchronize = sync


class FakeEvent(Thing):
    def __sub__(self, other: FakeEvent) -> float:
        return float(self.time - other.time)

    def time_since(self, other: FakeEvent) -> float:
        return self - other

    def record(self, stream: Any) -> None:
        self.machine.call("record", stream.handle)
        self.pass_now()


class FakeStream(Thing):
    device = SimpleNamespace(device_id=0)

    @property
    def handle(self) -> int:
        return id(self)

    def record(self, event: FakeEvent) -> None:
        event.record(self)

    def wait(self, event: FakeEvent) -> None:
        self.machine.call("wait", self.handle)

    wait_for_event = wait

    def is_done(self) -> bool:
        if self.machine.broken is not None:
            raise Refused(self.machine.broken)
        return True

    def create_graph_builder(self) -> FakeBuilder:
        return FakeBuilder(self.machine, self.handle)


class ForeignStream(FakeStream):
    """Somebody else's stream, as cuda.core sees it through `__cuda_stream__`."""

    handle = 0

    def __init__(self, machine: Machine, foreign: Any):
        super().__init__(machine, "foreign stream")
        _, self.handle = foreign.__cuda_stream__()
        self.device = SimpleNamespace(device_id=getattr(foreign.owner, "gpu", 0))


class FakeBuilder(Thing):
    """As cuda.core has it: a capture that broke is ended by `close` only, which then raises."""

    def __init__(self, machine: Machine, stream: int):
        super().__init__(machine, "graph builder")
        self.stream = stream

    def begin_building(self, mode: str) -> None:
        self.machine.call("begin_building", (mode, self.stream))
        self.machine.capturing, self.machine.capturing_stream = [], self.stream

    def end_building(self) -> None:
        if self.machine.breaks_captures:
            raise Refused("build process has been invalidated")
        self.captured, self.machine.capturing = self.machine.capturing, None

    def complete(self) -> FakeGraph:
        return FakeGraph(self.machine, "graph", self.captured)

    def close(self) -> None:
        was_capturing, self.machine.capturing = self.machine.capturing is not None, None
        if was_capturing and self.machine.breaks_captures:
            raise Refused("operation failed due to a previous error during capture")
        super().close()


class FakeGraph(Thing):
    def launch(self, stream: FakeStream) -> None:
        assert self.is_alive, "a graph was launched after it was closed"
        self.machine.call("launch graph", stream.handle)
        for target, source, num_bytes in self.options:
            self.machine.copy(target, source, num_bytes, stream.handle)


class FakeBuffer:
    def __init__(self, machine: Machine, kind: str, num_bytes: int):
        self.machine, self.kind = machine, kind
        self.handle = machine.allocate(kind, num_bytes)

    def close(self) -> None:
        self.machine.free(self.kind, self.handle)

    free = close

    def __int__(self) -> int:
        return self.handle


class FakeKernel:
    """A kernel that is only noted; of our own cubins the copying ones do copy."""

    def __init__(self, machine: Machine, entry: KernelEntry | None):
        self.machine, self.entry = machine, entry
        self.most_shared = 48 << 10

    @property
    def handle(self) -> FakeKernel:
        return self

    def allow_shared(self, num_bytes: int) -> None:
        self.machine.call("allow shared", num_bytes)
        self.most_shared = num_bytes

    def set_attribute(self, attribute: int, value: int) -> None:
        if attribute == CARVEOUT:
            assert (value, self.most_shared > 0) == (100, True)
            return
        assert attribute == MAX_SHARED
        self.allow_shared(value)

    def unpacked(self, address: int) -> tuple[np.generic, ...]:
        """Read what lies at the addresses of `kernelParams`, as the driver does."""
        types = CUBIN_TYPES if self.entry is None else self.entry.passed_types()
        pointers = (ctypes.c_uint64 * len(types)).from_address(address)
        dtypes = [np.dtype(SCALARS.get(kind, "uint64")) for kind in types]
        return tuple(
            np.frombuffer(ctypes.string_at(pointer, dtype.itemsize), dtype)[0]
            for pointer, dtype in zip(pointers, dtypes, strict=True)
        )

    def __call__(self, *arguments: Any, **how: Any) -> None:
        if how["shared"] > self.most_shared:
            raise Refused("invalid argument")
        self.machine.call("launch", (how["grid"], how["block"], how["shared"], arguments))
        if self.entry is not None and self.entry.symbol in COPIES:
            copy_of(self.entry, how["grid"][0], arguments).run()


def load_cubin(machine: Machine, code: bytes) -> Any:
    machine.call("load", code)
    entry = None if code == CUBIN else entry_of(code)
    if code != CUBIN and entry is None:
        raise Refused("no kernel image is available")

    def find(symbol: str) -> FakeKernel:
        if symbol != ("gather_tokens" if entry is None else entry.symbol):
            raise Refused("named symbol not found")
        return FakeKernel(machine, entry)

    return SimpleNamespace(get_kernel=find, get_function=find)


def make_driver_library(machine: Machine) -> Any:
    """The part of `libcuda.so.1` that is called without its bindings, with C's own types."""
    word, number, place = ctypes.c_uint32, ctypes.c_int, ctypes.c_void_p
    words, wides = ctypes.POINTER(word), ctypes.POINTER(ctypes.c_uint64)

    @ctypes.CFUNCTYPE(number, place, number, word, place, wides, wides, words, words, *[number] * 4)
    def encode_tiled(
        target: int, element: int, rank: int, address: int, sizes: Any, strides: Any, block: Any,
        steps: Any, interleave: int, swizzle: int, promotion: int, fill: int,
    ) -> int:  # fmt: skip
        """Refuse what the driver refuses; write what the map was made of into its 128 bytes."""
        told = [*sizes[:rank], *strides[: rank - 1], *block[:rank]]
        aligned = address % 16 == 0 and strides[0] % 16 == 0 and target % 128 == 0
        width = (1 if element == 0 else 2) * block[0]
        narrow = width <= {1: 32, 2: 64, 3: 128}.get(swizzle, 512) and max(block[:rank]) <= 256
        usual = (steps[:rank], interleave, promotion, fill) == ([1] * rank, 0, 2, 0)
        if not (aligned and narrow and usual and min(sizes[:rank]) > 0):
            machine.refused = "invalid argument"
            return 1
        (ctypes.c_uint64 * 16).from_address(target)[:] = [
            *(numbers := [address, *told, swizzle, element]),
            *[0] * (16 - len(numbers)),
        ]
        return 0

    return SimpleNamespace(cuTensorMapEncodeTiled=encode_tiled)


MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT


def add_kernels(machine: Machine, module: Any) -> None:
    """Add what the driver has for kernels to its stand-in."""

    def function_of(kernel: FakeKernel) -> FakeKernel:
        machine.call("function")
        return kernel

    def set_attribute(function: FakeKernel, attribute: int, value: int) -> None:
        function.set_attribute(attribute, value)

    def launch(function: FakeKernel, *how: Any) -> None:
        *sizes, shared, _stream, parameters, _extra = how
        grid, block = tuple(sizes[:3]), tuple(sizes[3:])
        function(*function.unpacked(parameters), grid=grid, block=block, shared=shared)

    functions = {
        "cuKernelGetFunction": function_of,
        "cuFuncSetAttribute": set_attribute,
        "cuLaunchKernel": launch,
    }
    for name, work in functions.items():
        setattr(module, name, _guarded(machine, work))
    module.CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=MAX_SHARED,
        CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT=CARVEOUT,
    )
    module.CUresult = int


def make_driver(machine: Machine) -> ModuleType:
    """The part of cuda.bindings.driver that is used."""
    module: Any = ModuleType(facts.BINDINGS)

    def set_current(context: Any) -> None:
        machine.contexts[-1:] = [] if context is None else [context]

    def pin(num_bytes: int, flags: int) -> int:
        machine.calls.append(("cuMemHostAlloc", (num_bytes, "portable" if flags == 1 else flags)))
        return machine.allocate("pinned", num_bytes)

    def current_device() -> int:
        if not machine.contexts:
            raise Refused("invalid device context")
        return 0

    def copy_2d(copy: Any, stream: int) -> None:
        machine.call("copy 2d", stream)
        for row in range(copy.Height):
            target, source = (
                copy.dstDevice + row * copy.dstPitch,
                copy.srcDevice + row * copy.srcPitch,
            )
            ctypes.memmove(target, source, copy.WidthInBytes)

    functions = {
        "cuInit": lambda flags: None,
        "cuDriverGetVersion": lambda: 13000,
        "cuDeviceGetCount": lambda: 1,
        "cuDeviceGet": lambda index: index,
        "cuDeviceGetName": lambda length, device: GPU_NAME.encode().ljust(length, b"\0"),
        "cuDeviceGetAttribute": lambda attribute, device: machine.capability[attribute],
        "cuCtxGetDevice": current_device,
        "cuCtxGetCurrent": lambda: machine.contexts[-1] if machine.contexts else None,
        "cuCtxSetCurrent": set_current,
        "cuCtxPushCurrent": lambda context: machine.contexts.append(context),
        "cuCtxPopCurrent": lambda: machine.contexts.pop(),
        "cuCtxSynchronize": lambda: machine.call("synchronize"),
        "cuMemcpyAsync": machine.copy,
        "cuMemcpy2DAsync": copy_2d,
        "cuMemHostAlloc": pin,
        "cuMemFreeHost": lambda address: machine.free("pinned", address),
        "cuMemGetInfo": lambda: machine.free_bytes,
    }
    for name, work in functions.items():
        setattr(module, name, _guarded(machine, work))
    add_kernels(machine, module)
    module.cuStreamQuery = lambda handle: (700 if machine.broken else 0,)
    module.cuGetErrorString = lambda error: (0, (machine.broken or machine.refused).encode())
    module.CU_MEMHOSTALLOC_PORTABLE = 1
    module.CUDA_MEMCPY2D = SimpleNamespace
    module.CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_DEVICE=2)
    module.CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=0,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=1,
    )
    return module


def _guarded(machine: Machine, work: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """Return `work` as the bindings have it: an error's number, and the result."""

    def run(*arguments: Any) -> tuple[Any, ...]:
        try:
            return 0, work(*arguments)
        except Refused as refused:
            machine.refused = str(refused)
            return (700,)

    return run


class FakeCoreDevice:
    """cuda.core.Device."""

    device_id = 0
    name = GPU_NAME

    def __init__(self, machine: Machine):
        self.machine = machine
        self.compute_capability = machine.capability
        self.properties = SimpleNamespace(multiprocessor_count=NUM_PROCESSORS)
        self.context = SimpleNamespace(handle=PRIMARY)

    def set_current(self) -> None:
        self.machine.contexts[-1:] = [PRIMARY]

    def create_stream(self, obj: Any = None, options: Any = None) -> Any:
        if obj is None:
            return FakeStream(self.machine, "stream", options)
        return ForeignStream(self.machine, obj)

    def create_event(self, options: Any) -> FakeEvent:
        return FakeEvent(self.machine, "event", options)

    def allocate(self, num_bytes: int, stream: FakeStream) -> FakeBuffer:
        return FakeBuffer(self.machine, "device", num_bytes)


def make_core(machine: Machine, version: str = "1.2.2") -> ModuleType:
    """The part of cuda.core that the device uses."""
    module: Any = ModuleType("cuda.core")
    module.__version__ = version
    module.Device = lambda index: FakeCoreDevice(machine)
    module.StreamOptions = module.EventOptions = SimpleNamespace
    module.ObjectCode = SimpleNamespace(from_cubin=lambda code: load_cubin(machine, code))
    return module


class FakePycudaContext:
    """pycuda.driver.Context: pushed on an object, popped on the class."""

    machine: Machine

    def __init__(self, name: str):
        self.name = name

    def push(self) -> None:
        self.machine.contexts.append(self.name)

    @classmethod
    def pop(cls) -> None:
        cls.machine.contexts.pop()

    @classmethod
    def synchronize(cls) -> None:
        cls.machine.call("synchronize")

    def get_device(self) -> Any:
        return SimpleNamespace(
            name=lambda: GPU_NAME,
            compute_capability=lambda: self.machine.capability,
            multiprocessor_count=NUM_PROCESSORS,
        )


def make_pycuda(machine: Machine) -> ModuleType:
    """The part of pycuda.driver that the device uses."""
    module: Any = ModuleType("pycuda.driver")
    module.Error = Refused
    module.init = lambda: machine.calls.append(("init", None))
    module.Context = type("Context", (FakePycudaContext,), {"machine": machine})

    class Device:
        def __init__(self, index: int):
            self.index = index

        count = staticmethod(lambda: 1)

        def retain_primary_context(self) -> Any:
            return module.Context(PRIMARY)

    def pagelocked_empty(num_bytes: int, dtype: Any) -> Any:
        buffer = FakeBuffer(machine, "pinned", num_bytes)
        memory = (ctypes.c_uint8 * num_bytes).from_address(buffer.handle)
        return owned_by(buffer, np.ctypeslib.as_array(memory))

    class Stream(FakeStream):
        def __init__(self, flags: int):
            super().__init__(machine, "stream", flags)

    class Event(FakeEvent):
        def __init__(self, flags: int):
            super().__init__(machine, "event", flags)

    def copy_in(target: int, source: np.ndarray, stream: Stream) -> None:
        machine.copy(target, source.ctypes.data, source.nbytes, stream.handle)

    def copy_out(target: np.ndarray, source: int, stream: Stream) -> None:
        machine.copy(target.ctypes.data, source, target.nbytes, stream.handle)

    module.Device, module.Stream, module.Event = Device, Stream, Event
    module.event_flags = SimpleNamespace(BLOCKING_SYNC=1)
    module.function_attribute = SimpleNamespace(MAX_DYNAMIC_SHARED_SIZE_BYTES=MAX_SHARED)
    module.pagelocked_empty = pagelocked_empty
    module.mem_alloc = lambda num_bytes: FakeBuffer(machine, "device", num_bytes)
    module.memcpy_htod_async, module.memcpy_dtoh_async = copy_in, copy_out
    module.mem_get_info = lambda: (machine.free_bytes, 1 << 40)
    module.module_from_buffer = lambda code: load_cubin(machine, code)
    return module


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Let both GPU devices, and what measures on one, open on a pretended machine."""
    machine = Machine()
    monkeypatch.setattr(facts, "DRIVER", None)  # until a test names one that is not there
    library = make_driver_library(machine)
    found = lambda: library if facts.DRIVER is None else ctypes.CDLL(facts.DRIVER)  # noqa: E731
    monkeypatch.setattr(facts, "driver_library", found)
    monkeypatch.setattr(measuring, "measuring", cache(measuring.Measuring))
    monkeypatch.setitem(sys.modules, "cuda.core", make_core(machine))
    monkeypatch.setitem(sys.modules, facts.BINDINGS, make_driver(machine))
    monkeypatch.setitem(sys.modules, "pycuda.driver", make_pycuda(machine))
    return machine


def owned_by(owner: FakeBuffer, array: np.ndarray) -> np.ndarray:
    """Return `array` with `owner` as its `base`, which frees it, as pycuda's arrays have."""

    class Owned(np.ndarray):
        base = owner

    return array.view(Owned)


@dataclass(frozen=True)
class Copy:
    """One launch: records of bytes, with scales beside them in int8 variants.

    Attributes:
        numbers: int32 or int64 [P]: rows of a gather, places of a scatter.
        source, target: what it reads and writes, as (records, scales or None).
    """

    is_gather: bool
    numbers: np.ndarray
    source: tuple[np.ndarray, np.ndarray | None]
    target: tuple[np.ndarray, np.ndarray | None]

    def run(self) -> None:
        (tokens, scales), (out, out_scales) = self.source, self.target
        if self.is_gather:
            more = {"scales": scales, "out_scales": out_scales}
            references.gather_tokens(tokens, self.numbers, out, **more)
        else:
            more = {"scales": scales, "pool_scales": out_scales}
            references.scatter_tokens(tokens, self.numbers, out, **more)


def name_of(code: bytes) -> str | None:
    """Return the name of the kernel that this cubin of ours holds; None for other code."""
    digest = hashlib.sha256(code).hexdigest()
    kernels = ((name, entry.cubins) for name, (_, entry) in all_kernels().items())
    return next((n for n, cubins in kernels if any(c.sha256 == digest for c in cubins)), None)


def entry_of(code: bytes) -> KernelEntry | None:
    """Return the entry of the manifest that this cubin belongs to; None for other code."""
    name = name_of(code)
    return None if name is None else all_kernels()[name][1]


def copy_of(entry: KernelEntry, num_programs: int, arguments: Sequence[np.generic]) -> Copy:
    """Return what a launch with these arguments copies."""
    names = (parameter.name for parameter in entry.parameters)
    given = {name: value.item() for name, value in zip(names, arguments, strict=True)}
    is_gather = entry.symbol == "gather_tokens"
    assert is_gather or entry.symbol == "scatter_tokens", entry.symbol
    parts = -(-given["record_vectors"] // entry.constants["VECTORS"])
    assert num_programs % parts == 0, "a record is not copied whole"
    num_pairs, num_records = num_programs // parts, given["num_records"]
    numbers = "rows" if is_gather else "places"
    types = {parameter.name: parameter.type for parameter in entry.parameters}
    dtype = "int32" if types[numbers] == "*i32" else "int64"
    source_count, target_count = (num_records, num_pairs) if is_gather else (num_pairs, num_records)

    def records(tokens: str, scales: str, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        held = array_at(given[tokens], (count, given["record_vectors"] * 16), "uint8")
        if scales not in given:
            return held, None
        return held, array_at(given[scales], (count, given["num_scales"]), "float16")

    return Copy(
        is_gather,
        array_at(given[numbers], (num_pairs,), dtype),
        records("tokens", "scales", source_count),
        records("out_tokens", "out_scales", target_count),
    )


def array_at(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return memory as an array, without a copy."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = (ctypes.c_uint8 * num_bytes).from_address(address)
    return np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)
