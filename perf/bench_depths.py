"""What a shallow first stage saves, number of layers by number of layers, and what it loses.

    edje bench depths DEMO_OUT                          1,000 candidates: depths.json, depths.svg
    edje bench depths DEMO_OUT --candidates 50,50000    other numbers, a line each in the chart

DEMO_OUT is a folder as `edje demo` lays one out. The test queries rank their own candidates and
others of the store, `--candidates` in all, once with every contestant, in turns query by query:
the whole float32 model alone, an int8 engine before it, engines of the first layers before it, and
three engines in a row. Heads and scales come from the calibration pairs, which no test query has.
Engines are built once and kept in the cache of the benchmarks.

Expected: the whole model's top 10 in order on 99 % of the queries, its first place on all of them.
Where the store has too few images, its records are repeated with noise: a search that finds
needles in hay, where most candidates can be ruled out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from ..arguments import read_text
from ..engines.builder.cache import cached_engine
from ..engines.builder.options import FIRST, EngineOptions
from ..engines.manifest import EngineManifest
from ..errors import EngineError
from ..runtime.queries import StoreSamples
from ..runtime.reranker import Reranker
from ..runtime.results import RankResult
from ..runtime.store import TokenStore
from .charts import draw_depths
from .harness import Progress, Times, command_line, in_turn, run_benchmark, take_turns
from .random_model import CACHE
from .report import Measured, benchmark_json
from .report import summary as where_and_when

TOP_K = 10
NUM_CANDIDATES = 1000
RECALL = 0.99
WHOLE, WHOLE_ENGINE = "fp32, whole", "fp32-whole"
NOISE = 0.02  # of the tokens' own standard deviation


@dataclass(frozen=True, slots=True)
class Way:
    """One way to a top k: engines by their folders' names, the first scores everything."""

    engines: tuple[str, ...]
    recall: float | None = None

    @property
    def name(self) -> str:
        """The engines with arrows between, and how survivors are chosen where it is by recall."""
        some = f" (recall {self.recall:g})" if self.recall is not None else ""
        return " -> ".join(each.replace("-", ", ") for each in self.engines) + some


@dataclass(frozen=True, slots=True)
class Query:
    """A text, the right image where it is known, and the ids that it ranks."""

    text: str
    target: str | None
    candidates: list[str]


