"""What a cascade saves on the demo model, and whether its top 10 is the precise engine's.

Every test query of a finished `edje demo` ranks its first stage's best 1,000 candidates three
times: with the precise engine alone, with the fast engine alone, and with both as a cascade
whose margin was learned when the fast engine was built (on captions that no test query has).

The three take turns query by query, each beginning equally often, so that whatever else the
machine does slows all of them alike: over a thousand turns the ratio of sums is as steady as a
ratio of minima, and counts easy and hard queries as they come. Beside it stand the median over
the queries of the ratio of times, which a few disturbed moments cannot move, and the ratio of
CPU times, on which a loaded machine has less hold. Expected: the precise engine's top 10, in
order, on every query, at 1.5 times its pairs/s or more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import numpy as np

from ..bundle import BundleManifest
from ..engines.builder.build import build_engine
from ..engines.builder.options import EngineOptions
from ..engines.fidelity import FidelityLimits
from ..engines.manifest import EngineManifest
from ..errors import EdjeError
from ..runtime.queries import StoreSamples
from ..runtime.reranker import Reranker
from ..runtime.results import RankResult
from ..runtime.store import TokenStore
from .harness import add_out_option, conditions, write_result

TOP_K = 10
NUM_CANDIDATES = 1000
NUM_WARM_UPS = 4
CALIBRATION_QUERIES, CALIBRATION_CANDIDATES = 64, 50
EXPECTED_SPEEDUP = 1.5
PRECISE, FAST, CASCADE = "precise alone", "fast alone", "cascade"

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Query:
    """A text and the ids that it ranks, the first stage's best first."""

    text: str
    candidates: list[str]


@dataclass(slots=True)
class Tally:
    """What was seen query by query: milliseconds by contestant, and how the tops compare."""

    times_ms: dict[str, list[float]]
    cpu_ms: dict[str, list[float]]
    num_pairs: int = 0
    equal: list[bool] = field(default_factory=list)
    fast_equal: list[bool] = field(default_factory=list)
    max_score_diff: float = 0.0
    shares: list[float] = field(default_factory=list)
    num_widened: int = 0

    def add(self, results: dict[str, RankResult], num_pairs: int) -> None:
        """Compare what the three gave for one query of `num_pairs` candidates."""
        precise, fast, cascade = (results[name] for name in (PRECISE, FAST, CASCADE))
        self.num_pairs += num_pairs
        self.equal.append(_ids(cascade) == _ids(precise))
        self.fast_equal.append(_ids(fast) == _ids(precise))
        diffs = [abs(a.score - b.score) for a, b in zip(cascade, precise, strict=True)]
        self.max_score_diff = max(self.max_score_diff, *diffs)
        if cascade.rescoring is not None:
            self.shares.append(cascade.rescoring.num_rescored / num_pairs)
            self.num_widened += cascade.rescoring.num_widened

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        times = self.times_ms
        pairs = zip(times[PRECISE], times[CASCADE], strict=True)
        return {
            "num_queries": len(self.equal),
            "share_equal": mean(self.equal),
            "fast_share_equal": mean(self.fast_equal),
            "max_score_diff": self.max_score_diff,
            "pairs_per_s": {
                name: round(self.num_pairs / sum(values) * 1e3, 1) for name, values in times.items()
            },
            "speedup": round(sum(times[PRECISE]) / sum(times[CASCADE]), 3),
            "median_speedup": round(median(slow / quick for slow, quick in pairs), 3),
            "cpu_speedup": round(sum(self.cpu_ms[PRECISE]) / sum(self.cpu_ms[CASCADE]), 3),
            "expected_speedup": EXPECTED_SPEEDUP,
            "mean_share_rescored": round(mean(self.shares), 5),
            "max_share_rescored": round(max(self.shares), 5),
            "num_widened": self.num_widened,
        }


