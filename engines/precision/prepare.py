"""One call from the bundle's graph to the graph a backend builds from, and what was done to it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ...bundle import VISUAL_SCALES as SCALES
from ...bundle import VISUAL_TOKENS as TOKENS
from ...bundle import BundleManifest
from ...errors import EngineError
from ..contract import Progress
from ..fidelity import FidelityLimits
from ..manifest import QUANTIZED, Profile
from ..samples import Samples, sample_batches
from ..scales import DYNAMIC, ONLY_STATIC, Scales
from .dynamic import SUMS_FLOAT32
from .graph import Graph, node
from .lower import ONNX_TYPES, OPERANDS_ONLY, STAYS_FLOAT32, Lowering, lower, lower_operands
from .search import Choice, choose
from .static import find_linears


def take_int8_tokens(graph: Graph) -> Graph:
    """Return the graph with `visual_tokens` int8 [P, m, H] and `visual_scales` float16 [P, m].

    A token is its int8 values times its scale, in float32; everything behind is as it was.
    """
    from onnx import TensorProto, helper

    new = graph.replaced([])
    (given,) = (value for value in graph.inputs if value.name == TOKENS)
    shape = [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim]
    tokens = helper.make_tensor_value_info(TOKENS, TensorProto.INT8, shape)
    scales = helper.make_tensor_value_info(SCALES, TensorProto.FLOAT16, shape[:2])
    new.inputs = [value for value in graph.inputs if value.name != TOKENS] + [tokens, scales]
    for item in graph.nodes:
        if TOKENS not in item.input:
            new.nodes.append(item)
            continue
        if item.op_type != "Cast":
            raise EngineError(f"{item.name} reads {TOKENS} uncast, expected a Cast to float32")
        axis = new.set_weight(f"{SCALES}.axis", np.array([2], np.int64))
        path, wide, float32 = f"/{SCALES}", f"/{TOKENS}/int8_output", ONNX_TYPES["float32"]
        new.nodes += [
            node("Cast", [TOKENS], wide, f"/{TOKENS}/int8/Cast", to=float32),
            node("Cast", [SCALES], f"{path}/Cast_output", f"{path}/Cast", to=float32),
            node("Unsqueeze", [f"{path}/Cast_output", axis], f"{path}/column", f"{path}/Unsqueeze"),
            node("Mul", [wide, f"{path}/column"], item.output[0], f"{path}/Mul"),
        ]
    return new


# What calibration pairs must hold: 0.97 on other pairs, and 0.005 for what a thousand pairs miss
# (seen on the demo: calibration 0.965, 49,152 other pairs 0.961).
DEFAULT_LIMITS = FidelityLimits(min_kendall_tau=0.975, max_top1_change=0.02)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to make of a float32 graph.

    Attributes:
        precision: one of `PRECISIONS`.
        compute_type: type of what is not quantised: `float32`, `float16` or `bfloat16`.
        token_dtype: `float16`, or `int8` for int8 tokens with scales.
        calibration: pairs to choose scales by; only int8 and fp8 look at them.
        limits: what the ranking of those pairs must hold.
        scales: the ways of scaling int8 and fp8 activations that the search may choose from.
        operands_only: whether only operands of products are of a 16-bit compute type.
    """

    precision: str
    compute_type: str
    token_dtype: str = "float16"
    calibration: Samples | None = None
    limits: FidelityLimits = field(default_factory=lambda: DEFAULT_LIMITS)
    scales: tuple[Scales, ...] = ONLY_STATIC
    operands_only: bool = False

    @property
    def lowering(self) -> Lowering:
        """What brings a graph into the compute type."""
        return lower_operands if self.operands_only else lower


