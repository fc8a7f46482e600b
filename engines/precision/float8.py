"""E4M3 in float32: nodes that round to it where no library does, or only slowly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .graph import Graph, node

if TYPE_CHECKING:
    import onnx


def round_to_float8(graph: Graph, item: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return nodes that round x / scale to E4M3 in float32: ONNX Runtime's own loop is scalar.

    Normal numbers keep 4 significant bits by Veltkamp's splitting with 2^20 + 1, those below
    2^-6 the multiples of 2^-9 by adding and subtracting a number whose last place that is.
    """
    path, output = item.name, item.output[0]
    steps = [
        ("Div", [item.input[0], item.input[1]], "ratio"),
        ("Clip", ["ratio", -448.0, 448.0], "cut"),
        ("Mul", ["cut", 2.0**20 + 1], "spread"),
        ("Sub", ["spread", "cut"], "low_bits"),
        ("Sub", ["spread", "low_bits"], "normal"),
        ("Add", ["cut", 1.5 * 2.0**14], "shifted"),
        ("Sub", ["shifted", 1.5 * 2.0**14], "subnormal"),
        ("Abs", ["cut"], "size"),
        ("Less", ["size", 2.0**-6], "is_small"),
        ("Where", ["is_small", "subnormal", "normal"], output),
    ]
    made = {name for _, _, name in steps}

    def name_of(value: str | float) -> str:
        if isinstance(value, float):
            return graph.set_weight(f"const.float8.{value}", np.float32(value))
        return f"{path}/{value}" if value in made and value != output else value

    return [
        node(kind, [name_of(value) for value in inputs], name_of(name), f"{path}/{kind}/{name}")
        for kind, inputs, name in steps
    ]