def _ids(result: RankResult) -> list[str]:
    return [hit.id for hit in result]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured: a finished demo, how many test queries, engines where they exist."""

    demo: Path
    num_queries: int | None
    precise: Path | None
    fast: Path | None


def run_benchmark(settings: Settings, scratch: Path, tell: Tell) -> dict[str, Any]:
    """Rank with both engines (built into `scratch` where none are given), compare, count.

    Raises:
        EdjeError: the demo was not written by `edje demo`, or an engine cannot be built.
    """
    demo = settings.demo
    queries = test_queries(demo, settings.num_queries, tell)
    precise = settings.precise or build_precise(demo, scratch / "precise", tell)
    texts = {query.text for query in queries}
    fast = settings.fast or build_fast(demo, texts, scratch, tell)
    return measure(queries, demo / "scenes.store", precise, fast, tell)


def build_precise(demo: Path, out: Path, tell: Tell) -> Path:
    """Build the float32 engine; return its folder."""
    build_engine(demo / "bundle", out, backend="openvino", precision="fp32", progress=tell)
    return out


def build_fast(demo: Path, without: set[str], scratch: Path, tell: Tell) -> Path:
    """Build the int8 engine, calibrated on captions that are not in `without`.

    With no limits on its ranking, nothing is kept in float32: the precise engine mends it.
    """
    out = scratch / "fast"
    with calibration_pairs(demo, without, scratch, tell) as samples:
        build_engine(
            demo / "bundle",
            out,
            backend="openvino",
            precision="int8",
            calibration=samples,
            options=EngineOptions(limits=FidelityLimits()),
            progress=tell,
        )
    return out


def measure(
    queries: Sequence[Query], store: Path, precise: Path, fast: Path, tell: Tell
) -> dict[str, Any]:
    """Rank every query with the precise engine, the fast one and the cascade, in turns."""
    with ExitStack() as stack:
        rerankers = {
            name: stack.enter_context(Reranker.open(engine, store=store, rescore=rescore))
            for name, engine, rescore in (
                (PRECISE, precise, None),
                (FAST, fast, None),
                (CASCADE, fast, precise),
            )
        }
        tally = compare(rerankers, queries, tell)
    manifests = {PRECISE: EngineManifest.read(precise), FAST: EngineManifest.read(fast)}
    return {
        "conditions": conditions(
            model=asdict(manifests[FAST].bundle.sizes),
            engines={name: _words(manifest) for name, manifest in manifests.items()},
            candidates=max(len(query.candidates) for query in queries),
            top_k=TOP_K,
            threads="all",
        ),
        "fast_fidelity": dict(manifests[FAST].fidelity),
        **tally.to_json(),
    }


def compare(rerankers: dict[str, Reranker], queries: Sequence[Query], tell: Tell) -> Tally:
    """Let the rerankers take turns, query by query, another one first each time."""
    names = list(rerankers)
    tally = Tally({name: [] for name in names}, {name: [] for name in names})
    for query in queries[:NUM_WARM_UPS]:
        for reranker in rerankers.values():
            reranker.rank(query.text, query.candidates, TOP_K)
    for number, query in enumerate(queries):
        results = {}
        first = number % len(names)
        for name in names[first:] + names[:first]:
            cpu, began = process_time(), perf_counter()
            results[name] = rerankers[name].rank(query.text, query.candidates, TOP_K)
            tally.times_ms[name].append((perf_counter() - began) * 1e3)
            tally.cpu_ms[name].append((process_time() - cpu) * 1e3)
        tally.add(results, len(query.candidates))
        if number % 64 == 63:
            tell(f"{number + 1} of {len(queries)} queries, {mean(tally.equal):.1%} equal")
    return tally


def test_queries(demo: Path, num_queries: int | None, tell: Tell) -> list[Query]:
    """Return the demo's test queries (some at even distances, if told how many)."""
    from ..demo import scenes

    texts = _captions(scenes.SEEDS["test"], len(_store_ids(demo)))
    count = min(num_queries or len(texts), len(texts))
    chosen = [texts[number * len(texts) // count] for number in range(count)]
    return first_stage(demo, chosen, NUM_CANDIDATES, tell)


def calibration_pairs(demo: Path, without: set[str], scratch: Path, tell: Tell) -> StoreSamples:
    """Return held-out captions, each with the candidates that the first stage finds for it."""
    from ..demo import scenes

    held_out = (
        text
        for text in _captions(scenes.SEEDS["validation"], 8 * CALIBRATION_QUERIES)
        if text not in without
    )
    texts = list(itertools.islice(held_out, CALIBRATION_QUERIES))
    lines = [
        json.dumps({"query": query.text, "candidates": query.candidates})
        for query in first_stage(demo, texts, CALIBRATION_CANDIDATES, tell)
    ]
    path = scratch / "calibration.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return StoreSamples.open(demo / "scenes.store", demo / "bundle", path)


def first_stage(demo: Path, texts: Sequence[str], count: int, tell: Tell) -> list[Query]:
    """Return each text with the `count` images that the demo's dual encoder likes best."""
    from ..demo import tiny_model as weights
    from ..demo.evaluation import FirstStage

    spec = BundleManifest.read(demo / "bundle").image
    if spec is None:
        raise EdjeError(f"{demo / 'bundle'} has no image encoder, expected the demo's bundle")
    tell(f"first stage: {len(texts)} queries")
    stage, ids = FirstStage(weights.load()), _store_ids(demo)
    images = stage.embed_images([demo / "images" / name for name in ids], spec)
    order = np.argsort(-(stage.embed_captions(texts) @ images.T), axis=1, kind="stable")
    return [
        Query(text, [ids[i] for i in best[:count]])
        for text, best in zip(texts, order.tolist(), strict=True)
    ]


def _captions(seed: int, count: int) -> list[str]:
    from ..demo import scenes

    pool = itertools.chain.from_iterable(scenes.groups(seed))
    return [scene.caption for scene in itertools.islice(pool, count)]


def _store_ids(demo: Path) -> list[str]:
    with TokenStore.open(demo / "scenes.store") as store:
        return sorted(store.ids())


def _words(manifest: EngineManifest) -> str:
    return f"{manifest.backend} {manifest.backend_version} {manifest.precision}"


def summary(result: dict[str, Any]) -> str:
    """Return the figures in words."""
    where, speeds = result["conditions"], result["pairs_per_s"]
    return "\n".join(
        [
            f"top {where['top_k']} equals the precise engine's, in order, on "
            f"{result['share_equal']:.2%} of {result['num_queries']:,} queries (expected: 100 %; "
            f"the fast engine alone: {result['fast_share_equal']:.2%})",
            *(f"{name:14} {speed:10,.1f} pairs/s" for name, speed in speeds.items()),
            f"the cascade reaches {result['speedup']:.2f} times the precise engine's pairs/s "
            f"(median {result['median_speedup']:.2f}, CPU time {result['cpu_speedup']:.2f}; "
            f"expected {EXPECTED_SPEEDUP} or more) and rescores "
            f"{result['mean_share_rescored']:.1%} of the candidates",
            f"({where['cpu']}, {where['cores']} cores, {where['candidates']:,} candidates, "
            f"load {where['load_average'][0]}, commit {where['commit']})",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print it, write `cascade.json`; 1 where the top 10 differ."""
    parser = argparse.ArgumentParser(prog="python -m edje.perf.bench_cascade", description=__doc__)
    parser.add_argument("demo", type=Path, help="folder that `edje demo --out` has written")
    parser.add_argument("--queries", type=int, default=None, help="only so many test queries")
    parser.add_argument("--precise", type=Path, help="engine folder; default: float32, built")
    parser.add_argument("--fast", type=Path, help="engine folder; default: int8, built")
    parser.add_argument("--name", default="cascade", help="of the JSON file")
    add_out_option(parser)
    options = parser.parse_args(arguments)
    settings = Settings(options.demo, options.queries, options.precise, options.fast)
    try:
        with TemporaryDirectory() as scratch:
            result = run_benchmark(
                settings, Path(scratch), lambda line: print(f"... {line}", flush=True)
            )
    except EdjeError as error:
        print(error, file=sys.stderr)
        return 2
    print(summary(result))
    print(f"written to {write_result(options.name, result, options.out)}")
    return 0 if result["share_equal"] == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