def prepare_graph(
    source: Path,
    out: Path,
    recipe: Recipe,
    bundle: BundleManifest,
    profile: Profile,
    progress: Progress = lambda _: None,
) -> Mapping[str, Any]:
    """Write the graph that `recipe` asks for to `out`; return the manifest's `precision_plan`.

    Raises:
        EngineError: int8 or fp8 without calibration pairs, limits that cannot be held, weights
            that the type cannot hold, or `onnx` is missing.
    """
    plan: dict[str, Any] = {"compute_type": recipe.compute_type}
    is_quantized, is_float32 = recipe.precision in QUANTIZED, recipe.compute_type == "float32"
    is_dynamic = False
    if not is_quantized and is_float32 and recipe.token_dtype == "float16":
        shutil.copyfile(source, out)
        return plan
    graph = Graph.read(source)
    if is_quantized:
        choice = _quantized(graph, recipe, bundle, profile, progress)
        plan |= _quantization(graph, choice, recipe)
        graph, is_dynamic = choice.graph, choice.scales.kind == DYNAMIC
    elif not is_float32:
        graph = recipe.lowering(graph, recipe.compute_type)
    if not is_float32:
        staying = OPERANDS_ONLY if recipe.operands_only else STAYS_FLOAT32
        plan["float32"] = staying | (SUMS_FLOAT32 if is_dynamic else {})
    if recipe.token_dtype == "int8":
        graph = take_int8_tokens(graph)
    graph.write(out)
    return plan


class GraphCache:
    """Prepared graphs, so that builds which differ in the backend alone share one calibration."""

    def __init__(self, folder: Path | None):
        """Keep graphs in `folder` for as long as its owner does; None keeps none."""
        self._folder = folder
        self._plans: dict[tuple[str, ...], Mapping[str, Any]] = {}

    @contextmanager
    def prepared(
        self,
        source: Path,
        recipe: Recipe,
        bundle: BundleManifest,
        profile: Profile,
        progress: Progress,
    ) -> Iterator[tuple[Path, Mapping[str, Any]]]:
        """Yield graph and plan, made by `prepare_graph` where they are not there yet.

        The same `source`, calibration and limits are the caller's to pass every time.
        """
        ways = [way.key for way in recipe.scales] if recipe.precision in QUANTIZED else []
        operands = ["operands"] if recipe.operands_only else []
        key = (recipe.precision, recipe.compute_type, recipe.token_dtype, *operands, *ways)
        with TemporaryDirectory() as scratch:
            folder = Path(scratch) if self._folder is None else self._folder
            folder.mkdir(exist_ok=True)
            graph = folder / f"{'-'.join(key)}.onnx"
            plan = self._plans.get(key)
            if plan is None:
                plan = prepare_graph(source, graph, recipe, bundle, profile, progress)
                if self._folder is not None:
                    self._plans[key] = plan
            yield graph, plan


def _quantized(
    graph: Graph, recipe: Recipe, bundle: BundleManifest, profile: Profile, progress: Progress
) -> Choice:
    samples = recipe.calibration
    if samples is None or not len(samples):
        raise EngineError(
            f"{recipe.precision} needs pairs to calibrate with, got none",
            hint="add --calibration-store STORE --calibration-queries FILE (real pairs), or "
            "--calibration-random (for speed tests only)",
        )
    text = bundle.text
    queries = [
        list(sample_batches(sample, profile, pad_id=text.pad_id, sep_id=text.sep_id))
        for sample in samples
    ]
    limits = FidelityLimits() if samples.random else recipe.limits
    types = recipe.precision, recipe.compute_type
    scales, lowering = recipe.scales, recipe.lowering
    return choose(graph, queries, *types, limits, progress, scales=scales, lowering=lowering)


def _quantization(graph: Graph, choice: Choice, recipe: Recipe) -> dict[str, Any]:
    """Describe a choice for the manifest."""
    samples = recipe.calibration
    groups = list(dict.fromkeys(linear.group for linear in find_linears(graph)))
    left = {linear.group for linear in find_linears(choice.graph)}
    return {
        "scales": choice.scales.kind,
        "quantized": [group for group in groups if group not in left],
        "calibration_data": "" if samples is None else samples.data,
        "calibration_random": samples is not None and samples.random,
        **choice.facts,
        "agreement": {name: getattr(choice.agreement, name) for name in ("kendall_tau", "top_1")},
    }
