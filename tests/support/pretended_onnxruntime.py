"""onnxruntime with a CUDA provider over a pretended GPU: the real CPU library on its addresses.

"Device memory" is host memory there, so the real library reads and writes what was bound. What a
run leaves behind, and what freeing a session then does, is as onnxruntime-gpu 1.31.1 does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import onnxruntime as real

from pretended_gpu import Machine

PROVIDER, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
ON_CPU = ("/text/slots/Squeeze", "/text/slots/Cast")


class Binding:
    """An IO binding that takes addresses of the pretended GPU."""

    def __init__(self, session: Session):
        self.raw, self.gpu = session.raw.io_binding(), session.options["device_id"]
        self.bind_input = lambda *array: self._bind(self.raw.bind_input, *array)
        self.bind_output = lambda *array: self._bind(self.raw.bind_output, *array)

    def _bind(self, bind: Any, name: str, place: str, gpu: int, *array: Any) -> None:
        assert (place, str(gpu)) == ("cuda", self.gpu), name
        bind(name, "cpu", 0, *array)


class RunOptions:
    def __init__(self) -> None:
        self.waits = True

    def add_run_config_entry(self, name: str, value: str) -> None:
        assert (name, value) == ("disable_synchronize_execution_providers", "1")
        self.waits = False


class Session:
    """An InferenceSession; a run that does not wait leaves host buffers until one that waits."""

    machine: Machine
    starts: bool
    on_cpu: Sequence[str]

    def __init__(self, path: str, options: Any, *, providers: Any, enable_fallback: int):
        assert enable_fallback == 0, "it would run on the CPU where CUDA fails"
        ((name, self.options),) = providers
        assert name == PROVIDER
        self.raw = real.InferenceSession(path, options, providers=[CPU])
        self.left = 0
        self.machine.calls.append(("session", self.options))

    def get_providers(self) -> list[str]:
        return [PROVIDER, CPU] if self.starts else [CPU]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        parts = self.raw.get_provider_graph_assignment_info()
        return [
            SimpleNamespace(
                ep_name=CPU if node.name in self.on_cpu else PROVIDER,
                get_nodes=lambda node=node: [node],
            )
            for part in parts
            for node in part.get_nodes()
        ]

    def io_binding(self) -> Binding:
        return Binding(self)

    def run_with_iobinding(self, binding: Binding, options: RunOptions) -> None:
        self.raw.run_with_iobinding(binding.raw)
        self.left = 0 if options.waits else self.left + 1
        self.machine.calls.append(("run that waits" if options.waits else "run", None))

    def __del__(self) -> None:
        self.machine.calls.append(("abort" if getattr(self, "left", 0) else "freed", None))


def make_onnxruntime(
    machine: Machine,
    *,
    providers: Sequence[str] = (PROVIDER, CPU),
    starts: bool = True,
    on_cpu: Sequence[str] = ON_CPU,
    cuda_version: str = "",
) -> Any:
    """Return the part of the module that the backend uses.

    Args:
        starts: whether the CUDA provider can start; else sessions run on the CPU.
        on_cpu: the nodes that it leaves to the CPU.
    """
    module: Any = ModuleType("onnxruntime")
    module.__version__, module.cuda_version = "1.31.1", cuda_version
    module.get_available_providers = lambda: list(providers)
    module.SessionOptions, module.RunOptions = real.SessionOptions, RunOptions
    module.GraphOptimizationLevel = real.GraphOptimizationLevel
    module.preload_dlls = lambda: print("Failed to load libcudart.so.13: not on this machine")
    facts = {"machine": machine, "starts": starts, "on_cpu": on_cpu}
    module.CudaSession = type("CudaSession", (Session,), facts)
    module.InferenceSession = sessions_of(module.CudaSession)
    return module


def sessions_of(kind: type[Session]) -> Any:
    """Return what opens sessions on CUDA as `kind`, and all others as the real library does."""

    class InferenceSession(kind):
        def __new__(cls, path: Any, options: Any = None, providers: Any = None, **more: Any) -> Any:
            if providers == [CPU]:  # the float32 reference
                return real.InferenceSession(path, options, providers=providers, **more)
            return super().__new__(cls)

    return InferenceSession
