"""The `openvino` backend: float32, bfloat16 and int8 on x86 and ARM CPUs, from its own format."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any
from weakref import WeakValueDictionary

import openvino as ov

from ..arrays import Array, Float32
from ..bundle import OUTPUT, ModelSizes, node_name, path_of_node, products_of
from ..errors import EngineError, named
from ..machine import is_x86, thread_limit, usable_cores
from .build_options import BuildOptions
from .contract import BESIDE_8_BITS, Batch, BuildJob, Engine, HostEngine, OpenOptions
from .cpu import compute_type as compute_type
from .cpu import describe_cpu, option_fault, why_no_bf16, why_no_vnni
from .cpu import device_faults as device_faults
from .manifest import EngineManifest
from .openvino_core import DEVICE, openvino_core
from .openvino_graph import (
    GROUP_KEY,
    Settings,
    fit_to_x86,
    keeps_products,
    quantize_while_running,
    why_not_dynamic,
    widen_score,
)
from .scales import DYNAMIC, STATIC, Scales

MODEL = "joint_encoder.xml"
# Type of everything but int8 products. It is bf16 on CPUs that have it where scales are static and
# no product is kept (a model that needs more is too easily upset): full size, CPU time 9 % less at
# 80 and at 128 rows a pair, most of it attention's (1.7 instead of 2.85 ms at 128). Kendall tau
# against float32: the demo's 0.981, with float32 beside int8 0.982; random weights 0.909 and 0.919.
ELEMENT_TYPES = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
INT8_TYPES = ("i8", "u8")
TEXT_IDS = "text_ids"
PRECISION_KEY = "INFERENCE_PRECISION_HINT"
THREADS_KEY = "INFERENCE_NUM_THREADS"
GROUP = GROUP_KEY.lower()  # in the manifest's `build_options`
# Time of a product in int8 against float32, the quantising included, with static scales and with
# dynamic ones of so many columns: 2,560 rows through FFN 384 x 1,536, one core with AVX512_VNNI,
# 2026.4.1 (bf16: 0.53).
STATIC_COST = 0.31
GROUP_COSTS = {128: 0.46, 64: 0.49, 32: 0.55}
# 1,280 rows through FFN 384 x 1,536 by its AVX2 kernels, one core: int8 104 GOP/s, float32 122.
WITHOUT_VNNI = "and OpenVINO's are slower than float32 then: onnxruntime has faster ones"
# Nodes of the compiled model that hold the matrix products.
PRODUCTS = ("FullyConnected", "MatMul", "ScaledDotProductAttention", "MHA", "Convolution")
# Rows of a forward on one thread: their activations (1,536 x 4 bytes each) still pass through one
# core's L2 and share of the L3. CPU time a pair, full size, one core. float32, 80 rows a pair, 2 MB
# L2: 27.0 ms at 640 rows, 27.2 at 1,280, 27.9 at 2,560, 32.2 at 5,120. int8, 128 rows a pair, 1 MB
# L2: 8.94 ms at 512, 8.65 at 1,024, 8.58 at 1,536, 8.69 at 2,048.
ROWS_PER_THREAD = 1280
# Compiled models that an engine of this process has: by its files' hashes and settings, and bucket.
# An engine that is opened again while it is in use, as a server does to reload, takes them over.
_IN_USE: WeakValueDictionary[tuple[str, int], ov.CompiledModel] = WeakValueDictionary()


def version() -> str:
    """Return OpenVINO's version without the build number."""
    return str(ov.__version__).split("-")[0]


def why_not(precision: str) -> str | None:
    """Return why this machine cannot run `precision`, None where it can.

    OpenVINO takes a bf16 hint on any AVX-512 CPU and emulates it where the hardware has none:
    full-size scorer, 32 pairs: 16.7 s against 0.52 s in float32 (2026.4.1, Xeon without
    AVX512_BF16 and AMX, 2 threads). So the hardware's own word decides.
    """
    if precision not in ELEMENT_TYPES:
        return f"not a precision of this backend ({', '.join(ELEMENT_TYPES)})"
    core = openvino_core()
    if DEVICE not in core.available_devices:
        return "this openvino has no CPU plugin"
    capabilities = core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and "BF16" not in capabilities:
        return (
            "this CPU has neither AVX512_BF16 nor AMX_BF16 (nor ARM's BF16), "
            "OpenVINO would only emulate it, many times slower than fp32"
        )
    if precision == "bf16":
        return why_no_bf16()
    reason = why_no_vnni() if precision == "int8" else None
    return None if reason is None else f"{reason}, {WITHOUT_VNNI}"


