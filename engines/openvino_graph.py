"""What is changed in a graph for OpenVINO, and whether its plugin then does what is meant.

int8 with scales found while running is OpenVINO's dynamic quantisation on the CPU. The plugin
quantises what a product reads, a token and group of columns at a time, where the
weights are compressed by groups that its own groups divide, and the graph says nothing of it. That
is the scheme of `precision/dynamic.py`: same steps, same scales, integer sums a group, float32
between groups (scores of both differ by float32's rounding alone).

A compiled model does not tell whether it does so: with a group size that it cannot use, products
are still called int8 and run in float32. So it is asked by a product of the same size whose
rounding shows (`why_not_dynamic`), in every process, before an engine is built or opened.
"""

from __future__ import annotations

import os
from functools import cache

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from ..arrays import Array
from ..bundle import DYNAMIC as PASS
from ..bundle import ModelSizes, layer_of
from .openvino_core import DEVICE, openvino_core

GROUP_KEY = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
_ISA_KEYS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_WITHOUT_VNNI = ("SSE41", "AVX", "AVX2", "AVX512_CORE")
_VALUE, _BACK = f"/{PASS}/Reshape", f"/{PASS}/back/Reshape"
Settings = tuple[tuple[str, str], ...]
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


def keeps_products(model: ov.Model) -> bool:
    """Tell whether some product of the layers has a weight that is not quantised."""
    return any(
        layer_of(node.get_friendly_name()) is not None
        and node.input_value(1).get_node().get_type_name() == "Constant"
        for node in model.get_ordered_ops()
        if node.get_type_name() == "MatMul"
    )


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


def why_not_dynamic(sizes: ModelSizes, group: int, settings: Settings = ()) -> str | None:
    """Return why this machine's OpenVINO does not quantise such a model dynamically, else None.

    Args:
        group: columns that share a scale: one size for all products.
        settings: what the model will be compiled with, more than the group.
    """
    if sizes.hidden % group or sizes.intermediate % group:
        return (
            f"hidden {sizes.hidden} and intermediate {sizes.intermediate} are not both multiples "
            f"of {group}"
        )
    limits = [f"{key}={os.environ[key]}" for key in _ISA_KEYS if key in os.environ]
    if any(limit.partition("=")[2].upper() in _WITHOUT_VNNI for limit in limits):
        # The plugin still plans for VNNI then: outputs lose their rows, and later ones crash.
        return f"{limits[0]} keeps VNNI from OpenVINO's kernels, which then give wrong shapes"
    hidden, wide = sizes.hidden, sizes.intermediate
    for num_in, num_out in dict.fromkeys(((hidden, hidden), (hidden, wide), (wide, hidden))):
        fault = _probe(num_in, num_out, group, settings)
        if fault is not None:
            return fault
    return None


def quantize_while_running(model: ov.Model) -> int | None:
    """Change `model` in place: what a dynamic pass wrote becomes compressed weights.

    Returns:
        The group size to compile with; None where no pass was there.
    """
    nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    groups: set[int] = set()
    for node in nodes.values():
        if node.get_type_name() != "MatMul":
            continue
        rounded = node.input_value(0).get_node().get_friendly_name()
        if not rounded.endswith(_BACK):
            continue
        value = nodes[rounded.removesuffix(_BACK) + _VALUE].input_value(0)
        cast, scales = (node.input_value(1).get_node().input_value(index) for index in (0, 1))
        stored = _data(cast.get_node().input_value(0))
        by_block = _data(scales.get_node().input_value(0))
        groups.add(len(stored) // len(by_block))
        new = ops.matmul(value, _compressed(stored, by_block), False, True)
        new.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(new.output(0))
    model.validate_nodes_and_infer_types()
    return groups.pop() if groups else None


def _compressed(stored: Array, scales: Array) -> ov.Node:
    """Return the weight [N, K] of int8 [K, N] and its float32 scales [K / group, N]."""
    (columns, rows), blocks = stored.shape, len(scales)
    by_group = np.ascontiguousarray(stored.T).reshape(rows, blocks, columns // blocks)
    factors = np.ascontiguousarray(scales.T)[..., None]
    values = ops.multiply(ops.convert(ops.constant(by_group), "f32"), ops.constant(factors))
    return ops.reshape(values, ops.constant(np.array([rows, columns])), False)


def _data(output: ov.Output) -> Array:
    values: Array = output.get_node().get_data()
    return values


@cache
def _probe(num_in: int, num_out: int, group: int, settings: Settings) -> str | None:
    """Multiply some random rows: what comes out must be the scheme's, not float32's."""
    random = np.random.default_rng(0)
    values = random.standard_normal((3, num_in), np.float32)
    stored = random.integers(-127, 128, (num_in, num_out)).astype(np.int8)
    scales = random.uniform(1e-3, 2e-3, (num_in // group, num_out)).astype(np.float32)
    given = ops.parameter([-1, num_in], np.float32)
    model = ov.Model([ops.matmul(given, _compressed(stored, scales), False, True)], [given])
    try:
        compiled = openvino_core().compile_model(
            model, DEVICE, {**dict(settings), GROUP_KEY: group}
        )
        found = compiled({0: values})[0]
    except RuntimeError as error:
        return f"OpenVINO cannot run a product of int8: {error}"
    weight = stored.astype(np.float64) * np.repeat(scales, group, axis=0)
    steps = np.abs(values.reshape(3, -1, group)).max(-1, keepdims=True) / 127
    rounded = (np.rint(values.reshape(3, -1, group) / steps) * steps).reshape(values.shape)
    exact, expected = values @ weight, rounded @ weight
    shows = np.abs(exact - expected).mean()
    if found.shape == expected.shape and np.abs(found - expected).mean() < 0.05 * shows:
        return None
    return (
        f"OpenVINO {ov.__version__.split('-')[0]} does not quantise products of {num_in} by "
        f"{num_out} in groups of {group} while running on this CPU"
    )
