"""What this machine can do at best, through the libraries that we use, and shares of it.

A float32, a bf16 and an int8 product as large as caches like it, by OpenVINO and ONNX Runtime (the
faster one counts), and a copy of memory by all threads. On a GPU: copies and products by PyTorch,
as `make gpu` measures them. Measured in the run whose figures are shares of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import Float32, even_parts
from ..bundle import ModelSizes
from ..engines.manifest import EngineManifest
from ..engines.registry import load_backend
from ..errors import EdjeError
from ..machine import usable_cores
from ..runtime.source import record_bytes
from .gpu_ceilings import flops_per_pair, measure_probe, probes, slots_of, timed
from .report import Measured
from .stage import Stage

if TYPE_CHECKING:
    import onnx

GROUP = "roof"
M, K, N = 2048, 4096, 2048
COPY_BYTES, SLOT_BYTES = 1 << 28, 1 << 24  # more than any cache; some 300 records
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}  # OpenVINO's, of what is not int8
GPU_KEYS = ("h2d", "memory", "fp16", "int8", "fp8")
COMPUTING = ("forward", "enqueue", "rank", "serve")
COPYING = {"read": "memcpy", "upload": "h2d"}


@dataclass(frozen=True, slots=True)
class Roof:
    """The best rates seen: operations/s by precision, bytes/s of `memcpy` (a GPU: `h2d`, `memory`).

    Attributes:
        rates: by name.
    """

    rates: Mapping[str, float]

    @classmethod
    def of(cls, measured: Sequence[Measured]) -> Roof:
        """Take the best of every kind among what was measured; the rest is no roof."""
        rates: dict[str, float] = {}
        for one in measured:
            if one.group == GROUP:
                key = one.name.split()[0]
                rates[key] = max(rates.get(key, 0.0), *one.rates.values())
        return cls(rates)

    def pairs_per_s(self, precision: str, wordpieces: int, sizes: ModelSizes) -> float | None:
        """Return the pairs/s that the products of a precision allow, all else free."""
        flops = flops_per_pair(slots_of(wordpieces, sizes), sizes)
        return self.rates[precision] / flops if precision in self.rates else None

    def with_share(
        self, one: Measured, precision: str, wordpieces: int, manifest: EngineManifest
    ) -> Measured:
        """Return the same with its share of the roof, where it has one.

        `read` and `upload` are bound by copying records, what runs the engine by the products of
        its precision.
        """
        sizes, speed = manifest.bundle.sizes, one.pairs_per_s
        most = None
        if one.name in COMPUTING:
            most = self.pairs_per_s(precision, wordpieces, sizes)
        elif one.name in COPYING and COPYING[one.name] in self.rates:
            shape = sizes.num_tokens, sizes.hidden
            most = self.rates[COPYING[one.name]] / record_bytes(shape, manifest.token_dtype)
        share = None if most is None or speed is None else speed / most
        return replace(one, share_of_roof=share)


@contextmanager
def open_roof(threads: int | None = None) -> Iterator[dict[str, Stage]]:
    """Yield the CPU's roofs as stages, to be measured in turns with what is a share of them.

    Args:
        threads: that engines may use; None: all cores.
    """
    with ThreadPoolExecutor(threads or usable_cores()) as pool:
        runs: dict[str, Product | Copy] = {"memcpy": Copy(pool, threads or usable_cores())}
        for precision in HINTS:
            if precision == "bf16" and load_backend("openvino").why_not(precision) is not None:
                continue
            runs[f"{precision} openvino"] = OpenVinoProduct(precision, threads)
            if precision != "bf16":
                runs[f"{precision} onnxruntime"] = OnnxRuntimeProduct(precision, threads)
        stages = {}
        for name, one in runs.items():
            one.run()
            one.check()
            counts = {one.unit: one.amount}
            stages[name] = Stage(name, one.run, 0, one.check, group=GROUP, work=counts)
        yield stages


class Copy:
    """A copy of `COPY_BYTES` into a buffer as large as a slot, again and again, by several threads.

    As reading a batch does, it takes from memory what no cache holds, into memory that one may.
    """

    unit = "bytes_per_s"

    def __init__(self, pool: ThreadPoolExecutor, num_threads: int):
        self.amount = COPY_BYTES
        self._source, self._target = np.ones(COPY_BYTES, np.uint8), np.zeros(SLOT_BYTES, np.uint8)
        self._parts = list(even_parts(SLOT_BYTES, -(-SLOT_BYTES // num_threads)))
        self._pool = pool

    def run(self) -> None:
        """Copy."""
        list(self._pool.map(self._copy, self._parts))

    def check(self) -> None:
        """Refuse a copy that left something out."""
        if not self._target.all():
            raise EdjeError("memcpy: not everything was copied")

    def _copy(self, part: slice) -> None:
        for start in range(0, COPY_BYTES, SLOT_BYTES):
            np.copyto(self._target[part], self._source[start : start + SLOT_BYTES][part])


class Product(ABC):
    """One large product by a library; subclasses run it."""

    unit = "flops_per_s"
    run: Callable[[], object]

    def __init__(self, precision: str, threads: int | None):
        self.precision, self.amount = precision, 2 * M * K * N
        self.given = np.random.default_rng(1).standard_normal((M, K)).astype(np.float32)
        self.out = np.zeros((M, N), np.float32)
        self._weights, model = _product(precision)
        self._open(model.SerializeToString(), threads)

    def check(self) -> None:
        """Compare the first row with NumPy's.

        Raises:
            EdjeError: it differs by more than the precision's rounding.
        """
        expected = self.given[0] @ self._weights
        error = float(np.linalg.norm(self.out[0] - expected) / np.linalg.norm(expected))
        if not error <= 0.02:
            raise EdjeError(f"{type(self).__name__} {self.precision}: {error:.1%} off NumPy's")

    @abstractmethod
    def _open(self, model: bytes, threads: int | None) -> None:
        """Set `run`, which multiplies `given` into `out`."""


class OpenVinoProduct(Product):
    """By OpenVINO: one stream, all threads."""

    def _open(self, model: bytes, threads: int | None) -> None:
        import openvino

        from ..engines.openvino_core import openvino_core

        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": HINTS[self.precision],
        }
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        core = openvino_core()
        compiled = core.compile_model(core.read_model(model, b""), "CPU", settings)
        request = compiled.create_infer_request()
        # Tensors over arrays keep them not alive: this object does.
        request.set_input_tensor(openvino.Tensor(self.given, shared_memory=True))
        request.set_output_tensor(openvino.Tensor(self.out, shared_memory=True))
        self.run = request.infer


class OnnxRuntimeProduct(Product):
    """By ONNX Runtime."""

    def _open(self, model: bytes, threads: int | None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for bind, name, array in (
            (binding.bind_input, "x", self.given),
            (binding.bind_output, "y", self.out),
        ):
            bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        self.run = partial(session.run_with_iobinding, binding)


def measure_gpu_roof() -> list[Measured]:
    """Measure the GPU's copies and large products with PyTorch, which must be installed."""
    import torch

    measured = []
    for probe in probes(torch):
        if probe.key not in GPU_KEYS:
            break  # the model's own products follow, which are no roof
        row = measure_probe(probe, partial(timed, torch))
        if row["per_s"]:
            counters = {f"{probe.unit}s_per_s": row["per_s"]}
            seconds = [probe.amount / row["per_s"]]
            measured.append(Measured(probe.name, GROUP, seconds, counters=counters))
    return measured


def _product(precision: str) -> tuple[Float32, onnx.ModelProto]:
    """Return w float32 [K, N] and the graph `y = x w`; int8: x is quantised on the way."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    if precision == "int8":
        w8, step = random.integers(-63, 64, (K, N)).astype(np.int8), np.float32(0.001)
        weights = w8 * step
        tensors: dict[str, Any] = {
            "w8": w8,
            "w_scale": np.full(N, step),
            "w_zero": np.zeros(N, np.int8),
            "scale": np.float32(0.04),
            "zero": np.uint8(128),
        }
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["x8"]),
            helper.make_node("DequantizeLinear", ["x8", "scale", "zero"], ["given"]),
            helper.make_node("DequantizeLinear", ["w8", "w_scale", "w_zero"], ["w"], axis=1),
            helper.make_node("MatMul", ["given", "w"], ["y"]),
        ]
    else:
        weights = (random.standard_normal((K, N)) * 0.02).astype(np.float32)
        tensors, nodes = {"w": weights}, [helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [M, K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [M, N])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return weights, helper.make_model(graph, opset_imports=opsets, ir_version=9)