def activation_scales(precision: str, sizes: ModelSizes) -> tuple[Scales, ...]:
    """Return how int8 activations can be scaled: dynamically where the plugin really does."""
    static = Scales(STATIC, STATIC_COST)
    if why_not(precision) is not None:
        return (static,)
    running = [
        Scales(DYNAMIC, cost, group)
        for group, cost in GROUP_COSTS.items()
        if why_not_dynamic(sizes, group, _settings(precision)) is None
    ]
    return static, *running


def why_not_build(precision: str, options: BuildOptions) -> str | None:
    """Return why this machine cannot build `precision`: it must be able to run it."""
    return option_fault(options) or why_not(precision)


def device(precision: str, options: BuildOptions) -> dict[str, Any]:
    """Return this CPU as the manifest's `device` entry, for int8 with whether it runs bf16."""
    more = {"bf16": why_not("bf16") is None} if precision == "int8" else {}
    return {**describe_cpu(precision), **more}


def build(job: BuildJob) -> Mapping[str, Any]:
    """Convert the graph to OpenVINO's format; weights stay as they are, opening casts them."""
    fitted = is_x86()
    try:
        model = openvino_core().read_model(job.graph)
        if fitted:
            fit_to_x86(model)
        group = quantize_while_running(model)
        robust = job.precision == "int8" and group is None and not keeps_products(model)
        narrow = robust and not job.strict and why_not("bf16") is None
        beside = {BESIDE_8_BITS: "bf16"} if narrow else {}
        if job.precision == "bf16" or beside:
            widen_score(model)
        ov.save_model(model, job.out / MODEL, compress_to_fp16=False)
    except RuntimeError as error:
        raise EngineError(f"OpenVINO cannot convert {job.graph}: {error}") from error
    groups = {} if group is None else {GROUP: group}
    return {"format": "OpenVINO IR", "fitted_to_x86": fitted, **groups, **beside}


def load(folder: Path, manifest: EngineManifest, options: OpenOptions) -> Engine:
    """Compile for this CPU in exactly the manifest's precision."""
    fixed = sorted({PRECISION_KEY, GROUP_KEY} & options.backend_settings.keys())
    if fixed:
        raise EngineError(
            f"{fixed[0]} cannot be set at opening: an engine's precision is fixed when built",
            hint="build another engine with --precision",
        )
    wanted = manifest.build_options.get(BESIDE_8_BITS, ELEMENT_TYPES[manifest.precision])
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": usable_cores(),  # OpenVINO cuts this down to its number of threads
        **options.backend_settings,
        PRECISION_KEY: wanted,
    }
    group = manifest.build_options.get(GROUP)
    if group is not None:
        settings[GROUP_KEY] = group
        _raise_unless_dynamic(manifest, group, options.backend_settings)
    if BESIDE_8_BITS in manifest.build_options and (reason := why_not(wanted)) is not None:
        raise EngineError(
            f"this engine runs {wanted} beside int8, which cannot be here: {reason}",
            hint="build it again on this machine",
        )
    limit = thread_limit(sees_affinity=True)
    if options.num_threads is not None:
        settings[THREADS_KEY] = options.num_threads
    elif limit is not None:
        settings.setdefault(THREADS_KEY, limit)
    quantized = quantized_products(manifest.precision_plan)
    with _opening(folder):
        model = openvino_core().read_model(folder / MODEL)
    asked = json.dumps([dict(manifest.files), settings], sort_keys=True)

    def compile_for(bucket: int) -> ov.CompiledModel:
        compiled = _IN_USE.get((asked, bucket))
        if compiled is None:
            with _opening(folder):
                model.reshape({TEXT_IDS: [-1, bucket]})
                compiled = openvino_core().compile_model(model, DEVICE, settings)
            _IN_USE[asked, bucket] = compiled
        check_precision(compiled, wanted, quantized)
        return compiled

    return OpenVinoEngine(manifest, compile_for)


