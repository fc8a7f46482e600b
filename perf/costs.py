"""What the stages of a batch cost: formulas whose constants are fitted to committed figures.

No constant is fitted to a figure that it predicts: an engine's speed comes from runs without our
pipeline (`bare`), what feeding costs from runs without an engine or with another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import EdjeError
from . import measured
from .measured import BARE, COMPILED, NO_ENGINE, ONNXRUNTIME, PIPELINED, RESIDENT, Row

RECORD_BYTES = {"float16": 49_152, "int8": 24_704}  # 64 tokens x 384 values; int8: with scales
SLOTS_OF_SHORT = 80  # 13 wordpieces, 64 tokens, 3 special ones
LAUNCH_BOUND = 1.06  # rows within 6 % of the least time count as bound by launches


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a batch of n pairs: `fixed_s + n * per_pair_s`."""

    fixed_s: float = 0.0
    per_pair_s: float = 0.0

    def of(self, num_pairs: int) -> float:
        """Return the seconds of a batch."""
        return self.fixed_s + num_pairs * self.per_pair_s


@dataclass(frozen=True, slots=True)
class Compute:
    """Seconds that an engine takes: `max(launch_s, fixed_s + n * (base_s + slots * slot_s))`.

    Attributes:
        launch_s: the calling thread needs so long to launch one batch, however small.
    """

    launch_s: float
    fixed_s: float
    base_s: float
    slot_s: float

    def of(self, num_pairs: int, slots: int) -> float:
        """Return the seconds of a batch."""
        work = self.fixed_s + num_pairs * (self.base_s + slots * self.slot_s)
        return max(self.launch_s, work)


class StageCosts(NamedTuple):
    """All that a batch, and a request, costs on one machine with one engine.

    Attributes:
        compute: the engine's work, in the stream that computes.
        launch: the calling thread's, a batch: its Python, and the engine's launches.
        read: the calling thread's, from where the records lie to where the engine's copy begins.
        upload, download: in streams of their own.
        ask: a request before its first batch (tokenise, resolve), and after the last (rank).
    """

    compute: Cost
    launch: Cost
    read: Cost
    upload: Cost
    download: Cost
    ask: Cost


