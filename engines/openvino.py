"""The `openvino` backend: float32, bfloat16 and int8 on x86 and ARM CPUs, from its own format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from ..arrays import Array, Float32, even_parts
from ..bundle import OUTPUT, ModelSizes, node_name, path_of_node, products_of
from ..errors import EngineError, named
from ..machine import is_x86, thread_limit, usable_cores
from .build_options import BuildOptions
from .contract import Batch, BuildJob, Engine, HostEngine, OpenOptions
from .cpu import compute_type as compute_type
from .cpu import device as device
from .cpu import device_faults as device_faults
from .cpu import option_fault, pairs_per_forward, why_no_bf16, why_no_vnni
from .manifest import EngineManifest
from .openvino_core import DEVICE, openvino_core
from .openvino_dynamic import (
    GROUP_KEY,
    Settings,
    quantize_while_running,
    why_not_dynamic,
)
from .scales import DYNAMIC, STATIC, Scales

KEYS_TRANSPOSED = [0, 2, 3, 1]  # [P, S, heads, d] -> [P, heads, d, S], as ONNX MatMul needs them
HEADS_FIRST = [0, 2, 1, 3]
ZERO_POINT = 128


def fit_to_x86(model: ov.Model) -> None:
    """Change `model` in place: keys are transposed in the product, activations are unsigned."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul":
            _transpose_keys_in_product(node)
        elif node.get_type_name() == "FakeQuantize":
            _store_unsigned(node)
    model.validate_nodes_and_infer_types()


def widen_score(model: ov.Model) -> None:
    """Change `model` in place: the score is a sum in float32, not a product with one column.

    In bf16 OpenVINO rounds what a product gives to 8 bits, and scores of about 20 to steps of 1/8:
    on the demo every query had ties, and Kendall tau against float32 was 0.953. What follows the
    last product stays float32.
    """
    for node in model.get_ordered_ops():
        columns = node.get_output_partial_shape(0)[-1] if node.get_type_name() == "MatMul" else 0
        if columns == 1:
            weights = np.array(_constant(node, 1), np.float32)[None]
            terms = ops.multiply(node.input_value(0), ops.constant(weights))
            _replace(node, ops.reduce_sum(terms, ops.constant(np.array([1])), True))
    model.validate_nodes_and_infer_types()


def _transpose_keys_in_product(product: ov.Node) -> None:
    """Let the attention's product read keys [P, heads, S, d].

    OpenVINO fuses this transpose into the attention, the other one it runs on its own: attention
    takes 16.8 instead of 19.8 ms.
    """
    keys = product.input_value(1).get_node()
    if keys.get_type_name() != "Transpose" or _constant(keys, 1) != KEYS_TRANSPOSED:
        return
    heads_first = ops.transpose(keys.input_value(0), ops.constant(np.array(HEADS_FIRST)))
    heads_first.set_friendly_name(keys.get_friendly_name())
    _replace(product, ops.matmul(product.input_value(0), heads_first, False, True))


def _store_unsigned(quantizer: ov.Node) -> None:
    """Shift int8 activations by 128, which their zero point takes back: the same whole numbers.

    x86 multiplies unsigned by signed bytes. OpenVINO shifts signed activations at every use and
    rescales in a pass of its own; unsigned ones it does not: the products take 48 instead of 57
    ms, the whole forward 75 instead of 85.
    """
    signed = [node for node in _readers(quantizer) if node.get_element_type() == ov.Type.i8]
    bounds = [quantizer.input_value(index) for index in range(3)]
    unsigned = ops.fake_quantize(*bounds, np.float32(0), np.float32(255), 256)
    unsigned.set_friendly_name(quantizer.get_friendly_name())
    stored = ops.convert(unsigned, "u8")
    for wide in (node for cast in signed for node in _readers(cast)):
        zero_point = ops.convert(ops.constant(np.uint8(ZERO_POINT)), "f32")
        shifted = ops.subtract(ops.convert(stored, "f32"), zero_point)
        for old in _zero_shifts(wide) or [wide]:
            _replace(old, shifted)


def _zero_shifts(value: ov.Node) -> list[ov.Node]:
    """Return the subtractions of a zero point of 0 that read `value`."""
    return [
        node
        for node in _readers(value)
        if node.get_type_name() == "Subtract" and not np.any(_constant(node, 1))
    ]


def _constant(node: ov.Node, index: int) -> list[float] | None:
    """Return input `index` of `node` as a list where it is a constant, cast or not."""
    source = node.input_value(index).get_node()
    if source.get_type_name() == "Convert":
        source = source.input_value(0).get_node()
    if source.get_type_name() != "Constant":
        return None
    values: list[float] = source.get_data().ravel().tolist()
    return values


