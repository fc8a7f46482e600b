"""A thin builder of ONNX graphs: readable node names, every weight stored once, no tracing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError

if TYPE_CHECKING:
    import onnx

OPSET = 20  # the first with Gelu; LayerNormalization is there since 17
IR_VERSION = 10
MAX_BYTES = 2**31 - 2**24  # of a protobuf message, less the room for the nodes

Array = npt.NDArray[Any]


class GraphBuilder:
    """Collects nodes and weights; a value is named after the node that makes it.

    Why not `torch.onnx.export`: engines and the precision passes that follow live on this graph,
    and tracing gives nameless weights, shape arithmetic and int64 casts (seen: torch 2.13). The
    graph is checked against the PyTorch reference on every export instead.
    """

    def __init__(self, name: str):
        self.name = name
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, Array] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Declare a graph input; a string in `shape` is a dynamic dimension."""
        self._inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Declare a graph output; some node must make a value of that name."""
        self._outputs.append(_value_info(name, dtype, shape))

    def weight(self, name: str, value: Array) -> str:
        """Store a weight under `name`, once, and return the name."""
        if name not in self._weights:
            self._weights[name] = np.ascontiguousarray(value)
        return name

    def op(self, kind: str, path: str, *inputs: str | Array, **attributes: Any) -> str:
        """Add the node `/path/kind` and return the name of its one output.

        `inputs` are value names, or small arrays that become constants. `output=` names the
        output otherwise, for graph outputs.
        """
        output = str(attributes.pop("output", f"/{path}/{kind}_output"))
        self._add(kind, path, inputs, [output], attributes)
        return output

    def split(self, path: str, value: str, sizes: Sequence[int], *, axis: int) -> list[str]:
        """Split `value` along `axis` into parts of `sizes`."""
        outputs = [f"/{path}/Split_output_{index}" for index in range(len(sizes))]
        self._add("Split", path, (value, int64(*sizes)), outputs, {"axis": axis})
        return outputs

    def model(self) -> onnx.ModelProto:
        """Return the model; the builder lets go of its weights, which can be gigabytes.

        Raises:
            CheckpointError: more weights than one ONNX file holds.
        """
        from onnx import helper, numpy_helper

        num_bytes = sum(value.nbytes for value in self._weights.values())
        if num_bytes >= MAX_BYTES:
            raise CheckpointError(
                f"the {self.name} holds {num_bytes / 1e9:.2f} GB of float32 weights, expected "
                f"less than {MAX_BYTES / 1e9:.2f} GB: an ONNX file holds no more"
            )
        weights = []
        for name in list(self._weights):
            weights.append(numpy_helper.from_array(self._weights.pop(name), name))
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, weights)
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="edje",
        )

    def _add(
        self,
        kind: str,
        path: str,
        inputs: Sequence[str | Array],
        outputs: list[str],
        attributes: dict[str, Any],
    ) -> None:
        from onnx import helper

        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        self._nodes.append(helper.make_node(kind, names, outputs, f"/{path}/{kind}", **attributes))

    def _constant(self, value: Array) -> str:
        """Store a small constant under a name that tells its content, so equal ones are one."""
        content = "_".join(str(number) for number in value.ravel().tolist())
        kind = "scalar" if value.ndim == 0 else "vector"
        return self.weight(f"const.{value.dtype}.{kind}.{content}", value)


def int64(*values: int) -> Array:
    """Return a 1-D int64 constant, as axes and shapes are given in ONNX."""
    return np.array(values, dtype=np.int64)


def scalar(value: float, dtype: str) -> Array:
    """Return a 0-D constant."""
    return np.array(value, dtype=dtype)


def _value_info(name: str, dtype: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    from onnx import helper

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, kind, list(shape))