@contextmanager
def _opening(folder: Path) -> Iterator[None]:
    """Say which model OpenVINO could not read or compile."""
    try:
        yield
    except RuntimeError as error:
        raise EngineError(f"OpenVINO cannot open {folder / MODEL}: {error}") from error


def _raise_unless_dynamic(
    manifest: EngineManifest, group: int, settings: Mapping[str, str]
) -> None:
    """Refuse to run products in float32 that the manifest calls int8."""
    asked = _settings(manifest.precision, settings)
    reason = why_not_dynamic(manifest.bundle.sizes, group, asked)
    if reason is not None:
        raise EngineError(
            f"this engine finds the scales of int8 while running, which cannot be here: {reason}",
            hint="build another --precision, or open it without these backend settings",
        )


def _settings(precision: str, more: Mapping[str, str] = MappingProxyType({})) -> Settings:
    """Return what decides how a product runs, as `why_not_dynamic` takes it."""
    return tuple(sorted({**more, PRECISION_KEY: ELEMENT_TYPES.get(precision, "f32")}.items()))


def quantized_products(plan: Mapping[str, Any]) -> frozenset[str]:
    """Return the graph's names of the products that a `precision_plan` lists as quantised."""
    return frozenset(name for group in plan.get("quantized", ()) for name in products_of(group))


def check_precision(
    compiled: ov.CompiledModel,
    wanted: str,
    quantized: frozenset[str] = frozenset(),
) -> None:
    """Look into the compiled model: products `quantized` must run in int8, all others in `wanted`.

    Raises:
        EngineError: some run in another type (all types named with their counts).
    """
    types = Counter[str]()
    in_int8: set[str] = set()
    for names, kind in _products(compiled):
        if kind in INT8_TYPES and names & quantized:
            in_int8 |= names & quantized
        else:
            types[kind] += 1
    missing = quantized - in_int8
    if set(types) != {wanted} or missing:
        asked = f"int8 for {len(quantized)} and {wanted} for the rest" if quantized else wanted
        lost = f" and {named(sorted(missing), limit=5)} not as int8" if missing else ""
        raise EngineError(
            f"OpenVINO was asked for {asked} but compiled its matrix products as {dict(types)}"
            + lost,
            hint="build another --precision; `edje doctor` lists what this machine runs",
        )


def _products(compiled: ov.CompiledModel) -> Iterator[tuple[set[str], str]]:
    """Go through the compiled matrix products: names of the graph's nodes in it, and its type.

    A product with compressed weights goes by the name of its bias' sum, which is at its path.
    """
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        if str(info["layerType"].astype(str)) in PRODUCTS:
            names = str(info["originalLayersNames"].astype(str)).split(",")
            own = {node_name(path_of_node(name), "MatMul") for name in names}
            yield own.union(names), str(info["runtimePrecision"].astype(str))


@dataclass(frozen=True, slots=True)
class _Compiled:
    """The model of one text bucket, and its requests that nobody uses: as many as ever were."""

    model: ov.CompiledModel
    idle: list[ov.InferRequest] = field(default_factory=list)

    def request(self) -> ov.InferRequest:
        try:
            return self.idle.pop()
        except IndexError:
            return self.model.create_infer_request()


