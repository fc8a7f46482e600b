"""What a native engine runs: the model's sizes, its types, and the tile of every product."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ...arguments import read_fields
from ...bundle import ATTENTION_OUTPUT, FFN1, FFN2, QKV, layer_path
from ...errors import EngineError

PLAN = "plan.json"
FORMAT_VERSION = 2
# Rows and columns of activations are padded to this, so that no tile of a product is cut.
ALIGNMENT = 128
# Columns of a head that the kernels know; smaller heads are padded to the next.
HEADS = (32, 64)
# The products of a layer, as `kernels/tuning` names them: each has one tile, whatever the batch.
STEPS = (QKV, ATTENTION_OUTPUT, FFN1, FFN2)
STEPS8 = (QKV, FFN1, FFN2)  # those that can be 8 bit
# More pairs go in parts: from here on the GPU is full, and activations of 128 slots take 1 GB.
MOST_PAIRS_AT_ONCE = 1024


def padded(size: int) -> int:
    """Return `size` rounded up to whole tiles."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def graph_sizes(most: int) -> tuple[int, ...]:
    """Return the numbers of pairs that graphs are captured for: powers of two, and `most`.

    A batch runs the graph of the next size, whose kernels stop at the batch's own pairs: what is
    left are thread blocks that end at once.
    """
    powers = [1 << exponent for exponent in range((most - 1).bit_length())]
    return (*powers, most)


def group_name(layer: int, step: str) -> str:
    """Return the name of a layer group: `layers.3.ffn2`."""
    return f"{layer_path(layer)}.{step}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The content of `plan.json`.

    Attributes:
        hidden, intermediate, num_heads, num_tokens: as in the bundle.
        num_layers: of the graph.
        shallow: whether the graph ends with a linear head over every slot of its last layer, in
            place of pooler and classifier, which read the CLS row.
        sep_id: the word of the last slot.
        epsilons: of every LayerNorm: the embeddings' first, then two a layer.
        activation: `exact` (GELU by erf) or `tanh`.
        element: type of weights and activations, `float16` or `bfloat16`.
        token_dtype: of the stored tokens, `float16` or `int8`.
        max_pairs: pairs that run at once; larger batches go in parts.
        text_buckets: text slots that a batch may have, ascending.
        tiles: compute capability -> step of a layer -> tile of its product.
        kind: of 8-bit layer groups, `int8` or `fp8`; empty where there are none.
        quantized: layer groups of that type, as `layers.3.ffn2`; the others are of `element`.
        tiles8: as `tiles`, of the products of the quantised groups.
        tuning: compute capability -> SHA-256 of the tuning table that the tiles came from.
        fused: compute capability -> steps whose product takes residual and norm along, where
            neither is in 8 bits.
    """

    hidden: int
    intermediate: int
    num_layers: int
    shallow: bool
    num_heads: int
    num_tokens: int
    sep_id: int
    epsilons: tuple[float, ...]
    activation: str
    element: str
    token_dtype: str
    max_pairs: int
    text_buckets: tuple[int, ...]
    tiles: Mapping[str, Mapping[str, str]]
    tuning: Mapping[str, str]
    kind: str = ""
    quantized: tuple[str, ...] = ()
    tiles8: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def width(self) -> int:
        """Columns of the hidden states, padding included."""
        return padded(self.hidden)

    @property
    def wide(self) -> int:
        """Columns between the feed-forward's two products, padding included."""
        return padded(self.intermediate)

    @property
    def head(self) -> int:
        """Columns of one head, padding included."""
        return next(size for size in HEADS if size >= self.hidden // self.num_heads)

    @property
    def attention(self) -> int:
        """Columns of queries, of keys, of values and of what attention gives, padding included."""
        return padded(self.num_heads * self.head)

    @property
    def num_whole_layers(self) -> int:
        """Layers that compute every slot: the last before a pooler computes the CLS rows alone."""
        return self.num_layers if self.shallow else self.num_layers - 1

    def is_quantized(self, layer: int, step: str) -> bool:
        """Tell whether a step of a layer reads 8-bit rows."""
        return group_name(layer, step) in self.quantized

    def num_slots(self, text_slots: int) -> int:
        """Return the slots of one pair: text, visual tokens, SEP."""
        return text_slots + self.num_tokens + 1

    def write(self, folder: Path) -> None:
        """Write `plan.json` into `folder`."""
        text = json.dumps(asdict(self), indent=1) + "\n"
        (folder / PLAN).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """Read `plan.json` of the engine at `folder`.

        Raises:
            EngineError: it is missing or damaged.
        """
        path, faults = folder / PLAN, []
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            faults = [str(error)]
        else:
            plan = read_fields(cls, values, "", faults) if isinstance(values, dict) else None
            if plan is not None and plan.format_version == FORMAT_VERSION:
                return plan
        raise EngineError(
            f"{path} cannot be read", faults=faults, hint="build the engine again: edje build"
        )
