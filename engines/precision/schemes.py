"""The two ways of scaling activations as the search sees them: chosen before, or found running."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

from ...errors import EngineError
from ..contract import Batch
from ..scales import DYNAMIC, STATIC, Scales
from .calibrate import (
    METHODS,
    Activations,
    amax_by,
    observe,
    outlier_values,
    shared_by_groups,
    smooth,
)
from .dynamic import dynamic_linears, quantize_dynamic
from .emulate import Switches
from .graph import Graph
from .rounding import Rounding
from .static import Linear, find_linears, largest_weight, quantize

PLAIN, SMOOTHED = "plain", "smoothed"
# Where scales are found while running a multiplication more is free, and channels that stand out a
# little spoil their block, too: smoothing them all as well took tau from 0.944 to 0.953 on a scorer
# of trained weights with everything in int8, a scale a token and 128 columns.
EVEN_RATIO = 2.0


class Observed:
    """What some pairs put into every linear of a float32 graph: shared by all schemes.

    Attributes:
        batches: the pairs.
        seen: what every value held.
    """

    def __init__(self, graph: Graph, batches: Sequence[Batch]):
        self.batches, self._graph = batches, graph
        self.seen = observe(graph, batches)

    def work(self, linear: Linear) -> int:
        """Return the products of numbers that a linear took: the last layer's are few."""
        seen, num_outputs = self.seen[linear.value], self._graph.array(linear.weight).shape[1]
        return int(seen.counts.sum()) * int(num_outputs)


class Scheme(ABC):
    """What can be tried on one float32 graph in one precision and one way of scaling.

    Attributes:
        scales: that way.
        groups: layer groups that are quantised.
        methods: ways to choose scales.
        forms: of the graph: `plain`, and `smoothed` where channels stand out.
    """

    methods: tuple[str, ...]

    def __init__(
        self, graph: Graph, precision: str, scale_type: str, observed: Observed, scales: Scales
    ):
        """Look at what `observed` saw; stored scales are rounded to `scale_type`."""
        self.scales, self._graph = scales, graph
        self._precision, self._scale_type = precision, scale_type
        self._seen = self._taken(observed.seen)
        self.forms = (PLAIN, SMOOTHED) if self.outliers() else (PLAIN,)
        self._linears = self._quantizable()
        self.groups = tuple(dict.fromkeys(linear.group for linear in self._linears))
        self._work = {linear.name: observed.work(linear) for linear in find_linears(graph)}

    def cost(self, keep: Collection[str] = ()) -> float:
        """Return the time of all products of linears as a share of all in the compute type."""
        saved = sum(self._work[linear.name] for linear in self._linears if linear.group not in keep)
        return 1 - (1 - self.scales.cost) * saved / sum(self._work.values())

    def share(self, group: str) -> float:
        """Return a layer group's share of the products of all linears, in numbers multiplied."""
        own = sum(self._work[linear.name] for linear in self._linears if linear.group == group)
        return own / sum(self._work.values())

    @property
    def weights(self) -> str:
        """What weights are stored in, in words."""
        bits = self.scales.weight_bits
        if self._precision != "int8" or bits == 8:
            return self._precision
        most = largest_weight(self._precision, bits)
        return f"{self._precision} of {bits} bits (-{most:.0f} to {most:.0f})"

    def _taken(self, seen: Mapping[str, Activations]) -> Mapping[str, Activations]:
        return seen

    def _quantizable(self) -> list[Linear]:
        return find_linears(self._graph)

    @abstractmethod
    def facts(self) -> dict[str, object]:
        """Return what a plan says of weights and activations."""

    @abstractmethod
    def outliers(self, keep: Collection[str] = ()) -> dict[str, float]:
        """Return the values that the smoothed form smooths: largest over median channel."""

    @abstractmethod
    def quantized(self, form: str, method: str, keep: Collection[str] = ()) -> Graph:
        """Return the graph with all layer groups quantised but `keep`, the rest in float32."""

    @abstractmethod
    def switches(self, form: str, method: str) -> Switches:
        """Return the graph whose layer groups can be switched, in a form."""


