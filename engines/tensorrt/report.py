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
_SOFTMAX = re.compile(r"^/layers\.(\d+)/attention/Softmax$")
ATTENTION = ("attention_scores/MatMul", "attention/Softmax", "context/MatMul")


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

    def computes(self, number: str, parts: Sequence[str]) -> bool:
        """Return whether it computes all the `parts` (as `attention/Softmax`) of a layer."""
        return all(f"/layers.{number}/{part}" in self.nodes for part in parts)


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
        fused: dict[str, bool] = {}
        for layer in self.layers:
            for number in {found[1] for found in map(_SOFTMAX.match, layer.nodes) if found}:
                whole = layer.computes(number, ATTENTION)
                fused[number] = fused.get(number, True) and whole
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
