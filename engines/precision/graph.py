"""An ONNX graph to edit: nodes in order, weights by name, and what the encoder's names say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...arrays import Array
from ...bundle import DYNAMIC, layer_of
from ...errors import EngineError

if TYPE_CHECKING:
    import onnx


class Graph:
    """The nodes and weights of one model. Passes make a new one and leave theirs as it was.

    Attributes:
        nodes: in topological order.
        weights: initializers by name; never changed in place, so copies share them.
    """

    def __init__(self, model: onnx.ModelProto):
        self._shell = model
        self.nodes = list(model.graph.node)
        self.weights = {weight.name: weight for weight in model.graph.initializer}
        self.inputs = list(model.graph.input)
        self.outputs = [value.name for value in model.graph.output]

    @classmethod
    def read(cls, path: Path) -> Graph:
        """Read a graph.

        Raises:
            EngineError: `onnx` is missing, or the file is no ONNX model.
        """
        try:
            import onnx
        except ImportError as error:
            raise EngineError(
                f"changing a graph's precision needs onnx, not installed here: {error}",
                hint="pip install 'edje-runtime[build]'",
            ) from error
        try:
            return cls(onnx.load(path))
        except Exception as error:  # protobuf's DecodeError, whose module has no types
            raise EngineError(f"{path} cannot be read as ONNX: {error}") from error

    def replaced(self, nodes: Sequence[onnx.NodeProto]) -> Graph:
        """Return a graph with other nodes; weights and inputs can be changed on their own."""
        new = Graph.__new__(Graph)
        new._shell, new.nodes = self._shell, list(nodes)
        new.weights, new.inputs, new.outputs = dict(self.weights), list(self.inputs), self.outputs
        return new

    def model(self, extra_outputs: Sequence[str] = ()) -> onnx.ModelProto:
        """Return the model with the weights that some node reads.

        `extra_outputs` are float32 values that come out as well.
        """
        from onnx import TensorProto, helper

        used = {name for node in self.nodes for name in node.input}
        outputs = list(self._shell.graph.output)
        outputs += [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in extra_outputs
        ]
        graph = helper.make_graph(
            self.nodes,
            self._shell.graph.name,
            self.inputs,
            outputs,
            [weight for name, weight in self.weights.items() if name in used],
        )
        return helper.make_model(
            graph,
            opset_imports=list(self._shell.opset_import),
            ir_version=self._shell.ir_version,
            producer_name="edje",
        )

    def write(self, path: Path) -> None:
        """Write the model to `path`."""
        path.write_bytes(self.model().SerializeToString())

    def array(self, name: str) -> Array:
        """Return a weight's values; bfloat16 and float8 come as `ml_dtypes` arrays."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.weights[name])

    def set_weight(self, name: str, values: Array) -> str:
        """Store a weight under `name` and return the name."""
        from onnx import numpy_helper

        self.weights[name] = numpy_helper.from_array(np.asarray(values), name)
        return name


def node(
    kind: str, inputs: Sequence[str], output: str, name: str, **attributes: Any
) -> onnx.NodeProto:
    """Return a new node with one output."""
    from onnx import helper

    return helper.make_node(kind, list(inputs), [output], name, **attributes)


def with_inputs(old: onnx.NodeProto, inputs: Sequence[str]) -> onnx.NodeProto:
    """Return a copy of `old` that reads `inputs`."""
    new = type(old)()
    new.CopyFrom(old)
    del new.input[:]
    new.input.extend(inputs)
    return new


def in_layers(item: onnx.NodeProto) -> bool:
    """Tell whether a node belongs to the encoder's layers: not embeddings, mask, pooler, head."""
    return layer_of(item.name) is not None


def is_dynamic(item: onnx.NodeProto) -> bool:
    """Tell whether a node finds scales while running, applies them, or multiplies by them."""
    product = item.op_type == "MatMul" and item.input[0].endswith(f".{DYNAMIC}")
    return product or f"/{DYNAMIC}/" in item.name