class StaticScales(Scheme):
    """One scale a tensor, from what calibration saw there. Kept groups are smoothed as well."""

    methods = tuple(METHODS)

    def __init__(
        self, graph: Graph, precision: str, scale_type: str, observed: Observed, scales: Scales
    ):
        super().__init__(graph, precision, scale_type, observed, scales)
        self._forms: dict[str, tuple[Graph, Mapping[str, Activations]]] = {
            PLAIN: (graph, self._seen)
        }
        if SMOOTHED in self.forms:
            even = smooth(graph, self._seen)
            self._forms[SMOOTHED] = even, observe(even, observed.batches)
        # All ways to choose a scale store the same weights.
        self._rounding = {form: Rounding(seen) for form, (_, seen) in self._forms.items()}

    def facts(self) -> dict[str, object]:
        """Return what a plan says of weights and activations."""
        precision = self._precision
        per = "output channel" if precision == "int8" else "tensor"
        return {
            "weights": f"{self.weights}, symmetric, one scale per {per}",
            "activations": f"{precision}, symmetric, one scale per tensor",
        }

    def outliers(self, keep: Collection[str] = ()) -> dict[str, float]:
        """Return the values that the smoothed form smooths: largest over median channel."""
        return outlier_values(self._seen)

    def quantized(self, form: str, method: str, keep: Collection[str] = ()) -> Graph:
        """Return the graph with all layer groups quantised but `keep`, the rest in float32."""
        graph, seen = self._forms[form]
        return quantize(
            graph,
            self._precision,
            amax_by(method, seen, self._precision),
            keep=keep,
            scale_type=self._scale_type,
            weight_bits=self.scales.weight_bits,
            rounding=self._rounding[form],
        )

    def switches(self, form: str, method: str) -> Switches:
        """Return the graph whose layer groups can be switched, in a form."""
        return Switches(self._forms[form][0], self.quantized(form, method))


class DynamicScales(Scheme):
    """One scale a token and block of columns; only what is quantised is smoothed."""

    methods = ("scales found while running",)

    def __init__(
        self, graph: Graph, precision: str, scale_type: str, observed: Observed, scales: Scales
    ):
        super().__init__(graph, precision, scale_type, observed, scales)
        self._rounding = Rounding(self._seen)

    def _taken(self, seen: Mapping[str, Activations]) -> Mapping[str, Activations]:
        """Query, key and value are smoothed alike in the last layer, too: one rounded copy."""
        return shared_by_groups(self._graph, seen)

    def _quantizable(self) -> list[Linear]:
        return dynamic_linears(self._graph, self.scales.never)

    def facts(self) -> dict[str, object]:
        """Return what a plan says of weights and activations."""
        block = self.scales.block
        weight, token = f"output channel and {block} inputs", f"token and {block} columns"
        found = f"one scale per {token}, found while running"
        return {
            "weights": f"{self.weights}, symmetric, one scale per {weight}",
            "activations": f"{self._precision}, symmetric, {found}",
            "never_quantized": dict(self.scales.never),
        }

    def outliers(self, keep: Collection[str] = ()) -> dict[str, float]:
        """Return the values that the smoothed form smooths: largest over median channel."""
        values = {each.value for each in self._quantizable() if each.group not in keep}
        ratios = outlier_values(self._seen, EVEN_RATIO)
        return {name: ratio for name, ratio in ratios.items() if name in values}

    def quantized(self, form: str, method: str, keep: Collection[str] = ()) -> Graph:
        """Return the graph with all layer groups quantised but `keep`, the rest in float32."""
        never, block = self.scales.never, self.scales.block
        graph = self._form(form, keep)
        return quantize_dynamic(
            graph,
            self._precision,
            keep=keep,
            never=never,
            block=block,
            weight_bits=self.scales.weight_bits,
            rounding=self._rounding,
        )

    def switches(self, form: str, method: str) -> Switches:
        """Return the graph whose layer groups can be switched, in a form."""
        return Switches(self._form(form), self.quantized(form, method))

    def _form(self, form: str, keep: Collection[str] = ()) -> Graph:
        if form == PLAIN:
            return self._graph
        seen = {name: self._seen[name] for name in self.outliers(keep)}
        return smooth(self._graph, seen, EVEN_RATIO)


_SCHEMES: Mapping[str, type[Scheme]] = {STATIC: StaticScales, DYNAMIC: DynamicScales}


def scheme_of(scales: Scales) -> type[Scheme]:
    """Return the scheme of a way of scaling.

    Raises:
        EngineError: there is none of this kind.
    """
    if scales.kind not in _SCHEMES:
        raise EngineError(f"scales are {scales.kind!r}, expected {' or '.join(_SCHEMES)}")
    return _SCHEMES[scales.kind]
