"""Build a native engine: the prepared graph's weights, and a plan of which kernels run it.

Nothing here needs a GPU: one engine serves every architecture that it has tiles for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...bundle import FFN1, layer_path, node_name
from ...errors import EngineError
from ...kernels.cuda_variants import COLUMNS
from ...kernels.tuning import Tuning, read_tuning
from ..contract import BuildJob
from ..precision.graph import Graph
from ..shallow.cut import num_layers_of
from .plan import HEADS, MOST_PAIRS_AT_ONCE, Plan
from .report import write_report
from .weights import (
    ATTENTION_NORM,
    FFN_NORM,
    is_shallow,
    quantized_groups,
    take_weights,
    write_weights,
)

MOST_HIDDEN = 1024
_NORM = "LayerNormalization"


def build(job: BuildJob, capabilities: Sequence[str], element: str) -> Mapping[str, Any]:
    """Write `weights.safetensors` and `plan.json` into `job.out`.

    Args:
        capabilities: compute capabilities to serve, as `9.0`; each has a tuning table.
        element: type of weights and activations: `float16` or `bfloat16`.

    Raises:
        EngineError: a model that the kernels cannot run (all reasons), or `safetensors` is
            missing.
    """
    graph = Graph.read(job.graph)
    plan = make_plan(job, graph, capabilities, element)
    write_weights(job.out, take_weights(graph, plan))
    plan.write(job.out)
    report = write_report(job.out, plan) if job.options.report else {}
    return {"compute_capabilities": list(capabilities), "tuning": dict(plan.tuning), **report}


def make_plan(job: BuildJob, graph: Graph, capabilities: Sequence[str], element: str) -> Plan:
    """Return the plan of a graph.

    Raises:
        EngineError: a model that the kernels cannot run (all reasons).
    """
    sizes = job.bundle.sizes
    nodes = {item.name: item for item in graph.nodes}
    tables: dict[str, Tuning] = {each: read_tuning(each) for each in capabilities}
    faults = []
    if sizes.hidden // sizes.num_heads > HEADS[-1]:
        faults.append(
            f"heads: {sizes.hidden // sizes.num_heads} values each, the kernels take at most "
            f"{HEADS[-1]}"
        )
    if sizes.hidden > MOST_HIDDEN or sizes.hidden % 16:
        faults.append(
            f"hidden: {sizes.hidden}, the kernels take multiples of 16 up to {MOST_HIDDEN}"
        )
    activation = _activation(nodes)
    if activation is None:
        faults.append("activation: the kernels know GELU, by erf and by tanh, and no other")
    if faults:
        raise EngineError(
            "the native backend cannot run this model",
            faults=faults,
            hint="build with --backend tensorrt or onnxruntime-cuda",
        )
    num_layers = num_layers_of(graph)
    quantized, kind = quantized_groups(graph, num_layers)
    return Plan(
        hidden=sizes.hidden,
        intermediate=sizes.intermediate,
        num_layers=num_layers,
        shallow=is_shallow(graph),
        num_heads=sizes.num_heads,
        num_tokens=sizes.num_tokens,
        sep_id=job.bundle.text.sep_id,
        epsilons=tuple(_epsilon(nodes, path) for path in _norm_paths(num_layers)),
        activation=str(activation),
        element=element,
        token_dtype=job.token_dtype,
        max_pairs=min(job.profile.max_pairs, MOST_PAIRS_AT_ONCE),
        text_buckets=job.profile.text_buckets,
        tiles={each: table.tiles[element] for each, table in tables.items()},
        tuning={each: table.sha256 for each, table in tables.items()},
        kind=kind,
        quantized=quantized,
        tiles8={each: table.tiles[kind] for each, table in tables.items()} if kind else {},
        fused={
            each: table.table.fused[element]
            for each, table in tables.items()
            if sizes.hidden == COLUMNS and table.table.fused.get(element)
        },
    )


def _norm_paths(num_layers: int) -> list[str]:
    parts = (ATTENTION_NORM, FFN_NORM)
    layers = [layer_path(number, part) for number in range(num_layers) for part in parts]
    return ["embeddings/text_norm", *layers]


def _epsilon(nodes: Mapping[str, Any], path: str) -> float:
    """Return the epsilon of the LayerNorm at `path`."""
    item = nodes.get(node_name(path, _NORM))
    found = [each.f for each in item.attribute if each.name == "epsilon"] if item else []
    if not found:
        raise EngineError(f"this graph has no {node_name(path, _NORM)} with an epsilon")
    return float(found[0])


def _activation(nodes: Mapping[str, Any]) -> str | None:
    """Return which GELU stands between the feed-forward's products; None for something else."""
    item = nodes.get(node_name(layer_path(0, FFN1), "Gelu"))
    if item is None:
        return None
    forms = [each.s.decode() for each in item.attribute if each.name == "approximate"]
    return "tanh" if forms == ["tanh"] else "exact"
