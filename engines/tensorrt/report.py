"""What a plan is made of: its layers, kernels, types and limits, read from the inspector's text.

The builder logs that text (ProfilingVerbosity.DETAILED), which needs no GPU; the inspector itself
needs the engine on one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...bundle import ATTENTION, ATTENTION_SCORES, CONTEXT, layer_of, layer_path, node_name

REPORT = "report.json"

_LAYER = re.compile(r"^Name: (.*?), LayerType: (\w*), (.*)$", re.MULTILINE)
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")
_IO = re.compile(
    r"^ Name: (.*?), IOMode: (\w+), DataType: (\w+), Dimensions: \[([^\]]*)\].*?"
    r"ProfileInfo: \[(.*)\]$",
    re.MULTILINE,
)
_LIMITS = re.compile(r"MinShape: \[([^\]]*)\], OptShape: \[([^\]]*)\], MaxShape: \[([^\]]*)\]")
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_PROFILE = re.compile(r"_myl(\d+)_\d+$")
# Path and kind of the nodes that one fused attention kernel computes.
FUSED = ((ATTENTION_SCORES, "MatMul"), (ATTENTION, "Softmax"), (CONTEXT, "MatMul"))


@dataclass(frozen=True, slots=True)
class PlanTensor:
    """An input or output of a plan.

    Attributes:
        mode: `Input` or `Output`.
        dtype: the library's name, as `Half`.
        shape: -1 where a dimension varies.
        limits: of an input, least, best and largest shape for every profile, in their order.
    """

    name: str
    mode: str
    dtype: str
    shape: tuple[int, ...]
    limits: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, slots=True)
class PlanLayer:
    """One kernel of a plan, with the graph's nodes that it computes and the types it touches."""

    name: str
    kind: str
    kernel: str
    profile: int
    nodes: tuple[str, ...]
    types: tuple[str, ...]

    def softmax_of(self) -> set[int]:
        """Return the encoder layers whose attention's softmax it computes."""
        return {
            number
            for name in self.nodes
            if (number := layer_of(name)) is not None
            and name == node_name(layer_path(number, ATTENTION), "Softmax")
        }

    def fuses(self, number: int) -> bool:
        """Return whether it computes the whole attention of an encoder layer."""
        nodes = (node_name(layer_path(number, part), kind) for part, kind in FUSED)
        return all(name in self.nodes for name in nodes)


@dataclass(frozen=True, slots=True)
class PlanReport:
    """The layers and tensors of a plan; empty where the library told nothing."""

    layers: tuple[PlanLayer, ...]
    tensors: tuple[PlanTensor, ...]

    def fused_attention(self) -> tuple[int, int]:
        """Return in how many of the encoder's layers attention is one kernel, and of how many.

        A layer counts as fused if it is so in every profile: one kernel computes both products
        and the softmax between them.
        """
        fused: dict[int, bool] = {}
        for layer in self.layers:
            for number in layer.softmax_of():
                fused[number] = fused.get(number, True) and layer.fuses(number)
        return sum(fused.values()), len(fused)

    def to_json(self, header: Mapping[str, Any]) -> dict[str, Any]:
        """Return the report as plain JSON values, after `header`."""
        fused, num_layers = self.fused_attention()
        return {
            **header,
            "attention": {"layers": num_layers, "fused": fused},
            "kernels": dict(Counter(layer.kind for layer in self.layers)),
            "types": dict(Counter("+".join(layer.types) for layer in self.layers if layer.types)),
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "layers": [asdict(layer) for layer in self.layers],
        }


def read_report(text: str) -> PlanReport:
    """Read the inspector's one-line format; lines of another form are left out."""
    return PlanReport(
        layers=tuple(_layer(*found.groups()) for found in _LAYER.finditer(text)),
        tensors=tuple(_tensor(*found.groups()) for found in _IO.finditer(text)),
    )


def _layer(name: str, kind: str, rest: str) -> PlanLayer:
    kernel = re.search(r"TacticName: ([^,]*)", rest)
    profile = _PROFILE.search(name)
    return PlanLayer(
        name=name,
        kind=kind,
        kernel=kernel[1] if kernel else "",
        profile=int(profile[1]) if profile else 0,
        nodes=tuple(_ONNX_NODE.findall(rest)),
        types=tuple(sorted({dtype for _, _, dtype in _TENSOR.findall(rest)})),
    )


def _tensor(name: str, mode: str, dtype: str, shape: str, profiles: str) -> PlanTensor:
    limits = tuple(tuple(map(_shape, found)) for found in _LIMITS.findall(profiles))
    return PlanTensor(name, mode, dtype, _shape(shape), limits)


def _shape(text: Sequence[str] | str) -> tuple[int, ...]:
    return tuple(int(size) for size in str(text).split(",") if size.strip())
