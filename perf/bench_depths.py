"""What a shallow first stage saves, number of layers by number of layers, and what it loses.

    edje bench depths DEMO_OUT                      writes depths.json
    edje bench depths DEMO_OUT --images 50000       from so many noisy copies

DEMO_OUT is a folder as `edje demo` lays one out. The test queries rank their own candidates and
others of the store, `--candidates` in all, once with every contestant, in turns query by query:
the whole float32 model alone, an int8 engine before it, engines of the first layers before it, and
three engines in a row. Heads and scales come from the calibration pairs, which no test query has.

Expected: the whole model's top 10 in order on 99 % of the queries, its first place on all of them.
With `--images` the store's records are repeated with noise until there are so many: a search that
finds needles in hay, where most candidates can be ruled out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from ..arguments import read_text
from ..engines.builder.build import build_engine
from ..engines.builder.options import FIRST, EngineOptions
from ..engines.manifest import EngineManifest
from ..errors import EngineError
from ..runtime.queries import StoreSamples
from ..runtime.reranker import Reranker
from ..runtime.results import RankResult
from ..runtime.store import TokenStore
from .harness import (
    Progress,
    Times,
    command_line,
    conditions,
    conditions_line,
    in_turn,
    run_benchmark,
    take_turns,
)

TOP_K = 10
NUM_CANDIDATES = 1000
RECALL = 0.99
WHOLE = "fp32, whole"
EXPECTED_EQUAL = 0.99
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
    """Build every engine into `scratch`, rank with every way, compare.

    Raises:
        EdjeError: no folder as `edje demo` writes it, or an engine cannot be built.
    """
    store, queries = demo / "scenes.store", demo / "queries.jsonl"
    if options.images:
        progress(f"writing a store of {options.images:,} images")
        store = repeated(store, scratch / "many.store", options.images)
    asked = test_queries(store, queries, options.candidates, options.queries)
    ways = ways_of(build_all(demo, options, scratch, progress))
    if options.only:
        ways = ways[:1] + [w for w in ways[1:] if any(text in w.name for text in options.only)]
    return measure(asked, store, scratch, ways, progress)


def build_all(demo: Path, options: Any, scratch: Path, progress: Progress) -> list[str]:
    """Build whole and shallow engines of every precision; return the names of the folders."""
    bundle, built = demo / "bundle", []
    calibration = demo / "calibration"
    with StoreSamples.open(
        calibration / "scenes.store", bundle, calibration / "queries.jsonl"
    ) as pairs:
        for precision in options.precisions.split(","):
            for layers in [None, *map(int, filter(None, options.layers.split(",")))]:
                depth = "whole" if layers is None else f"{layers} layers"
                name = f"{precision}-{depth}"
                progress(f"building {name}")
                build_engine(
                    bundle,
                    scratch / name,
                    backend=options.backend,
                    precision=precision,
                    calibration=pairs,
                    options=EngineOptions(role=FIRST, layers=layers)
                    if precision == "int8" or layers is not None
                    else None,
                    progress=progress,
                )
                built.append(name)
    return built


def ways_of(built: Sequence[str]) -> list[Way]:
    """Return what is compared; the whole float32 model alone comes first."""
    whole = "fp32-whole"
    ways = [Way((whole,))]
    ways += [Way((name, whole)) for name in built if name != whole]
    shallow = [name for name in built if name.startswith("int8") and "layers" in name]
    if "int8-whole" in built:
        ways += [Way((name, "int8-whole", whole)) for name in shallow]
    ways += [Way((name, whole), RECALL) for name in shallow[-1:]]
    return ways


def measure(
    queries: Sequence[Query], store: Path, folder: Path, ways: Sequence[Way], progress: Progress
) -> dict[str, Any]:
    """Rank every query in every way, in turns."""
    tops: dict[str, list[RankResult]] = {way.name: [] for way in ways}
    progress(f"ranking {len(queries)} queries in {len(ways)} ways")
    with ExitStack() as stack:
        rerankers = {
            way.name: stack.enter_context(
                Reranker.open(
                    folder / way.engines[0],
                    store=store,
                    rescore=[folder / each for each in way.engines[1:]] or None,
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
        times = take_turns(contestants, len(queries))
    engines = sorted({engine for way in ways for engine in way.engines})
    manifests = {name: EngineManifest.read(folder / name) for name in engines}
    first = manifests["fp32-whole"]
    rows = {way.name: _row(way.name, tops, times, queries) for way in ways}
    return {
        "conditions": conditions(
            model=asdict(first.bundle.sizes),
            backend=f"{first.backend} {first.backend_version}",
            candidates=max(len(query.candidates) for query in queries),
            images=len(store_ids(store)),
            top_k=TOP_K,
        ),
        "num_queries": len(queries),
        "rows": rows,
        "engines": {name: _engine_facts(each) for name, each in manifests.items()},
    }


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
    return {
        "pairs_per_s": round(num_pairs / sum(times[name].wall_ms) * 1e3, 1),
        "speedup": round(sum(times[WHOLE].wall_ms) / sum(times[name].wall_ms), 3),
        "equal_top_10": mean(a == b for a, b in zip(ids, expected, strict=True)),
        "same_first": mean(a[:1] == b[:1] for a, b in zip(ids, expected, strict=True)),
        "recall_of_top_10": mean(
            len(set(a) & set(b)) / len(b) for a, b in zip(ids, expected, strict=True)
        ),
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
    """Yield a store's records, then copies of them with noise, without end."""
    number = 0
    while len(store):
        for batch in store.iterate():
            if not number:
                yield list(batch.ids), batch.tokens
                continue
            spread = NOISE * float(batch.tokens.astype(np.float32).std())
            noise = random.standard_normal(batch.tokens.shape, np.float32) * spread
            noisy = (batch.tokens.astype(np.float32) + noise).astype(np.float16)
            yield [f"{name}~{number}" for name in batch.ids], noisy
        number += 1


def summary(result: Mapping[str, Any]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| | pairs/s | times | top 10 equal | first place | of the top 10 | R@1 | rescored |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for name, row in result["rows"].items():
        rescored = ", ".join(
            f"{label}: {share['mean']:.1%}" for label, share in row["rescored"].items()
        )
        r1 = "" if row["R@1"] is None else f"{row['R@1']:.1%}"
        lines.append(
            f"| {name} | {row['pairs_per_s']:,.0f} | {row['speedup']:.2f} "
            f"| {row['equal_top_10']:.1%} | {row['same_first']:.1%} "
            f"| {row['recall_of_top_10']:.1%} | {r1} | {rescored or '-'} |"
        )
    where = conditions_line(result["conditions"], "candidates", "images")
    return "\n".join([*lines, f"{result['num_queries']} queries; {where}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write `depths.json`."""
    parser = command_line("depths", __doc__)
    parser.add_argument("demo", type=Path, help="folder that `edje demo --out` has written")
    parser.add_argument("--queries", type=int, default=None, help="only so many test queries")
    parser.add_argument("--candidates", type=int, default=NUM_CANDIDATES)
    parser.add_argument("--images", type=int, default=0, help="repeat the records with noise")
    parser.add_argument("--layers", default="1,2,3", help="numbers of layers, with commas")
    parser.add_argument("--precisions", default="fp32,int8", help="fp32 first")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument(
        "--only", action="append", help="only ways whose name holds this text (repeatable)"
    )
    options = parser.parse_args(arguments)
    return run_benchmark(options, lambda *more: measure_demo(options.demo, options, *more), summary)


if __name__ == "__main__":
    sys.exit(main())
