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
    QUERY,
    VALUE,
    WORD_EMBEDDINGS,
    layer_path,
    weight_name,
)
from ...errors import EngineError
from .plan import Plan

if TYPE_CHECKING:
    from ..precision.graph import Graph

WEIGHTS = "weights.safetensors"
ATTENTION_NORM, FFN_NORM = "attention_norm", "ffn_norm"
NORM, WORDS, POSITIONS = "embeddings/norm", "embeddings.words", "embeddings.positions"
POOLER, CLASSIFIER = "pooler", "classifier"


def take_weights(graph: Graph, plan: Plan) -> dict[str, Array]:
    """Return a graph's weights by the names that `forward` reads them.

    Products [num_out, num_in] are of the plan's element type (bfloat16 as uint16), everything else
    is float32. Rows and columns are padded, but for the embeddings.

    Raises:
        EngineError: weights that the bundle's graphs have are not there (all named).
    """
    taken = _Weights(graph, plan)
    found = {**taken.embeddings(), **taken.head()}
    for number in range(plan.num_layers):
        for part, weight, bias in taken.layer(number):
            path = layer_path(number, part)
            found |= {weight_name(path): weight, weight_name(path, "bias"): bias}
    if taken.missing:
        raise EngineError(
            "this graph is no joint encoder as `edje export` writes it",
            faults=[f"{name}: missing" for name in taken.missing],
        )
    return found


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

    def layer(self, number: int) -> Iterator[tuple[str, Array, Float32]]:
        """Yield the parts of a layer that have weights: name, weight, bias."""
        plan = self._plan
        maps = [self._linear(number, part) for part in (QUERY, KEY, VALUE)]
        weights = [_in_zeros(self._by_heads(w), plan.attention, plan.width) for w, _ in maps]
        biases = [_in_zeros(self._by_heads(bias), plan.attention) for _, bias in maps]
        yield QKV, self._typed(np.concatenate(weights)), np.concatenate(biases)
        shapes = {
            ATTENTION_OUTPUT: (plan.width, plan.attention),
            FFN1: (plan.wide, plan.width),
            FFN2: (plan.width, plan.wide),
        }
        for part, shape in shapes.items():
            weight, bias = self._linear(number, part)
            if part == ATTENTION_OUTPUT:
                weight = self._by_heads(weight.T).T
            yield part, self._typed(_in_zeros(weight, *shape)), _in_zeros(bias, shape[0])
        for part in (ATTENTION_NORM, FFN_NORM):
            norm_weight, norm_bias = map(self._float32, _both(layer_path(number, part)))
            yield part, _in_zeros(norm_weight, plan.width), _in_zeros(norm_bias, plan.width)

    def _linear(self, number: int, part: str) -> tuple[Float32, Float32]:
        """Return a linear's weight [num_out, num_in] and bias [num_out]."""
        weight, bias = map(self._float32, _both(layer_path(number, part)))
        return weight.T, bias

    def _by_heads(self, values: Float32) -> Float32:
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
