"""One forward as launches of kernels, over activations that never move.

    assemble       the slot's text and tokens -> hidden states
    every layer    qkv, attention, attention_output, add + norm, ffn1 with GELU, ffn2, add + norm
    the last one   keys and values of every slot, everything else for each pair's CLS row
    score          pooler and classifier -> the slot's scores

`control` says how many pairs a batch has, and no kernel works past them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

from ...arrays import DeviceArray
from ...bundle import ATTENTION_OUTPUT, FFN1, FFN2, QKV, layer_path, weight_name
from ...kernels.device.contract import Device, Stream
from ...kernels.launch import KernelLibrary
from ...kernels.layers import AddNorm, Attention, Product, Score
from ...kernels.operations import Assemble, DeviceEmbeddings
from ..contract import Batch
from .memory import Activations, as_rows_of, columns
from .plan import Plan
from .weights import ATTENTION_NORM, CLASSIFIER, FFN_NORM, NORM, POOLER, POSITIONS, WORDS


class Rows(NamedTuple):
    """Which rows a step works on: `rows_per_pair` of each of at most `num_pairs` pairs."""

    num_pairs: int
    rows_per_pair: int
    stream: Stream


class Forward:
    """The launches of one engine on one stream, and the memory that they share.

    Attributes:
        plan: what is run.
    """

    def __init__(
        self,
        device: Device,
        library: KernelLibrary,
        plan: Plan,
        weights: Mapping[str, DeviceArray],
        tiles: Mapping[str, str],
    ):
        """Allocate the activations and load the kernels; `device` is current and owns both.

        Args:
            weights: in device memory, as `weights.take_weights` names them.
            tiles: step of a layer -> tile of its product.

        Raises:
            EngineError: too little memory, or no kernel for this GPU.
        """
        self.plan, self._weights = plan, weights
        self._memory = Activations(device, plan)
        self._products = {
            step: Product(
                library,
                dtype=plan.element,
                gelu=plan.activation if step == FFN1 else "none",
                tile=tile,
                num_processors=device.num_processors,
            )
            for step, tile in tiles.items()
        }
        self._attention = {
            (bucket, num_queries): Attention(
                library,
                dtype=plan.element,
                head=plan.head,
                num_heads=plan.num_heads,
                text_slots=bucket,
                num_slots=plan.num_slots(bucket),
                num_queries=num_queries,
            )
            for bucket in plan.text_buckets
            for num_queries in (1, plan.num_slots(bucket))
        }
        sizes = {"hidden": plan.hidden, "width": plan.width}
        self._norms = [
            AddNorm(library, dtype=plan.element, epsilon=epsilon, **sizes)
            for epsilon in plan.epsilons[1:]
        ]
        self._score = Score(library, dtype=plan.element, width=plan.width)
        tables = DeviceEmbeddings(
            weights[WORDS],
            weights[POSITIONS],
            *self._linear(NORM),
            epsilon=plan.epsilons[0],
            sep_id=plan.sep_id,
        )
        types = {"token_dtype": plan.token_dtype, "out_dtype": plan.element}
        self._assemble = Assemble(library, tables, width=plan.width, **types)

    def assemble(self, batch: Batch, scores: DeviceArray, stream: Stream) -> None:
        """Embed a batch of at most the plan's pairs, and note where its scores go."""
        memory = self._memory
        self._assemble.enqueue(
            cast(DeviceArray, batch.text_ids),
            cast(DeviceArray, batch.text_length),
            cast(DeviceArray, batch.query_of_pair),
            cast(DeviceArray, batch.visual_tokens),
            memory.order[: len(batch)],
            memory.hidden,
            lengths=memory.lengths,
            control=memory.control,
            scores=scores,
            stream=stream,
            scales=cast("DeviceArray | None", batch.visual_scales),
        )

    def enqueue(self, bucket: int, num_pairs: int, stream: Stream) -> None:
        """Run what follows `assemble`, for batches of `bucket` and at most `num_pairs` pairs."""
        memory, last = self._memory, self.plan.num_layers - 1
        rows = Rows(num_pairs, self.plan.num_slots(bucket), stream)
        for layer in range(last):
            self._layer(layer, bucket, rows)
        self._last_layer(last, bucket, rows)
        head = (*self._linear(POOLER), *self._linear(CLASSIFIER))
        self._score.enqueue(memory.cls, *head, memory.control, num_pairs=num_pairs, stream=stream)

    def _layer(self, layer: int, bucket: int, rows: Rows) -> None:
        """Run a whole layer over every slot."""
        memory, width = self._memory, self.plan.attention
        self._product(QKV, self._linear(layer_path(layer, QKV)), memory.hidden, memory.qkv, rows)
        queries = columns(memory.qkv, 0, width)
        keys, values = (columns(memory.qkv, at * width, width) for at in (1, 2))
        self._attend(bucket, (queries, keys, values), 3 * width, rows)
        self._finish(layer, memory.hidden, rows)

    def _last_layer(self, layer: int, bucket: int, rows: Rows) -> None:
        """Run the last layer: keys and values of every slot, everything else for the CLS rows."""
        memory, width = self._memory, self.plan.attention
        weight, bias = self._linear(layer_path(layer, QKV))
        both = as_rows_of(memory.qkv, 2 * width)
        self._product(QKV, (weight[width:], bias[width:]), memory.hidden, both, rows)
        cls, stride = rows._replace(rows_per_pair=1), rows.rows_per_pair * self.plan.width
        query = weight[:width], bias[:width]
        self._product(QKV, query, memory.hidden, memory.queries, cls, x_stride=stride)
        keys, values = (columns(both, at * width, width) for at in range(2))
        self._attend(bucket, (memory.queries, keys, values), 2 * width, cls)
        self._finish(layer, memory.cls, cls, residual_stride=stride)

    def _attend(
        self,
        bucket: int,
        qkv: tuple[DeviceArray, DeviceArray, DeviceArray],
        key_stride: int,
        rows: Rows,
    ) -> None:
        """Let each row of `rows` attend to every real slot of its pair: `context`."""
        memory = self._memory
        whole = rows.rows_per_pair != 1
        self._attention[bucket, rows.rows_per_pair].enqueue(
            *qkv,
            memory.context,
            memory.lengths,
            memory.control,
            num_pairs=rows.num_pairs,
            stream=rows.stream,
            query_stride=key_stride if whole else None,
            key_stride=key_stride,
        )

    def _finish(
        self, layer: int, states: DeviceArray, rows: Rows, residual_stride: int | None = None
    ) -> None:
        """Run what follows attention: `context` -> `states`, the layer's hidden states.

        Args:
            residual_stride: from one row to the next of `hidden`, of which these are some.
        """
        memory = self._memory
        parts = (ATTENTION_OUTPUT, FFN1, FFN2, ATTENTION_NORM, FFN_NORM)
        output, ffn1, ffn2, *norms = (self._linear(layer_path(layer, part)) for part in parts)
        self._product(ATTENTION_OUTPUT, output, memory.context, memory.update, rows)
        self._norm(2 * layer, norms[0], memory.hidden, states, rows, residual_stride)
        self._product(FFN1, ffn1, states, memory.wide, rows)
        self._product(FFN2, ffn2, memory.wide, memory.update, rows)
        self._norm(2 * layer + 1, norms[1], states, states, rows)

    def _product(
        self,
        step: str,
        linear: tuple[DeviceArray, DeviceArray],
        x: DeviceArray,
        out: DeviceArray,
        rows: Rows,
        x_stride: int | None = None,
    ) -> None:
        self._products[step].enqueue(
            x, *linear, out, self._memory.control, x_stride=x_stride, **rows._asdict()
        )

    def _norm(
        self,
        number: int,
        linear: tuple[DeviceArray, DeviceArray],
        residual: DeviceArray,
        out: DeviceArray,
        rows: Rows,
        residual_stride: int | None = None,
    ) -> None:
        self._norms[number].enqueue(
            self._memory.update,
            residual,
            *linear,
            out,
            self._memory.control,
            residual_stride=residual_stride,
            **rows._asdict(),
        )

    def _linear(self, path: str) -> tuple[DeviceArray, DeviceArray]:
        """Return weight and bias of what is at `path`."""
        return self._weights[weight_name(path)], self._weights[weight_name(path, "bias")]
