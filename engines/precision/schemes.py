"""The two ways of scaling activations as the search sees them: chosen before, or found running."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

from ...errors import EngineError
from ..contract import DYNAMIC, STATIC, Batch
from .calibrate import (
    METHODS,
    Activations,
    amax_by,
    observe,
    outlier_values,
    shared_by_groups,
    smooth,
)
from .dynamic import BLOCK, NEVER_QUANTIZED, dynamic_linears, quantize_dynamic
from .emulate import Switches
from .graph import Graph
from .lower import quantize

PLAIN, SMOOTHED = "plain", "smoothed"


class Scheme(ABC):
    """What can be tried on one float32 graph in one precision.

    Attributes:
        methods: ways to choose scales.
        forms: of the graph: `plain`, and `smoothed` where channels stand out.
    """

    methods: tuple[str, ...]

    def __init__(self, graph: Graph, precision: str, scale_type: str, batches: Sequence[Batch]):
        """Observe `batches`; stored scales are rounded to `scale_type`."""
        self._graph, self._precision, self._scale_type = graph, precision, scale_type
        self._seen = self._observed(batches)
        self.forms = (PLAIN, SMOOTHED) if self.outliers() else (PLAIN,)

    def _observed(self, batches: Sequence[Batch]) -> Mapping[str, Activations]:
        return observe(self._graph, batches)

    @staticmethod
    @abstractmethod
    def facts(precision: str) -> dict[str, object]:
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

    def __init__(self, graph: Graph, precision: str, scale_type: str, batches: Sequence[Batch]):
        super().__init__(graph, precision, scale_type, batches)
        self._forms: dict[str, tuple[Graph, Mapping[str, Activations]]] = {
            PLAIN: (graph, self._seen)
        }
        if SMOOTHED in self.forms:
            even = smooth(graph, self._seen)
            self._forms[SMOOTHED] = even, observe(even, batches)

    @staticmethod
    def facts(precision: str) -> dict[str, object]:
        """Return what a plan says of weights and activations."""
        per = "output channel" if precision == "int8" else "tensor"
        return {
            "weights": f"{precision}, symmetric, one scale per {per}",
            "activations": f"{precision}, symmetric, one scale per tensor",
        }

    def outliers(self, keep: Collection[str] = ()) -> dict[str, float]:
        """Return the values that the smoothed form smooths: largest over median channel."""
        return outlier_values(self._seen)

    def quantized(self, form: str, method: str, keep: Collection[str] = ()) -> Graph:
        """Return the graph with all layer groups quantised but `keep`, the rest in float32."""
        graph, seen = self._forms[form]
        amax = amax_by(method, seen, self._precision)
        return quantize(graph, self._precision, amax, keep=keep, scale_type=self._scale_type)

    def switches(self, form: str, method: str) -> Switches:
        """Return the graph whose layer groups can be switched, in a form."""
        graph, seen = self._forms[form]
        amax = amax_by(method, seen, self._precision)
        return Switches(graph, quantize(graph, self._precision, amax))


class DynamicScales(Scheme):
    """One scale a token and 128 columns; only what is quantised is smoothed."""

    methods = ("scales found while running",)

    def _observed(self, batches: Sequence[Batch]) -> Mapping[str, Activations]:
        """Query, key and value are smoothed alike in the last layer, too: one rounded copy."""
        return shared_by_groups(self._graph, observe(self._graph, batches))

    @staticmethod
    def facts(precision: str) -> dict[str, object]:
        """Return what a plan says of weights and activations."""
        per = f"token and {BLOCK} columns"
        return {
            "weights": f"{precision}, symmetric, one scale per output channel and {BLOCK} inputs",
            "activations": f"{precision}, symmetric, one scale per {per}, found while running",
            "never_quantized": NEVER_QUANTIZED,
        }

    def outliers(self, keep: Collection[str] = ()) -> dict[str, float]:
        """Return the values that the smoothed form smooths: largest over median channel."""
        linears = dynamic_linears(self._graph)
        values = {linear.value for linear in linears if linear.group not in keep}
        return {name: ratio for name, ratio in outlier_values(self._seen).items() if name in values}

    def quantized(self, form: str, method: str, keep: Collection[str] = ()) -> Graph:
        """Return the graph with all layer groups quantised but `keep`, the rest in float32."""
        return quantize_dynamic(self._form(form, keep), self._precision, keep=keep)

    def switches(self, form: str, method: str) -> Switches:
        """Return the graph whose layer groups can be switched, in a form."""
        graph = self._form(form)
        return Switches(graph, quantize_dynamic(graph, self._precision))

    def _form(self, form: str, keep: Collection[str] = ()) -> Graph:
        if form == PLAIN:
            return self._graph
        return smooth(self._graph, {name: self._seen[name] for name in self.outliers(keep)})


_SCHEMES: Mapping[str, type[Scheme]] = {STATIC: StaticScales, DYNAMIC: DynamicScales}


def scheme_of(scales: str) -> type[Scheme]:
    """Return the scheme of a recipe's `scales`.

    Raises:
        EngineError: there is none of this name.
    """
    if scales not in _SCHEMES:
        raise EngineError(f"scales are {scales!r}, expected {' or '.join(_SCHEMES)}")
    return _SCHEMES[scales]
