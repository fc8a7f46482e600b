"""What OpenVINO's x86 kernels want otherwise than the common graph has it. Scores stay the same.

Measured on one core of a Xeon with AVX512_VNNI: OpenVINO 2026.4.1, full-size scorer, 8 pairs of
80 slots, least time of every node. In bf16, on an AMD EPYC, the keys' transpose is worth 2 %.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset13 as ops

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