class OpenVinoEngine(HostEngine):
    """Wraps the caller's arrays as tensors: nothing is copied in or out.

    Every text bucket has a compiled model of its own, the smallest from the start, others from
    their first batch on (full size: 0.5 s of CPU time, 85 MB in int8 and 150 MB in float32):
    attention is faster where its slots are known. CPU time a pair, full size, against one model
    for all lengths: int8 3 % less at 80 slots, 6 % at 128, bf16 2 % and 5 % (2026.4.1).

    Every thread scores pairs of its own (one stream a thread), instead of all threads sharing
    each matrix product, where all wait for the slowest at every one. On two cores that others
    used, too, 32 pairs took 179 instead of 217 ms in int8 and 550 instead of 827 in float32; one
    pair alone took 11.3 instead of 10.0 ms in int8 (2026.4.1, full-size scorer, least times).

    A batch's requests are all started at once and wait in OpenVINO's own queue, so that no stream
    idles until the others are done.
    """

    def __init__(self, manifest: EngineManifest, compile_for: Callable[[int], ov.CompiledModel]):
        """Compile for the smallest text bucket.

        Args:
            compile_for: returns the model compiled for texts of so many slots.
        """
        super().__init__(manifest)
        self._compile_for: Callable[[int], ov.CompiledModel] | None = compile_for
        self._compiled: dict[int, _Compiled] = {}
        self._compiling = Lock()
        model = self._of_bucket(min(manifest.profile.text_buckets)).model
        self._num_streams = max(1, int(model.get_property("NUM_STREAMS")))
        num_threads = int(model.get_property(THREADS_KEY)) or usable_cores()
        self._most_rows = ROWS_PER_THREAD * max(1, num_threads // self._num_streams)

    def _infer(self, batch: Batch, scores: Float32) -> None:
        compiled = self._of_bucket(batch.text_ids.shape[1])
        started: list[ov.InferRequest] = []
        try:
            for pairs in self._parts(batch):
                request = compiled.request()
                _bind(request, batch.part(pairs), scores[pairs])
                request.start_async()
                started.append(request)
        except RuntimeError as error:
            raise _failed(batch, error) from error
        finally:  # whatever happened, none may still read or write the caller's arrays
            errors = [fault for request in started if (fault := _wait(request)) is not None]
        if errors:
            raise _failed(batch, errors[0]) from errors[0]
        compiled.idle.extend(started)

    def _parts(self, batch: Batch) -> Iterator[slice]:
        """Cut the pairs into as many requests for every stream, none of too many rows.

        The larger ones come first: streams take turns, and all end with the same number of pairs.
        """
        rows, size = int(batch.text_ids.shape[1] + batch.visual_tokens.shape[1] + 1), len(batch)
        rounds = -(-size // (max(1, self._most_rows // rows) * self._num_streams))
        number = min(size, rounds * self._num_streams)
        least, larger = divmod(size, number)
        ends = [least * part + min(part, larger) for part in range(number + 1)]
        return (slice(start, end) for start, end in pairwise(ends))

    def _of_bucket(self, bucket: int) -> _Compiled:
        """Return the model of a text bucket, compiled at the first call for it."""
        if (compiled := self._compiled.get(bucket)) is not None:
            return compiled  # without waiting for another bucket's
        with self._compiling:
            if self._compile_for is None:
                raise EngineError("the engine is closed")
            if bucket not in self._compiled:
                self._compiled[bucket] = _Compiled(self._compile_for(bucket))
            return self._compiled[bucket]

    def close(self) -> None:
        with self._compiling:
            self._compiled.clear()
            self._compile_for = None


def _bind(request: ov.InferRequest, batch: Batch, scores: Float32) -> None:
    request.set_tensor(TEXT_IDS, _wrap(batch.text_ids))
    request.set_tensor("text_length", _wrap(batch.text_length))
    request.set_tensor("query_of_pair", _wrap(batch.query_of_pair))
    request.set_tensor("visual_tokens", _wrap(batch.visual_tokens))
    if batch.visual_scales is not None:
        request.set_tensor("visual_scales", _wrap(batch.visual_scales))
    request.set_tensor(OUTPUT, _wrap(scores))


def _wait(request: ov.InferRequest) -> RuntimeError | None:
    try:
        request.wait()
    except RuntimeError as error:
        return error
    return None


def _failed(batch: Batch, error: RuntimeError) -> EngineError:
    return EngineError(f"OpenVINO failed on a batch of {len(batch)}: {error}")


def _wrap(array: Array) -> ov.Tensor:
    return ov.Tensor(array, shared_memory=True)