def measure_demo(demo: Path, options: Any, scratch: Path, progress: Progress) -> dict[str, Any]:
    """Build every engine that is not kept yet, rank with every way, compare.

    Raises:
        EdjeError: no folder as `edje demo` writes it, or an engine cannot be built.
    """
    images = demo / "scenes.store"
    num_images = len(store_ids(images))
    ways = wanted(ways_of(names_of(options.precisions, options.layers)), options.only or ())
    used = dict.fromkeys(name for way in ways for name in way.engines)
    engines = build_all(demo, used, options.backend, progress)
    measured, rows = [], {}
    for count in map(int, options.candidates.split(",")):
        store = images
        if count > num_images:
            progress(f"writing a store of {count:,} images")
            store = repeated(images, scratch / f"{count}.store", count)
        most = [n for n in (options.queries, options.pairs and options.pairs // count) if n]
        asked = test_queries(store, demo / "queries.jsonl", count, min(most) if most else None)
        progress(f"ranking {count:,} candidates for {len(asked)} queries in {len(ways)} ways")
        tops, times = rank_all(asked, store, engines, ways)
        facts = {"num_queries": len(asked), "images": max(count, num_images)}
        found = {way.name: {**facts, **_row(way.name, tops, times, asked)} for way in ways}
        measured += [_measured(w, times[w.name], found[w.name], count, engines) for w in ways]
        rows[str(count)] = found
    manifests = {name: EngineManifest.read(path) for name, path in engines.items()}
    whole = manifests[WHOLE_ENGINE]
    sizes = whole.bundle.sizes
    return benchmark_json(
        measured,
        conditions={
            "model": f"{sizes.num_layers} layers, hidden {sizes.hidden}, {sizes.num_tokens} tokens",
            "backend": f"{whole.backend} {whole.backend_version}",
            "top_k": TOP_K,
        },
        rows=rows,
        engines={name: _engine_facts(each) for name, each in manifests.items()},
    )


def names_of(precisions: str, layers: str) -> list[str]:
    """Return the names of whole and shallow engines of every precision: `int8-4 layers`."""
    depths = ["whole", *(f"{one} layers" for one in layers.split(",") if one)]
    return [f"{precision}-{depth}" for precision in precisions.split(",") for depth in depths]


def build_all(
    demo: Path, names: Iterable[str], backend: str, progress: Progress
) -> dict[str, Path]:
    """Return the engines of these names; build those that are not kept yet."""
    bundle, built = demo / "bundle", {}
    calibration = demo / "calibration"
    with StoreSamples.open(
        calibration / "scenes.store", bundle, calibration / "queries.jsonl"
    ) as pairs:
        for name in names:
            precision, _, depth = name.partition("-")
            layers = int(depth.split()[0]) if depth != "whole" else None
            progress(f"building {name}")
            built[name] = cached_engine(
                bundle,
                CACHE / "depths",
                backend=backend,
                precision=precision,
                calibration=pairs,
                options=None if name == WHOLE_ENGINE else EngineOptions(role=FIRST, layers=layers),
                progress=progress,
            )
    return built


def ways_of(built: Sequence[str]) -> list[Way]:
    """Return what is compared; the whole float32 model alone comes first."""
    whole = WHOLE_ENGINE
    ways = [Way((whole,))]
    ways += [Way((name, whole)) for name in built if name != whole]
    shallow = [name for name in built if name.startswith("int8") and "layers" in name]
    if "int8-whole" in built:
        ways += [Way((name, "int8-whole", whole)) for name in shallow]
    ways += [Way((name, whole), RECALL) for name in shallow[-1:]]
    return ways


def wanted(ways: Sequence[Way], only: Sequence[str]) -> list[Way]:
    """Return the first way, and those whose name begins with one of the texts; empty: all.

    A way by recall, which may score nearly everything twice, must be asked for by that word.
    """

    def is_asked(way: Way) -> bool:
        texts = [text for text in only if way.recall is None or "recall" in text]
        return way.name.startswith(tuple(texts))

    return [*ways[:1], *filter(is_asked, ways[1:])] if only else list(ways)


def rank_all(
    queries: Sequence[Query], store: Path, engines: Mapping[str, Path], ways: Sequence[Way]
) -> tuple[dict[str, list[RankResult]], dict[str, Times]]:
    """Rank every query in every way, in turns; return the tops and the times of each way."""
    tops: dict[str, list[RankResult]] = {way.name: [] for way in ways}
    with ExitStack() as stack:
        rerankers = {
            way.name: stack.enter_context(
                Reranker.open(
                    engines[way.engines[0]],
                    store=store,
                    rescore=[engines[each] for each in way.engines[1:]] or None,
                    recall=way.recall,
                )
            )
            for way in ways
        }

        def rank(name: str, query: Query) -> None:
            tops[name].append(rerankers[name].rank(query.text, query.candidates, TOP_K))

        warm_up = replace(queries[0], candidates=queries[0].candidates[:NUM_CANDIDATES])
        for name in rerankers:
            rank(name, warm_up)
            tops[name].clear()
        contestants = {name: in_turn(partial(rank, name), queries) for name in tops}
        return tops, take_turns(contestants, len(queries))


def _measured(
    way: Way, times: Times, row: Mapping[str, Any], count: int, engines: Mapping[str, Path]
) -> Measured:
    """Return a way's runs: speed is of all of them together, as some queries are harder."""
    first = EngineManifest.read(engines[way.engines[0]])
    seconds = [one / 1e3 for one in times.wall_ms]
    return Measured(
        way.name,
        "depths",
        seconds,
        count,
        {
            "candidates": count,
            "engines": len(way.engines),
            "first": first.precision,
            "layers": first.layers,
        },
        cpu_seconds=[one / 1e3 for one in times.cpu_ms],
        counters={name: row[name] for name in ("other_top_10", "other_first")},
        conditions={"survivors": "all" if way.recall is None else f"recall {way.recall:g}"},
        elapsed_s=sum(seconds),
    )


def _row(
    name: str,
    tops: Mapping[str, Sequence[RankResult]],
    times: Mapping[str, Times],
    queries: Sequence[Query],
) -> dict[str, Any]:
    """Return what a way found and took, against the whole float32 model alone."""
    own, whole = tops[name], tops[WHOLE]
    ids = [[hit.id for hit in top] for top in own]
    expected = [[hit.id for hit in top] for top in whole]
    num_pairs = sum(len(query.candidates) for query in queries)
    stages: dict[str, list[float]] = {}
    for top, query in zip(own, queries, strict=True):
        story = top.rescoring
        while story is not None:
            label = f"{story.engine.precision} {story.engine.layers or 'whole'}"
            stages.setdefault(label, []).append(story.num_rescored / len(query.candidates))
            story = story.before
    known = [(found, q.target) for found, q in zip(ids, queries, strict=True) if q.target]
    both = list(zip(ids, expected, strict=True))
    return {
        "pairs_per_s": round(num_pairs / sum(times[name].wall_ms) * 1e3, 1),
        "speedup": round(sum(times[WHOLE].wall_ms) / sum(times[name].wall_ms), 3),
        "equal_top_10": mean(a == b for a, b in both),
        "same_first": mean(a[:1] == b[:1] for a, b in both),
        "recall_of_top_10": mean(len(set(a) & set(b)) / len(b) for a, b in both),
        "other_top_10": sum(a != b for a, b in both),
        "other_first": sum(a[:1] != b[:1] for a, b in both),
        "R@1": mean(found[:1] == [target] for found, target in known) if known else None,
        "rescored": {
            label: {"mean": round(mean(each), 4), "max": round(max(each), 4)}
            for label, each in stages.items()
        },
    }


def _engine_facts(manifest: EngineManifest) -> dict[str, Any]:
    plan = manifest.precision_plan
    return {
        "layers": manifest.layers,
        "precision": manifest.precision,
        "scales": plan.get("scales"),
        "kept": list(plan.get("kept", {})),
        "shallow": plan.get("shallow"),
        "build_seconds": manifest.build_seconds,
        "fidelity": dict(manifest.fidelity),
    }


def store_ids(path: Path) -> list[str]:
    """Return the ids of a store, in order."""
    with TokenStore.open(path) as store:
        return sorted(store.ids())


def test_queries(store: Path, path: Path, num_candidates: int, count: int | None) -> list[Query]:
    """Return the test queries, their candidates filled up from the store with a seed."""
    entries = [json.loads(line) for line in read_text(path).splitlines()][:count]
    ids = store_ids(store)
    queries = []
    for number, entry in enumerate(entries):
        own = list(entry["candidates"])
        order = np.random.default_rng([0, number]).permutation(len(ids)).tolist()
        known = set(own)
        more = [ids[at] for at in order if ids[at] not in known]
        candidates = (own + more)[:num_candidates]
        queries.append(Query(entry["query"], entry.get("target"), candidates))
    return queries


def repeated(source: Path, out: Path, num_images: int) -> Path:
    """Write a store of `num_images` records: those of `source`, then noisy copies of them."""
    random = np.random.default_rng(0)
    with TokenStore.open(source) as store:
        num_tokens, hidden = store.record_shape
        with TokenStore.create(
            out,
            num_tokens=num_tokens,
            hidden=hidden,
            dtype="float16",
            fingerprint_encoder=store.fingerprint_encoder,
        ) as made:
            for ids, tokens in _copies(store, random):
                room = num_images - len(made)
                made.append(ids[:room], tokens[:room])
                if len(made) >= num_images:
                    return out
    raise EngineError(f"the store {source} is empty")


def _copies(
    store: TokenStore, random: np.random.Generator
) -> Iterator[tuple[list[str], np.ndarray[Any, Any]]]:
    """Yield a store's records, then copies of them with noise, without end.

    The noise is drawn once and moved on by a record with each copy: drawing it anew would take
    longer than writing the store.
    """
    number, noise = 0, np.empty(0, np.float32)
    while len(store):
        for batch in store.iterate():
            if not number:
                yield list(batch.ids), batch.tokens
                continue
            tokens = batch.tokens.astype(np.float32)
            if len(noise) < len(tokens):
                noise = random.standard_normal(tokens.shape, np.float32)
            tokens += np.roll(noise, number, axis=0)[: len(tokens)] * (NOISE * tokens.std())
            yield [f"{name}~{number}" for name in batch.ids], tokens.astype(np.float16)
        number += 1


def summary(result: Mapping[str, Any]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| queries x candidates | | pairs/s | times | top 10 equal | first place | of the top 10 "
        "| R@1 | rescored |",
        "|--:|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for count, ways in result["rows"].items():
        lines += [_line(int(count), name, row) for name, row in ways.items()]
    return "\n".join([*lines, where_and_when(result)])


def _line(count: int, name: str, row: Mapping[str, Any]) -> str:
    rescored = ", ".join(
        f"{label}: {share['mean']:.1%}" for label, share in row["rescored"].items()
    )
    r1 = "" if row["R@1"] is None else f"{row['R@1']:.1%}"
    return (
        f"| {row['num_queries']} x {count:,} | {name} | {row['pairs_per_s']:,.0f} "
        f"| {row['speedup']:.2f} | {row['equal_top_10']:.1%} | {row['same_first']:.1%} "
        f"| {row['recall_of_top_10']:.1%} | {r1} | {rescored or '-'} |"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write `depths.json` and draw `depths.svg`."""
    parser = command_line("depths", __doc__)
    parser.add_argument("demo", type=Path, help="folder that `edje demo --out` has written")
    parser.add_argument("--queries", type=int, default=None, help="only so many test queries")
    parser.add_argument(
        "--pairs", type=int, default=None, help="of each way at most, one query at least"
    )
    parser.add_argument(
        "--candidates", default=str(NUM_CANDIDATES), help="numbers of candidates, with commas"
    )
    parser.add_argument("--layers", default="1,2,3", help="numbers of layers, with commas")
    parser.add_argument("--precisions", default="fp32,int8", help="fp32 first")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument(
        "--only", action="append", help="only ways whose name begins so (repeatable)"
    )
    parser.add_argument(
        "--beside",
        action="append",
        type=Path,
        help="JSON of an earlier run, whose lines the chart shows as well (repeatable)",
    )
    options = parser.parse_args(arguments)

    def measured(scratch: Path, progress: Progress) -> dict[str, Any]:
        beside = [json.loads(read_text(path)) for path in options.beside or ()]
        result = measure_demo(options.demo, options, scratch, progress)
        draw_depths([*beside, result], options.out / f"{options.name}.svg")
        return result

    return run_benchmark(options, measured, summary)


if __name__ == "__main__":
    sys.exit(main())
