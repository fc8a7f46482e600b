"""The stages of a ranking, each as something to run and measure, warm and with a check of its own.

`tokenise`, `resolve` and `sort` handle a query's candidates; `read`, `upload`, `forward`, `enqueue`
and `download` one batch of them in a slot of its own; `rank` is `Reranker.rank` of all candidates,
`serve` the same as one request over HTTP to a server process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Float32, Int64
from ..engines.contract import Engine, OpenOptions
from ..engines.manifest import EngineManifest, Profile
from ..engines.registry import open_engine
from ..errors import EdjeError
from ..kernels.device import open_device
from ..kernels.device.contract import Device, Stream
from ..kernels.device.host import InlineStream
from ..runtime.batcher import PlannedBatch, plan_batches
from ..runtime.opening import RunOptions
from ..runtime.pipeline import Scored
from ..runtime.reranker import Reranker
from ..runtime.residency import ResidencyOptions
from ..runtime.results import Candidates, Hit, RankResult, StageTimes
from ..runtime.slot import Slot
from ..runtime.source import tokens_for
from ..runtime.store import TokenStore
from ..runtime.streams import Streams
from ..runtime.text import QueryTokenizer, TokenizedQueries
from .free_engine import FREE, FreeEngine, one_value
from .harness import Progress
from .random_model import image_id
from .serve_traffic import asking
from .server_process import EDJE, serving
from .stage import Stage, expect, make_stage
from .subjects import MAX_KNOWN, drawn, engine_folder, query_of_length, random_store
from .wide_store import row_of

BATCH_STAGES = ("read", "upload", "forward", "enqueue", "download")
NAMES = ("tokenise", "resolve", *BATCH_STAGES, "sort", "rank", "serve")
TOP_K = 10
NUM_SETS = 16  # of records that are read in turn
NUM_CHECKED = 64  # scores of a ranking that are computed again, without pipeline and slots
TOLERANCE = 5e-3  # of a raw logit: an engine may round otherwise in batches of another size
SERVE_FREE = (*EDJE[:2], "edje.perf.serve_free")


@contextmanager
def open_stages(
    engine: Path | None,
    *,
    candidates: int = 1000,
    batch: int | None = None,
    images: int | None = None,
    scratch: Path,
    only: Collection[str] = (),
    store: Path | None = None,
    query: str | None = None,
    wordpieces: int = 13,
    threads: int | None = None,
    free: bool = False,
    backend: str = "openvino",
    precision: str | None = None,
    residency: Any = None,
    warm: bool = True,
    progress: Progress = lambda line: None,
) -> Iterator[dict[str, Stage]]:
    """Open an engine over a store; yield its stages by name, in the order of `NAMES`.

    `upload` and `download` are left out where the engine reads host memory.

    Args:
        engine: folder; None: the full-size random scorer, made as `engine_folder` does.
        candidates: of the one query, none twice.
        batch: pairs of a batch; None: as many as the engine takes, at most `candidates`.
        images: that the random store holds; None: `MAX_KNOWN`, or as many as candidates.
        scratch: a folder for what is written.
        only: names of stages; none: all.
        store: one of the engine's; None writes one of random tokens (see `random_store`).
        query: None: some text of so many `wordpieces`.
        threads: of the engine; None: its own choice.
        residency: where tokens are read from, as `Reranker.open` takes it.
        warm: run and check every stage; False: the engine alone has run.

    Raises:
        EdjeError: something cannot be opened or does not fit, or a stage gives a wrong result.
    """
    if engine is not None and free:
        raise EdjeError("an engine that takes no time has the full-size scorer's sizes: name none")
    made: dict[str, Any] = {"free": free, "backend": backend, "precision": precision}
    folder = engine or engine_folder(scratch, progress, **made)
    with ExitStack() as stack:
        numbers = None if store else random_store(folder, scratch, candidates, images, progress)
        path = store or scratch / "tokens.store"
        bench = Bench(stack, folder, path, scratch, threads, residency)
        bench.ask(candidates, numbers, query, wordpieces, batch)
        stages = {}
        for name in _checked_names(only):
            if name in ("upload", "download") and bench.device.shares_memory:
                continue
            progress(f"warming up: {name}")
            stages[name] = getattr(bench, name)()
            if warm:
                stages[name].run()
                stages[name].check()
            else:
                bench.compute()
        yield stages


class Bench:
    """The opened parts of a ranking; its methods make the stages."""

    def __init__(
        self,
        stack: ExitStack,
        folder: Path,
        store: Path,
        scratch: Path,
        threads: int | None,
        residency: Any,
    ):
        """Open everything; `stack` closes it."""
        self._stack, self._folder, self._scratch, self._threads = stack, folder, scratch, threads
        manifest = EngineManifest.read(folder)
        self.store = stack.enter_context(TokenStore.open(store))
        self.device: Device = open_device(None, manifest.device.get("kind"))
        stack.callback(self.device.close)
        stack.enter_context(self.device.current())
        self.free = manifest.backend == FREE
        self.engine: Engine = (
            FreeEngine(manifest) if self.free else open_engine(folder, OpenOptions(threads))
        )
        stack.callback(self.engine.close)
        self.source = tokens_for(self.engine, self.store)
        self.tokenizer = QueryTokenizer.open(folder, manifest.bundle.text)
        if not isinstance(residency, ResidencyOptions):
            residency = ResidencyOptions(residency)
        runs = RunOptions(self.device, residency=residency)
        self.reranker = stack.enter_context(
            Reranker(self.engine, self.tokenizer, self.store, runs=runs)
        )
        self.streams, self.slot = Streams(self.device), Slot(self.device, manifest)
        shared = self.device.shares_memory
        self.stream: Stream = InlineStream() if shared else self.device.stream()
        self.done = self.device.event()

    def ask(
        self,
        candidates: int,
        numbers: Int64 | None,
        query: str | None,
        wordpieces: int,
        batch: int | None,
    ) -> None:
        """Choose query, candidates and batches.

        Args:
            numbers: of the candidates in a random store; None draws some of the store's ids.
        """
        if numbers is None:
            numbers, ids = drawn(candidates, len(self.store)), self.store.ids()
            self.ids = [ids[number] for number in numbers.tolist()]
            self.rows = self.store.live_rows()[numbers]
        else:
            self.ids = [image_id(number) for number in numbers.tolist()]
            known = min(len(self.store), MAX_KNOWN)
            self.rows = np.asarray(row_of(numbers, known, self.store.layout))
        self.query = query_of_length(self.tokenizer, wordpieces) if query is None else query
        self.queries = self.tokenizer([self.query])
        profile = self.engine.manifest.profile
        size = min(batch or profile.max_pairs, profile.max_pairs, candidates)
        planned = plan_batches(
            self.queries.text_length,
            np.zeros(candidates, np.int64),
            Profile(size, profile.text_buckets),
        )
        most = max(len(one.pairs) for one in planned)
        self.batches = [one for one in planned if len(one.pairs) == most]
        self.fill(self.batches[0])

    def tokenise(self) -> Stage:
        """The query's text -> ids."""

        def check(found: TokenizedQueries) -> None:
            same = np.array_equal(found.text_ids, self.queries.text_ids)
            expect(same and not found.truncated[0], "tokenise: other ids than at first, or cut")

        return make_stage("tokenise", lambda: self.tokenizer([self.query]), len(self.ids), check)

    def resolve(self) -> Stage:
        """The candidates' ids -> rows of the store, each once."""

        def check(found: Candidates) -> None:
            right = np.array_equal(found.rows[found.position], self.rows)
            expect(right, "resolve: an id has the wrong row")

        return make_stage("resolve", self.find, len(self.ids), check)

    def read(self) -> Stage:
        """Records of a batch's number -> the slot, verified; others every time, out of the caches.

        Of a random store they are the real ones, of others any.
        """
        known = self.store.live_rows()[:MAX_KNOWN]
        size, draw = len(self.batches[0].pairs), np.random.default_rng(1)
        turns = cycle([draw.choice(known, size) for _ in range(NUM_SETS)])
        hides_nan = self.engine.manifest.hides_nan

        def run() -> Int64:
            rows = next(turns)
            found = self.slot.read(self.source, rows, check_finite=hides_nan)
            expect(not found.damaged, "read: damaged records")
            return rows

        def check(rows: Int64) -> None:
            self.slot.read(self.source, rows, check_finite=False)
            found, scales = self.slot.host.visual_tokens, self.slot.host.visual_scales
            one, own = np.empty_like(found[:1]), None if scales is None else scales[:1].copy()
            for at, row in enumerate(rows):
                self.source.read(np.array([row]), one, own, bad="mark")
                same = np.array_equal(one[0], found[at], equal_nan=one.dtype.kind == "f")
                expect(same, f"read: record {at} of the batch differs from itself, read alone")

        return make_stage("read", run, size, check)

    def upload(self) -> Stage:
        """The slot's batch -> the device's memory."""
        return self._copying("upload", self.slot.upload)

    def download(self) -> Stage:
        """The batch's scores -> the host's memory."""
        return self._copying("download", self.slot.download)

    def forward(self) -> Stage:
        """One forward of the engine alone, until its scores are there."""
        self.fill(self.batches[0])

        def check(found: object) -> None:
            self.fill(self.batches[0])
            self.score_slot()
            self._check_slot("forward")

        return make_stage("forward", self.compute, len(self.batches[0].pairs), check)

    def enqueue(self) -> Stage:
        """One batch whose records lie in the slot: text in, through the streams, scores back."""

        def run() -> None:
            self.slot.fill_text(self.queries, self.batches[0])
            self.streams.enqueue(self.slot, self.engine.enqueue)
            self.streams.collect(self.slot)

        def check(found: object) -> None:
            self.fill(self.batches[0])
            run()
            self._check_slot("enqueue")

        return make_stage("enqueue", run, len(self.batches[0].pairs), check)

    def sort(self) -> Stage:
        """Scores of all candidates -> ranked hits."""
        asked, label = self.find(), self.reranker.labels[0]
        scores = np.random.default_rng(3).standard_normal(len(asked.rows)).astype(np.float32)
        times = StageTimes(*[0.0] * 7)

        def run() -> RankResult:
            return asked.result(Scored(scores, {}), TOP_K, False, times, label)

        def check(found: RankResult) -> None:
            best = np.sort(scores)[::-1][:TOP_K].tolist()
            expect([hit.score for hit in found] == best, "sort: not the best scores")

        return make_stage("sort", run, len(self.ids), check)

    def rank(self) -> Stage:
        """`Reranker.rank` of all candidates, the best ten wanted."""
        return make_stage(
            "rank",
            lambda: self.reranker.rank(self.query, self.ids, TOP_K),
            len(self.ids),
            partial(self._check_top, "rank", self.reference),
        )

    def serve(self) -> Stage:
        """One request over HTTP to a server process, on a connection that stays open."""
        threads = self._threads
        options = [] if threads is None else ["--num-threads", str(threads)]
        command = SERVE_FREE if self.free else EDJE
        served = serving(
            self._folder, self.store.path, *options, command=command, scratch=self._scratch
        )
        server = self._stack.enter_context(served)
        run = asking(self._stack, server, self.query, self.ids, TOP_K)
        known = one_value(self.rows) if self.free else self.reference  # it reads nothing either
        return make_stage("serve", run, len(self.ids), partial(self._check_top, "serve", known))

    def find(self) -> Candidates:
        """Look the candidates up."""
        return Candidates.find(self.store, self.ids, "error")

    def fill(self, planned: PlannedBatch) -> None:
        """Bring a batch into the slot, and on to the device."""
        self.slot.fill_text(self.queries, planned)
        found = self.slot.read(self.source, self.rows[planned.pairs], check_finite=False)
        expect(not found.damaged, f"{self.store.path}: damaged records")
        if not self.device.shares_memory:
            self._copied(self.slot.upload)

    def compute(self) -> None:
        """Run the engine on what lies in the slot, until it is done."""
        self.engine.enqueue(self.slot.batch, self.slot.batch_scores, stream=self.stream)
        if not self.device.shares_memory:
            self.stream.record(self.done)
            self.done.synchronize()

    def score_slot(self) -> None:
        """Run the engine on the slot, and bring the scores to the host."""
        self.compute()
        if not self.device.shares_memory:
            self._copied(self.slot.download)

    def reference(self, positions: Int64) -> Float32:
        """Score candidates by their positions, with the engine alone: float32 [N]."""
        scores = np.empty(len(positions), np.float32)
        first, most = self.batches[0], len(self.batches[0].pairs)
        for start in range(0, len(scores), most):
            part = slice(start, start + most)
            pairs = np.asarray(positions[part], np.int64)
            query_of_pair = np.zeros(len(pairs), np.int32)
            self.fill(PlannedBatch(first.bucket, first.queries, query_of_pair, pairs))
            self.score_slot()
            scores[part] = self.slot.scores
        self.fill(first)
        return scores

    def _copying(self, name: str, copy: Callable[[Stream], None]) -> Stage:
        pairs = len(self.batches[0].pairs)
        return make_stage(name, lambda: self._copied(copy), pairs, lambda found: None)

    def _copied(self, copy: Callable[[Stream], None]) -> None:
        copy(self.stream)
        self.stream.record(self.done)
        self.done.synchronize()

    def _check_slot(self, name: str) -> None:
        """Compare the first scores in the slot with those of `Reranker.predict`."""
        pairs = self.batches[0].pairs[:NUM_CHECKED]
        expected = self.reranker.predict([(self.query, self.ids[at]) for at in pairs.tolist()])
        worst = float(np.abs(self.slot.scores[: len(pairs)] - expected).max())
        expect(worst <= TOLERANCE, f"{name}: scores differ from those of predict by {worst:.2e}")

    def _check_top(self, name: str, known: Callable[[Int64], Float32], hits: Sequence[Hit]) -> None:
        """Score the hits, and some other candidates, again: the hits must be right and best."""
        found = np.array([hit.score for hit in hits], np.float32)
        at = np.array([hit.index for hit in hits], np.int64)
        expect(len(found) == min(TOP_K, len(self.ids)), f"{name}: {len(found)} hits")
        expect(bool((np.diff(found) <= 0).all()), f"{name}: the hits are not in order")
        worst = float(np.abs(known(at) - found).max())
        expect(worst <= TOLERANCE, f"{name}: scores differ from the engine's by {worst:.2e}")
        some = np.random.default_rng(5).integers(0, len(self.ids), NUM_CHECKED)
        better = known(np.setdiff1d(some, at)) > found[-1] + TOLERANCE
        expect(not better.any(), f"{name}: a better candidate is missing")


def _checked_names(only: Collection[str]) -> list[str]:
    unknown = sorted(set(only) - set(NAMES))
    if unknown:
        raise EdjeError(f"no stage is called {', '.join(unknown)}, expected {', '.join(NAMES)}")
    return [name for name in NAMES if not only or name in only]