def fit_compute(rows: Sequence[Row]) -> Compute:
    """Fit an engine's bare runs, every row's relative error counting alike.

    The floor of its launches is a time that two rows or more share: the one that fits best, or
    none.
    """
    times = np.array([row.seconds / row.num_batches for row in rows])
    sizes = [(1.0, row.batch, row.batch * row.slots) for row in rows]
    best: tuple[float, Compute] | None = None
    for floor in (0.0, *sorted(times)[: len(times) // 3]):
        free = times > floor * LAUNCH_BOUND
        if floor and (~free).sum() < 2:
            continue
        weighed = np.array(sizes)[free] / times[free][:, None]
        found, *_ = np.linalg.lstsq(weighed, np.ones(int(free.sum())), rcond=None)
        trial = Compute(float(floor), *map(float, found))
        guesses = np.array([trial.of(row.batch, row.slots) for row in rows])
        error = float(np.square(np.log(np.maximum(guesses, 1e-9) / times)).sum())
        if best is None or error < best[0]:
            best = error, trial
    assert best is not None
    return best[1]


def fit_cost(batches: Sequence[int], seconds: Sequence[float]) -> Cost:
    """Fit seconds a batch over its size, every point's relative error counting alike."""
    times = np.array(seconds)
    weighed = np.array([(1.0, size) for size in batches]) / times[:, None]
    fixed, per_pair = np.linalg.lstsq(weighed, np.ones(len(times)), rcond=None)[0]
    return Cost(max(0.0, float(fixed)), float(per_pair))


def through(few: tuple[int, float], many: tuple[int, float]) -> Cost:
    """Return the cost that goes through two measured batches (pairs, seconds)."""
    per_pair = (many[1] - few[1]) / (many[0] - few[0])
    return Cost(max(0.0, few[1] - few[0] * per_pair), per_pair)


def own_launch() -> Cost:
    """Return the calling thread's Python a batch: CPU time of runs from tokens on the GPU.

    Of the smallest and the largest batch: in between, waiting for the GPU costs CPU time, too.
    """
    rows = sorted(measured.rows(COMPILED, RESIDENT), key=lambda each: (each.batch, each.slots))
    ends = [(each.batch, each.cpu_seconds / each.num_batches) for each in (rows[0], rows[-1])]
    return through(*ends)


def copied_read(other: str) -> Cost:
    """Return the copy out of host memory, by the timers of another engine's runs."""
    rows = measured.rows(other, PIPELINED)
    return fit_cost([r.batch for r in rows], [r.stages_ms["gather_ms"] / 1e3 for r in rows])


def fed(place: str) -> Cost:
    """Return what reading from `place` costs, by runs of `Reranker.rank` without an engine.

    What the same run costs from the GPU's memory is not reading, and taken off.
    """
    if place == "device":
        return Cost()
    many = measured.row(NO_ENGINE, place).seconds - measured.row(NO_ENGINE, "device").seconds
    few = measured.latency_s(NO_ENGINE, place) - measured.latency_s(NO_ENGINE, "device")
    batch = measured.RANKED_BATCH
    each = many * batch / measured.RANKED_PAIRS
    return through((measured.FEW, few), (batch, each))


def asked() -> Cost:
    """Return what is left of a request without an engine and without reading: a fit of two."""
    launch, batch = own_launch(), measured.RANKED_BATCH
    num_batches = measured.RANKED_PAIRS // batch
    many = measured.row(NO_ENGINE, "device").seconds - num_batches * launch.of(batch)
    few = measured.latency_s(NO_ENGINE, "device") - launch.of(measured.FEW)
    return through((measured.FEW, max(few, 0.0)), (measured.RANKED_PAIRS, many))


def h200(
    place: str, *, slots: int = SLOTS_OF_SHORT, engine: str = COMPILED, dtype: str = "float16"
) -> StageCosts:
    """Return the costs on the measured H200 and its 16 cores, tokens from disk, host or device.

    int8 records take half the bytes of float16 ones to read and copy (assumed: measured on GPUs
    they were not).
    """
    compute = fit_compute(measured.rows(engine, BARE))
    share = RECORD_BYTES[dtype] / RECORD_BYTES["float16"]
    read = fed(place)
    copied = share * RECORD_BYTES["float16"] / measured.ceiling("h2d")
    return costs_of(
        compute,
        slots,
        read=Cost(read.fixed_s, read.per_pair_s * share),
        upload=Cost(per_pair_s=0.0 if place == "device" else copied),
        ask=asked(),
    )


def costs_of(compute: Compute, slots: int, *, read: Cost, upload: Cost, ask: Cost) -> StageCosts:
    """Join the costs of a GPU's stages; the engine's launches are the calling thread's."""
    own = own_launch()
    return StageCosts(
        compute=Cost(compute.fixed_s, compute.base_s + slots * compute.slot_s),
        launch=Cost(own.fixed_s + compute.launch_s, own.per_pair_s),
        read=read,
        upload=upload,
        download=Cost(8e-6),
        ask=ask,
    )


def of_stages(stages: Mapping[str, tuple[int, float]], read_from: str = "disk") -> StageCosts:
    """Return the costs that `edje bench run` has measured: (pairs, seconds) by stage.

    One batch size was measured, so what a batch costs beside its pairs is not known apart: work
    counts by the pair, calls by the batch. `enqueue` is a batch's way through all streams: what
    the streams' own work does not explain is the calling thread's.

    Raises:
        EdjeError: a stage is missing that every machine has.
    """
    missing = [name for name in ("read", "forward") if name not in stages]
    if missing:
        raise EdjeError(
            f"the stages {', '.join(missing)} were not measured",
            hint="edje bench run, without --stages, measures all",
        )

    def work(name: str) -> Cost:
        pairs, seconds = stages.get(name, (1, 0.0))
        return Cost(per_pair_s=seconds / pairs)

    def once(name: str) -> float:
        return stages.get(name, (1, 0.0))[1]

    resolve, sort = work("resolve").per_pair_s, work("sort").per_pair_s
    return StageCosts(
        compute=work("forward"),
        launch=Cost(max(0.0, once("enqueue") - sum(map(once, ("forward", "upload", "download"))))),
        read=Cost() if read_from == "device" else work("read"),
        upload=Cost() if read_from == "device" else work("upload"),
        download=Cost(once("download")),
        ask=Cost(once("tokenise"), resolve + sort),
    )


def other_than(engine: str) -> str:
    """Return the engine whose timers predict this one's runs."""
    return ONNXRUNTIME if engine == COMPILED else COMPILED
