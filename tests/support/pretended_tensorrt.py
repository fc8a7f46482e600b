"""A stand-in for the `tensorrt` module: records every call and computes real scores.

It runs over a pretended GPU, whose memory is host memory: an address that the engine was given is
read and written for real. Its engine scores a pair as `ToyEngine` does: first token value + sum of
the query's ids/1024.
"""

from __future__ import annotations

import enum
from collections import namedtuple
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from pretended_gpu import array_at

PLAN_BYTES = b"plan of the stand-in"
TIMINGS = b"timings of the stand-in"
KERNELS = b"kernels of the stand-in"
Tensor = namedtuple("Tensor", "name dtype shape")
TYPES = ("FLOAT", "HALF", "INT8", "INT32", "BF16", "FP8")
DataType = enum.Enum("DataType", TYPES)
JOINT_ENCODER = {
    "text_ids": ("INT32", (-1, -1)),
    "text_length": ("INT32", (-1,)),
    "query_of_pair": ("INT32", (-1,)),
    "visual_tokens": ("HALF", (-1, 4, 8)),
    "scores": ("FLOAT", (-1,)),
}


class Refusals(SimpleNamespace):
    """What the stand-in shall refuse: set an attribute to make a call fail."""

    parse: list[tuple[str, str, str]]
    build: str | None
    timing_cache: bool
    deserialize: str | None
    execute: bool


@dataclass
class Recording:
    """The calls in order, as (name, arguments), and what shall be refused."""

    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(
        default_factory=lambda: dict(JOINT_ENCODER)
    )
    refused: Refusals = field(
        default_factory=lambda: Refusals(
            parse=[], build=None, timing_cache=False, deserialize=None, execute=False
        )
    )

    def add(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, arguments))

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        return [arguments for name, arguments in self.calls if name in names]

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


def make_tensorrt(recording: Recording, version: str = "10.13.3.9") -> ModuleType:
    """Return a module with the part of TensorRT's interface that the backend uses."""
    module: Any = ModuleType("tensorrt")
    module.__version__ = version
    module.recording = recording
    module.BuilderFlag = enum.IntEnum("BuilderFlag", "VERSION_COMPATIBLE TF32")
    module.NetworkDefinitionCreationFlag = enum.IntEnum(
        "NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1}
    )
    module.ProfilingVerbosity = enum.Enum("ProfilingVerbosity", "LAYER_NAMES_ONLY DETAILED")
    module.ExecutionContextAllocationStrategy = enum.Enum(
        "ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED"
    )
    module.MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE")
    module.HardwareCompatibilityLevel = enum.Enum("HardwareCompatibilityLevel", "AMPERE_PLUS")
    for kind in (ILogger, IProgressMonitor, Builder, OnnxParser, Runtime):
        setattr(module, kind.__name__, type(kind.__name__, (kind,), {"recording": recording}))
    return module


class ILogger:
    Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")
    recording: Recording


class IProgressMonitor:
    recording: Recording


class Builder:
    recording: Recording

    def __init__(self, logger: Any):
        self.logger = logger

    def create_network(self, flags: int) -> Any:
        self.recording.add("create_network", flags)
        return Network(self.recording)

    def create_builder_config(self) -> Any:
        return Config(self.recording)

    def create_optimization_profile(self) -> Any:
        return SimpleNamespace(
            set_shape=lambda name, *limits: self.recording.add("set_shape", name, limits)
        )

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        self.recording.add("build_serialized_network", config)
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 2)
        monitor.phase_start("Timing tactics", "Building engine", 4)
        going = [monitor.step_complete("Timing tactics", step) for step in range(4)]
        monitor.phase_finish("Timing tactics")
        if self.recording.refused.build is not None:
            self.logger.log(ILogger.Severity.ERROR, self.recording.refused.build)
            return None
        return PLAN_BYTES if all(going) else None


class Network:
    def __init__(self, recording: Recording):
        tensors = [
            Tensor(name, DataType[dtype], shape)
            for name, (dtype, shape) in recording.tensors.items()
        ]
        self._inputs = [tensor for tensor in tensors if tensor.name != "scores"]
        self._outputs = [tensor for tensor in tensors if tensor.name == "scores"]
        self.num_inputs, self.num_outputs = len(self._inputs), len(self._outputs)

    def get_input(self, index: int) -> Tensor:
        return self._inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self._outputs[index]


