"""One forward as launches of kernels, over activations that never move.

    assemble       the slot's text and tokens -> hidden states
    every layer    qkv, attention, attention_output, add + norm, ffn1 with GELU, ffn2, add + norm
    (what an 8-bit product reads, the step before it writes in 8 bits)

    the last one   keys and values of every slot, everything else for each pair's CLS row
    score          pooler and classifier -> the slot's scores

What a shallow engine kept of hidden states, the whole model goes on from (`hidden`).

In a shallow engine the last layer is as whole as the others, and then comes

    shallow_score  a linear head over every slot -> the slot's scores

`control` says how many pairs a batch has, and no kernel works past them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import cast

from ...arrays import DeviceArray
from ...bundle import FFN1, QKV
from ...kernels.device.contract import Device, Stream
from ...kernels.launch import KernelLibrary
from ...kernels.layers import Attention, Score, ShallowScore
from ...kernels.operations import Assemble, DeviceEmbeddings
from ..contract import Batch
from .hidden import Keep, Resume
from .memory import Activations, ClsRows, Rows, as_rows_of, columns
from .plan import Plan
from .steps import Choices, Steps, Work
from .weights import CLASSIFIER, NORM, POOLER, POSITIONS, SHALLOW_HEAD, WORDS


class Forward:
    """The launches of one engine on one stream, and the memory that they share.

    Attributes:
        plan, resumes_at: what is run.
    """

    def __init__(
        self,
        device: Device,
        library: KernelLibrary,
        plan: Plan,
        weights: Mapping[str, DeviceArray],
        choices: Choices,
        resumes_at: int = 0,
    ):
        """Allocate the activations and load the kernels; `device` is current and owns both.

        Args:
            weights: in device memory, as `weights.take_weights` names them.
            choices: tiles, and what runs in one kernel.
            resumes_at: the layer before which it may go on from kept hidden states; 0: nowhere.

        Raises:
            EngineError: too little memory, or no kernel for this GPU.
        """
        self.plan, self._weights, self.resumes_at = plan, weights, resumes_at
        self._memory = Activations(device, plan)
        self._steps = Steps(
            library, plan, weights, self._memory.control, device.num_processors, choices
        )
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
            for num_queries in (plan.num_slots(bucket), *([] if plan.shallow else [1]))
        }
        if self._memory.cls is None:
            linear = ShallowScore(library, dtype=plan.element, width=plan.width)
            self._end = partial(self._score_slots, linear)
            self._keep = Keep(library)
        else:
            pooler = Score(library, dtype=plan.element, width=plan.width)
            self._end = partial(self._score_cls, pooler, self._memory.cls)
            if resumes_at:
                self._resume = Resume(library)
        tables = DeviceEmbeddings(
            weights[WORDS],
            weights[POSITIONS],
            *self._steps.linear(NORM),
            epsilon=plan.epsilons[0],
            sep_id=plan.sep_id,
        )
        types = {"token_dtype": plan.token_dtype, "out_dtype": plan.element}
        self._assemble = Assemble(library, tables, width=plan.width, **types)

    def assemble(self, batch: Batch, scores: DeviceArray, stream: Stream) -> None:
        """Embed a batch of at most the plan's pairs, and note where its scores go."""
        memory = self._memory
        rows = memory.order[: len(batch)] if batch.rows is None else batch.rows
        fresh, fresh_scales = batch.fresh or (None, None)
        self._assemble.enqueue(
            cast(DeviceArray, batch.text_ids),
            cast(DeviceArray, batch.text_length),
            cast(DeviceArray, batch.query_of_pair),
            cast(DeviceArray, batch.visual_tokens),
            cast(DeviceArray, rows),
            memory.hidden.exact,
            lengths=memory.lengths,
            control=memory.control,
            scores=scores,
            stream=stream,
            scales=cast("DeviceArray | None", batch.visual_scales),
            fresh=cast("DeviceArray | None", fresh),
            fresh_scales=cast("DeviceArray | None", fresh_scales),
        )

    def resume(self, batch: Batch, stream: Stream) -> None:
        """Bring the hidden states that a batch goes on from, in place of the embeddings."""
        self._resume.enqueue(self._memory.hidden.exact, batch, stream)

    def keep(self, batch: Batch, stream: Stream) -> None:
        """Keep the last layer's hidden states where the batch says; for a shallow engine."""
        self._keep.enqueue(self._memory.hidden.exact, batch, stream)

    def enqueue(self, bucket: int, num_pairs: int, stream: Stream, first: int = 0) -> None:
        """Run what follows `assemble`, for batches of `bucket` and at most `num_pairs` pairs.

        Args:
            first: the layer to begin with; not 0 where hidden states were brought.
        """
        work = Work(num_pairs, self.plan.num_slots(bucket), stream)
        if first == 0:
            self._steps.quantize(0, QKV, self._memory.hidden, work)
        for layer in range(first, self.plan.num_whole_layers):
            self._layer(layer, bucket, work)
        self._end(bucket, work)

    def _score_slots(self, score: ShallowScore, bucket: int, work: Work) -> None:
        """Run a shallow engine's head."""
        memory = self._memory
        score.enqueue(
            memory.hidden.exact,
            memory.lengths,
            *self._steps.linear(SHALLOW_HEAD),
            memory.control,
            num_pairs=work.num_pairs,
            num_slots=work.rows_per_pair,
            text_slots=bucket,
            stream=work.stream,
        )

    def _score_cls(self, score: Score, cls: ClsRows, bucket: int, work: Work) -> None:
        """Run the last layer, pooler and classifier."""
        self._last_layer(cls, bucket, work)
        score.enqueue(
            cls.states.exact,
            *self._steps.linear(POOLER),
            *self._steps.linear(CLASSIFIER),
            self._memory.control,
            num_pairs=work.num_pairs,
            stream=work.stream,
        )

    def _layer(self, layer: int, bucket: int, work: Work) -> None:
        """Run a whole layer over every slot."""
        memory, width = self._memory, self.plan.attention
        self._steps.product(layer, QKV, memory.hidden, Rows(memory.qkv), work)
        queries = columns(memory.qkv, 0, width)
        keys, values = (columns(memory.qkv, at * width, width) for at in (1, 2))
        self._attend(bucket, (queries, keys, values), 3 * width, work)
        self._finish(layer, memory.hidden, work)

    def _last_layer(self, rows: ClsRows, bucket: int, work: Work) -> None:
        """Run the last layer: keys and values of every slot, everything else for the CLS rows."""
        memory, width, slots = self._memory, self.plan.attention, work.rows_per_pair
        layer = self.plan.num_layers - 1
        both, cls = as_rows_of(memory.qkv, 2 * width), work._replace(rows_per_pair=1)
        product = self._steps.product
        product(layer, QKV, memory.hidden, Rows(both), work, part=slice(width, None))
        query, queries = slice(width), Rows(rows.queries)
        product(layer, QKV, memory.hidden, queries, cls, part=query, row_step=slots)
        keys, values = (columns(both, at * width, width) for at in range(2))
        self._attend(bucket, (rows.queries, keys, values), 2 * width, cls)
        self._finish(layer, rows.states, cls, residual_stride=slots * self.plan.width)

    def _attend(
        self,
        bucket: int,
        qkv: tuple[DeviceArray, DeviceArray, DeviceArray],
        key_stride: int,
        work: Work,
    ) -> None:
        """Let each row of `work` attend to every real slot of its pair: `context`."""
        memory = self._memory
        whole = work.rows_per_pair != 1
        self._attention[bucket, work.rows_per_pair].enqueue(
            *qkv,
            memory.context,
            memory.lengths,
            memory.control,
            num_pairs=work.num_pairs,
            stream=work.stream,
            query_stride=key_stride if whole else None,
            key_stride=key_stride,
        )

    def _finish(
        self, layer: int, states: Rows, work: Work, residual_stride: int | None = None
    ) -> None:
        """Run what follows attention: `context` -> `states`, the layer's hidden states.

        Args:
            residual_stride: from one row to the next of `hidden`, of which these are some.
        """
        memory, steps = self._memory, self._steps
        update, hidden = memory.update, memory.hidden.exact
        context = Rows(memory.context)
        steps.product_and_norm(2 * layer, context, update, hidden, states, work, residual_stride)
        steps.product(layer, FFN1, states, memory.wide, work)
        steps.product_and_norm(2 * layer + 1, memory.wide, update, states.exact, states, work)
