"""Weights as the kernels read them: taken from a prepared graph, padded to whole tiles.

Padding is zero, in weights and biases alike, so that padded columns of activations stay zero
through every product. Query, key and value are one product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...arrays import Array, Float32
from ...bundle import (
    ATTENTION_OUTPUT,
    FFN1,
    FFN2,
    KEY,
    QKV,
    QUANTIZED,
    QUERY,
    SCALES,
    SHALLOW,
    SMOOTH,
    VALUE,
    WORD_EMBEDDINGS,
    layer_path,
    weight_name,
)
from ...errors import EngineError
from .plan import ALIGNMENT, STEPS, STEPS8, Plan, group_name

if TYPE_CHECKING:
    from ..precision.graph import Graph

WEIGHTS = "weights.safetensors"
ATTENTION_NORM, FFN_NORM = "attention_norm", "ffn_norm"
NORM, WORDS, POSITIONS = "embeddings/norm", "embeddings.words", "embeddings.positions"
POOLER, CLASSIFIER = "pooler", "classifier"
SHALLOW_HEAD = f"{SHALLOW}/head"


def take_weights(graph: Graph, plan: Plan) -> dict[str, Array]:
    """Return a graph's weights by the names that `forward` reads them.

    Products [num_out, num_in] are of the plan's element type (bfloat16 as uint16), or 8 bit (E4M3
    as uint8) with `scales`, float32 [num_out, num_in / 128], and `smooth`, float32 [num_in]: what
    their input is multiplied by first, ones where nothing is smoothed. Everything else is float32.
    Rows and columns are padded, but for the embeddings.

    Raises:
        EngineError: weights that the bundle's graphs have are not there (all named).
    """
    taken = _Weights(graph, plan)
    head = taken.shallow_head() if plan.shallow else taken.head()
    found = {**taken.embeddings(), **head}
    for number in range(plan.num_layers):
        found |= taken.layer(number)
    if plan.quantized and not plan.shallow and _smooths_cls_apart(graph, plan.num_layers):
        raise EngineError(
            "this graph smooths what the last layer's query reads otherwise than its keys",
            hint="build from the bundle: one 8-bit copy of the hidden states serves both",
        )
    if taken.missing:
        raise EngineError(
            "this graph is no joint encoder as `edje export` writes it",
            faults=[f"{name}: missing" for name in taken.missing],
        )
    return found


def is_shallow(graph: Graph) -> bool:
    """Tell whether a graph ends with a linear head over every slot, not with a pooler."""
    return weight_name(SHALLOW_HEAD) in graph.weights


def quantized_groups(graph: Graph, num_layers: int) -> tuple[tuple[str, ...], str]:
    """Return the layer groups that a graph quantises by scales found while running, and in what."""
    kinds = {
        group_name(number, step): graph.array(name).dtype
        for number in range(num_layers)
        for step in STEPS8
        for name in _quantized_names(graph, number, _linears(step)[0])
    }
    kind = "int8" if np.dtype(np.int8) in kinds.values() else "fp8"
    return tuple(kinds), kind if kinds else ""


def write_weights(folder: Path, weights: Mapping[str, Array]) -> None:
    """Write `weights.safetensors` into `folder`.

    Raises:
        EngineError: `safetensors` is not installed.
    """
    # Not by its own `save_file`, which lets nobody else read the file.
    (folder / WEIGHTS).write_bytes(_safetensors().save(dict(weights)))


def read_weights(folder: Path) -> dict[str, Array]:
    """Return the arrays of `weights.safetensors` by name.

    Raises:
        EngineError: `safetensors` is not installed, or the file is damaged.
    """
    library = _safetensors()
    try:
        weights: dict[str, Array] = library.load_file(folder / WEIGHTS)
    except Exception as error:  # its error class has no base of its own
        message = f"{folder / WEIGHTS} cannot be read: {error}"
        raise EngineError(message, hint="build the engine again: edje build") from error
    return weights


class _Weights:
    """Finds a graph's weights, whichever type a pass has given them, and pads them."""

    def __init__(self, graph: Graph, plan: Plan):
        self._graph, self._plan, self._element = graph, plan, plan.element
        self.missing: list[str] = []

    def embeddings(self) -> dict[str, Array]:
        """Return the tables that `assemble` reads: float32, not padded."""
        types = [self._float32(f"embeddings.{kind}_type.weight") for kind in ("text", "tail")]
        positions = self._float32("embeddings.position.weight")
        return {
            WORDS: self._float32(weight_name(WORD_EMBEDDINGS)),
            POSITIONS: np.stack([positions + kind for kind in types]),
            **{name: self._float32(name) for name in _both(NORM)},
        }

    def head(self) -> dict[str, Array]:
        """Return the pooler [width, width] and the classifier [width], float32, padded."""
        names = (*_both(POOLER), *_both(CLASSIFIER))
        pooler, pooler_bias, classifier, classifier_bias = map(self._float32, names)
        width = self._plan.width
        padded_arrays = (
            _in_zeros(pooler.T, width, width),
            _in_zeros(pooler_bias, width),
            _in_zeros(classifier.reshape(-1), width),
            classifier_bias.reshape(1),
        )
        return dict(zip(names, padded_arrays, strict=True))

    def shallow_head(self) -> dict[str, Array]:
        """Return the linear head [3, width] and its bias [1], float32, padded."""
        names = _both(SHALLOW_HEAD)
        weight, bias = map(self._float32, names)
        rows = _in_zeros(weight.reshape(3, -1), 3, self._plan.width)
        return dict(zip(names, (rows, bias.reshape(1)), strict=True))

    def layer(self, number: int) -> dict[str, Array]:
        """Return what a layer has of weights, by their names."""
        found: dict[str, Array] = {}
        for step in STEPS:
            path = layer_path(number, step)
            biases = [self._float32(name) for name in self._names(number, step, "bias")]
            found[weight_name(path, "bias")] = self._packed(step, biases)
            if self._plan.is_quantized(number, step):
                found |= self._quantized(number, step)
            else:
                linears = [self._float32(name).T for name in self._names(number, step, "weight")]
                found[weight_name(path)] = self._typed(self._packed(step, linears))
        for part in (ATTENTION_NORM, FFN_NORM):
            for name in _both(layer_path(number, part)):
                found[name] = _in_zeros(self._float32(name), self._plan.width)
        return found

    def _quantized(self, number: int, step: str) -> dict[str, Array]:
        """Return the 8-bit weight of a step, its scales, and what its input is multiplied by."""
        names = [
            name for part in _linears(step) for name in _quantized_names(self._graph, number, part)
        ]
        kind = np.int8 if self._plan.kind == "int8" else np.uint8
        values = [self._graph.array(name).view(kind).T for name in names]
        scales = [self._graph.array(f"{name.removesuffix(QUANTIZED)}{SCALES}").T for name in names]
        path, inputs = layer_path(number, step), self._inputs(step)
        smooth = np.ones(inputs, np.float32)
        factors = weight_name(layer_path(number, _linears(step)[0]), SMOOTH)
        if factors in self._graph.weights:
            smooth = _in_zeros(self._graph.array(factors), inputs)
        return {
            weight_name(path): self._packed(step, values),
            weight_name(path, SCALES): self._packed(step, scales, inputs // ALIGNMENT),
            weight_name(path, SMOOTH): smooth,
        }

    def _names(self, number: int, step: str, what: str) -> Iterator[str]:
        return (weight_name(layer_path(number, part), what) for part in _linears(step))

    def _inputs(self, step: str) -> int:
        plan = self._plan
        known = {ATTENTION_OUTPUT: plan.attention, FFN2: plan.wide}
        return known.get(step, plan.width)

    def _packed(self, step: str, parts: list[Array], columns: int | None = None) -> Array:
        """Return rows, one an output of a step, padded and in one array; None: `_inputs`."""
        plan = self._plan
        more = (columns or self._inputs(step),) * (parts[0].ndim - 1)
        if step == QKV:
            heads = [_in_zeros(self._by_heads(part), plan.attention, *more) for part in parts]
            return np.concatenate(heads)
        (part,) = parts
        if step == ATTENTION_OUTPUT and more:
            part = self._by_heads(part.T).T
        return _in_zeros(part, plan.wide if step == FFN1 else plan.width, *more)

    def _by_heads(self, values: Array) -> Array:
        """Return rows of heads [hidden, ...] with each head padded: [heads * head, ...]."""
        heads, rest = self._plan.num_heads, values.shape[1:]
        split = values.reshape(heads, -1, *rest)
        return _in_zeros(split, heads, self._plan.head, *rest).reshape(-1, *rest)

    def _typed(self, values: Float32) -> Array:
        """Return float32 values, which are of the element type already, in its bits."""
        if self._element == "float16":
            return values.astype(np.float16)
        return (values.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16 is the upper half

    def _float32(self, name: str) -> Float32:
        return self._array(name).astype(np.float32)

    def _array(self, name: str) -> Array:
        for each in (name, f"{name}.{self._element}"):
            if each in self._graph.weights:
                return self._graph.array(each)
        self.missing.append(name)
        return np.zeros((1, 1), np.float32)


def _smooths_cls_apart(graph: Graph, num_layers: int) -> bool:
    """Tell whether the last layer's query, which reads the CLS rows alone, has other factors."""
    found = [
        graph.array(name)
        for part in (QUERY, KEY)
        if (name := weight_name(layer_path(num_layers - 1, part), SMOOTH)) in graph.weights
    ]
    return bool(found) and (len(found) == 1 or not np.array_equal(found[0], found[1]))


def _linears(step: str) -> tuple[str, ...]:
    """Return the linears of a step of a layer."""
    return (QUERY, KEY, VALUE) if step == QKV else (step,)


def _quantized_names(graph: Graph, number: int, part: str) -> Iterator[str]:
    """Yield the name of a linear's quantised weight, where it has one."""
    name = weight_name(layer_path(number, part))
    for each in (name, f"{name}.{SMOOTH}"):
        if f"{each}.{QUANTIZED}" in graph.weights:
            yield f"{each}.{QUANTIZED}"


def _both(path: str) -> tuple[str, str]:
    """Return the names of the weight and the bias of what is at `path`."""
    return weight_name(path), weight_name(path, "bias")


def _in_zeros(values: Array, *shape: int) -> Array:
    """Return `values` in the corner of zeros of `shape`."""
    room = np.zeros(shape, values.dtype)
    room[tuple(map(slice, values.shape))] = values
    return room


def _safetensors() -> Any:
    try:
        from safetensors import numpy as library
    except ImportError as error:
        message = f"the weights of a native engine need safetensors: {error}"
        raise EngineError(message, hint="pip install 'edje-runtime[gpu]'") from error
    return library