class Config:
    """Records what is set, by attribute or by call."""

    def __init__(self, recording: Recording):
        object.__setattr__(self, "recording", recording)

    def __setattr__(self, name: str, value: Any) -> None:
        self.recording.add(name, value)
        object.__setattr__(self, name, value)

    def clear_flag(self, flag: Any) -> None:
        self.recording.add("clear_flag", flag.name)

    def set_flag(self, flag: Any) -> None:
        self.recording.add("set_flag", flag.name)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.recording.add("set_memory_pool_limit", pool.name, size)

    def add_optimization_profile(self, profile: Any) -> int:
        self.recording.add("add_optimization_profile")
        return 0

    def create_timing_cache(self, blob: bytes) -> Any:
        self.recording.add("create_timing_cache", blob)
        return SimpleNamespace(serialize=lambda: TIMINGS, blob=blob)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self.recording.add("set_timing_cache", cache.blob, ignore_mismatch)
        object.__setattr__(self, "cache", cache)
        return not (cache.blob and self.recording.refused.timing_cache)

    def get_timing_cache(self) -> Any:
        return self.__dict__["cache"]


class OnnxParser:
    recording: Recording

    def __init__(self, network: Any, logger: Any):
        self.num_errors = len(self.recording.refused.parse)

    def parse_from_file(self, path: str) -> bool:
        self.recording.add("parse_from_file", path)
        return self.num_errors == 0

    def get_error(self, index: int) -> Any:
        operator, name, reason = self.recording.refused.parse[index]
        return SimpleNamespace(
            node=lambda: index,
            node_name=lambda: name,
            node_operator=lambda: operator,
            desc=lambda: reason,
        )


class Runtime:
    recording: Recording

    def __init__(self, logger: Any):
        self.logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        self.recording.add("deserialize_cuda_engine", plan, self.engine_host_code_allowed)
        if self.recording.refused.deserialize is not None:
            self.logger.log(ILogger.Severity.ERROR, self.recording.refused.deserialize)
            return None
        return CudaEngine(self.recording)


class CudaEngine:
    def __init__(self, recording: Recording):
        self.recording = recording

    def create_execution_context(self, *arguments: Any) -> ExecutionContext:
        self.recording.add("create_execution_context", *arguments)
        return ExecutionContext(self.recording)


class RtxEngine(CudaEngine):
    """Adds TensorRT-RTX's runtime configuration; every strategy that is set is recorded."""

    def create_runtime_config(self) -> Any:
        recording = self.recording

        class RuntimeConfig(Config):
            def create_runtime_cache(self) -> Any:
                return SimpleNamespace(
                    deserialize=lambda blob: recording.add("cache.deserialize", blob) or True,
                    serialize=lambda: KERNELS,
                )

            def set_execution_context_allocation_strategy(self, strategy: Any) -> bool:
                recording.add("set_execution_context_allocation_strategy", strategy.name)
                return True

            def set_runtime_cache(self, cache: Any) -> bool:
                recording.add("set_runtime_cache")
                return True

        return RuntimeConfig(recording)


class ExecutionContext:
    def __init__(self, recording: Recording):
        self.recording = recording
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile: int | None = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.recording.add("set_optimization_profile_async", index, stream)
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.recording.add("set_input_shape", name, tuple(shape))
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.recording.add("set_tensor_address", name, address)
        self.addresses[name] = address
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        self.recording.add("update_device_memory_size_for_shapes", dict(self.shapes))
        return 1_000_000 * self.shapes["query_of_pair"][0]

    def set_device_memory(self, memory: int, size: int) -> None:
        self.recording.add("set_device_memory", memory, size)

    def execute_async_v3(self, stream: int) -> bool:
        self.recording.add("execute_async_v3", stream, self.profile)
        if self.recording.refused.execute:
            return False
        read = self._read
        text_ids, text_length = read("text_ids", np.int32), read("text_length", np.int32)
        query_of_pair = read("query_of_pair", np.int32)
        tokens = read("visual_tokens", np.float16)
        inside = np.arange(text_ids.shape[1]) < text_length[:, None]
        text = (text_ids * inside).sum(1) / 1024
        scores = array_at(self.addresses["scores"], query_of_pair.shape, np.float32)
        scores[:] = tokens[:, 0, 0] + text[query_of_pair]
        return True

    def _read(self, name: str, dtype: Any) -> np.ndarray:
        return array_at(self.addresses[name], self.shapes[name], dtype)