def _readers(node: ov.Node) -> list[ov.Node]:
    return [reader.get_node() for reader in node.output(0).get_target_inputs()]


def _replace(old: ov.Node, new: ov.Node) -> None:
    """Let the readers of `old` read `new`, under the old name: opening looks for names."""
    new.set_friendly_name(old.get_friendly_name())
    old.output(0).replace(new.output(0))


MODEL = "joint_encoder.xml"
# Type of everything but int8 products. int8 engines keep it float32 on CPUs with bf16, too: that
# saves little (attention is a fifth of the time) and bf16 would round what int8 was calibrated on.
ELEMENT_TYPES = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
INT8_TYPES = ("i8", "u8")
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


def build(job: BuildJob) -> Mapping[str, Any]:
    """Convert the graph to OpenVINO's format; weights stay as they are, opening casts them."""
    fitted = is_x86()
    try:
        model = openvino_core().read_model(job.graph)
        if fitted:
            fit_to_x86(model)
        group = quantize_while_running(model)
        if job.precision == "bf16":
            widen_score(model)
        ov.save_model(model, job.out / MODEL, compress_to_fp16=False)
    except RuntimeError as error:
        raise EngineError(f"OpenVINO cannot convert {job.graph}: {error}") from error
    groups = {} if group is None else {GROUP: group}
    return {"format": "OpenVINO IR", "fitted_to_x86": fitted, **groups}


def load(folder: Path, manifest: EngineManifest, options: OpenOptions) -> Engine:
    """Compile for this CPU in exactly the manifest's precision."""
    fixed = sorted({PRECISION_KEY, GROUP_KEY} & options.backend_settings.keys())
    if fixed:
        raise EngineError(
            f"{fixed[0]} cannot be set at opening: an engine's precision is fixed when built",
            hint="build another engine with --precision",
        )
    wanted = ELEMENT_TYPES[manifest.precision]
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
    limit = thread_limit(sees_affinity=True)
    if options.num_threads is not None:
        settings[THREADS_KEY] = options.num_threads
    elif limit is not None:
        settings.setdefault(THREADS_KEY, limit)
    try:
        compiled = openvino_core().compile_model(folder / MODEL, DEVICE, settings)
    except RuntimeError as error:
        raise EngineError(f"OpenVINO cannot open {folder / MODEL}: {error}") from error
    check_precision(compiled, wanted, quantized_products(manifest.precision_plan))
    num_threads = int(compiled.get_property(THREADS_KEY)) or None
    return OpenVinoEngine(manifest, compiled, pairs_per_forward(num_threads))


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
    compiled: ov.CompiledModel, wanted: str, quantized: frozenset[str] = frozenset()
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


class OpenVinoEngine(HostEngine):
    """Wraps the caller's arrays as tensors: nothing is copied in or out.

    Every thread scores pairs of its own (one stream a thread), instead of all threads sharing
    each matrix product, where all wait for the slowest at every one. On two cores that others
    used, too, 32 pairs took 179 instead of 217 ms in int8 and 550 instead of 827 in float32; one
    pair alone took 11.3 instead of 10.0 ms in int8 (2026.4.1, full-size scorer, least times).
    """

    def __init__(self, manifest: EngineManifest, compiled: ov.CompiledModel, most_pairs: int):
        super().__init__(manifest, pairs_per_forward=most_pairs)
        self._compiled: ov.CompiledModel | None = compiled
        self._num_streams = max(1, int(compiled.get_property("NUM_STREAMS")))
        self._idle: list[ov.InferRequest] = []  # as many as were ever in use at once

    def _infer(self, batch: Batch, scores: Float32) -> None:
        parts = even_parts(len(batch), -(-len(batch) // self._num_streams))
        started: list[ov.InferRequest] = []
        try:
            for pairs in parts:
                request = self._request()
                _bind(request, batch.part(pairs), scores[pairs])
                request.start_async()
                started.append(request)
        except RuntimeError as error:
            raise _failed(batch, error) from error
        finally:  # whatever happened, none may still read or write the caller's arrays
            errors = [fault for request in started if (fault := _wait(request)) is not None]
        if errors:
            raise _failed(batch, errors[0]) from errors[0]
        self._idle += started

    def _request(self) -> ov.InferRequest:
        if self._compiled is None:
            raise EngineError("the engine is closed")
        try:
            return self._idle.pop()
        except IndexError:
            return self._compiled.create_infer_request()

    def close(self) -> None:
        self._idle.clear()
        self._compiled = None


def _bind(request: ov.InferRequest, batch: Batch, scores: Float32) -> None:
    request.set_tensor("text_ids", _wrap(batch.text_ids))
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
