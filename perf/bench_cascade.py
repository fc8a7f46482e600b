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

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

from ..engines.builder.build import build_engine
from ..engines.builder.options import EngineOptions
from ..engines.fidelity import FidelityLimits
from ..engines.manifest import EngineManifest
from ..files import publish_folder
from ..runtime.queries import StoreSamples
from ..runtime.reranker import Reranker
from ..runtime.results import RankResult
from ..runtime.store import TokenStore
from .harness import (
    Progress,
    Times,
    Timing,
    command_line,
    conditions,
    conditions_line,
    in_turn,
    run_benchmark,
    take_turns,
    timings_json,
)

TOP_K = 10
NUM_CANDIDATES, DEMO_IMAGES = 1000, 1024
NUM_WARM_UPS = 4
CALIBRATION_QUERIES, CALIBRATION_CANDIDATES = 64, 50
EXPECTED_SPEEDUP = 1.5
PRECISE, FAST, CASCADE = "precise alone", "fast alone", "cascade"


@dataclass(frozen=True, slots=True)
class Query:
    """A text and the ids that it ranks, the first stage's best first."""

    text: str
    candidates: list[str]


def measure_demo(
    demo: Path, num_queries: int | None, scratch: Path, progress: Progress
) -> dict[str, Any]:
    """Build both engines into `scratch`, rank with them, compare, count.

    Raises:
        EdjeError: the demo was not written by `edje demo`, or an engine cannot be built.
    """
    queries = test_queries(demo, num_queries, progress)
    both = build_both(demo, queries, scratch, progress)
    return measure(queries, demo / "scenes.store", *both, progress)


def write_demo(folder: Path) -> Path:
    """Write what is measured of a demo: bundle, images and store; return `folder`."""
    from ..demo import scenes, tiny_model
    from ..engines.image import ImageEncoder
    from ..export.export import export_bundle
    from ..runtime.indexing.index import index_images

    with publish_folder(folder, manifest="bundle") as out:
        checkpoint, language, vision = tiny_model.write_checkpoint(out / "checkpoint")
        export_bundle(checkpoint, language, out / "bundle", vision_model=vision)
        scenes.draw_pool(scenes.SEEDS["test"], DEMO_IMAGES, out / "images")
        encoder = ImageEncoder.open(out / "bundle")
        index_images(encoder, out / "images", out / "scenes.store")
    return folder


def build_both(
    demo: Path, queries: Sequence[Query], out: Path, progress: Progress
) -> tuple[Path, Path]:
    """Build `out/precise` and `out/fast`; return both."""
    precise, fast = out / "precise", out / "fast"
    build_engine(demo / "bundle", precise, backend="openvino", precision="fp32", progress=progress)
    build_fast(demo, {query.text for query in queries}, fast, progress)
    return precise, fast


def build_fast(demo: Path, without: set[str], out: Path, progress: Progress) -> None:
    """Build the int8 engine, calibrated on captions that are not in `without`.

    With no limits on its ranking, nothing is kept in float32: the precise engine mends it.
    """
    with calibration_pairs(demo, without, out.with_suffix(".jsonl"), progress) as samples:
        build_engine(
            demo / "bundle",
            out,
            backend="openvino",
            precision="int8",
            calibration=samples,
            options=EngineOptions(limits=FidelityLimits()),
            progress=progress,
        )


def measure(
    queries: Sequence[Query], store: Path, precise: Path, fast: Path, progress: Progress
) -> dict[str, Any]:
    """Rank every query with the precise engine, the fast one and the cascade, in turns."""
    opened = ((PRECISE, precise, None), (FAST, fast, None), (CASCADE, fast, precise))
    tops: dict[str, list[RankResult]] = {name: [] for name, *_ in opened}
    progress(f"ranking {len(queries)} queries three times")
    with ExitStack() as stack:
        rerankers = {
            name: stack.enter_context(Reranker.open(engine, store=store, rescore=rescore))
            for name, engine, rescore in opened
        }

        def rank(name: str, query: Query) -> None:
            tops[name].append(rerankers[name].rank(query.text, query.candidates, TOP_K))

        for query in queries[:NUM_WARM_UPS]:
            for name in rerankers:
                rank(name, query)
        for top in tops.values():
            top.clear()
        contestants = {name: in_turn(partial(rank, name), queries) for name in tops}
        times = take_turns(contestants, len(queries))
    manifests = {PRECISE: EngineManifest.read(precise), FAST: EngineManifest.read(fast)}
    return {
        "conditions": conditions(
            model=asdict(manifests[FAST].bundle.sizes),
            engines={
                name: f"{manifest.backend} {manifest.backend_version} {manifest.precision}"
                for name, manifest in manifests.items()
            },
            candidates=max(len(query.candidates) for query in queries),
            top_k=TOP_K,
            threads="all",
        ),
        "fast_fidelity": dict(manifests[FAST].fidelity),
        **compare(tops, times, [len(query.candidates) for query in queries]),
    }


def compare(
    tops: Mapping[str, Sequence[RankResult]], times: Mapping[str, Times], num_pairs: Sequence[int]
) -> dict[str, Any]:
    """Return how the tops of the three compare, and how their times do, query by query."""
    ids = {name: [[hit.id for hit in top] for top in own] for name, own in tops.items()}
    equal = {
        name: mean(a == b for a, b in zip(ids[name], ids[PRECISE], strict=True)) for name in ids
    }
    rescoring = [(top.rescoring, n) for top, n in zip(tops[CASCADE], num_pairs, strict=True)]
    shares = [found.num_rescored / n for found, n in rescoring if found is not None]
    wall = {name: own.wall_ms for name, own in times.items()}
    cpu = {name: sum(own.cpu_ms) for name, own in times.items()}
    both = zip(wall[PRECISE], wall[CASCADE], strict=True)
    return {
        "num_queries": len(num_pairs),
        "timings": timings_json(
            {name: Timing.of(name, max(num_pairs), own) for name, own in times.items()}
        ),
        "share_equal": equal[CASCADE],
        "fast_share_equal": equal[FAST],
        "max_score_diff": max(
            abs(a.score - b.score)
            for cascade, precise in zip(tops[CASCADE], tops[PRECISE], strict=True)
            for a, b in zip(cascade, precise, strict=True)
        ),
        "pairs_per_s": {
            name: round(sum(num_pairs) / sum(own) * 1e3, 1) for name, own in wall.items()
        },
        "speedup": round(sum(wall[PRECISE]) / sum(wall[CASCADE]), 3),
        "median_speedup": round(median(slow / quick for slow, quick in both), 3),
        "cpu_speedup": round(cpu[PRECISE] / cpu[CASCADE], 3),
        "expected_speedup": EXPECTED_SPEEDUP,
        "mean_share_rescored": round(mean(shares), 5),
        "max_share_rescored": round(max(shares), 5),
        "num_widened": sum(found.num_widened for found, _ in rescoring if found is not None),
        "faults": [] if equal[CASCADE] == 1 else ["a top 10 differs from the precise engine's"],
    }


def test_queries(demo: Path, num_queries: int | None, progress: Progress) -> list[Query]:
    """Return the demo's test queries (some at even distances, if told how many)."""
    from ..demo.scenes import SEEDS

    texts = _captions(SEEDS["test"], len(_store_ids(demo)))
    count = min(num_queries or len(texts), len(texts))
    chosen = [texts[number * len(texts) // count] for number in range(count)]
    return first_stage(demo, chosen, NUM_CANDIDATES, progress)


def calibration_pairs(
    demo: Path, without: set[str], path: Path, progress: Progress
) -> StoreSamples:
    """Write held-out captions to `path`, each with what the first stage finds; open them."""
    from ..demo.scenes import SEEDS

    captions = _captions(SEEDS["validation"], 8 * CALIBRATION_QUERIES)
    held_out = [text for text in captions if text not in without][:CALIBRATION_QUERIES]
    lines = [
        json.dumps({"query": query.text, "candidates": query.candidates})
        for query in first_stage(demo, held_out, CALIBRATION_CANDIDATES, progress)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return StoreSamples.open(demo / "scenes.store", demo / "bundle", path)


def first_stage(demo: Path, texts: Sequence[str], count: int, progress: Progress) -> list[Query]:
    """Return each text with the `count` images that the demo's dual encoder likes best."""
    from ..demo import tiny_model
    from ..demo.evaluation import FirstStage

    progress(f"first stage: {len(texts)} queries")
    stage, ids = FirstStage(tiny_model.load()), _store_ids(demo)
    images = [demo / "images" / name for name in ids]
    order = stage.candidates(images, texts, demo / "bundle")[:, :count]
    return [
        Query(text, [ids[i] for i in best])
        for text, best in zip(texts, order.tolist(), strict=True)
    ]


def _captions(seed: int, count: int) -> list[str]:
    from ..demo import scenes

    pool = itertools.chain.from_iterable(scenes.groups(seed))
    return [scene.caption for scene in itertools.islice(pool, count)]


def _store_ids(demo: Path) -> list[str]:
    with TokenStore.open(demo / "scenes.store") as store:
        return sorted(store.ids())


def summary(result: Mapping[str, Any]) -> str:
    """Return the figures in words."""
    where = result["conditions"]
    return "\n".join(
        [
            f"top {where['top_k']} equals the precise engine's, in order, on "
            f"{result['share_equal']:.2%} of {result['num_queries']:,} queries (expected: 100 %; "
            f"the fast engine alone: {result['fast_share_equal']:.2%})",
            *(f"{name:14} {own:10,.1f} pairs/s" for name, own in result["pairs_per_s"].items()),
            f"the cascade reaches {result['speedup']:.2f} times the precise engine's pairs/s "
            f"(median {result['median_speedup']:.2f}, CPU time {result['cpu_speedup']:.2f}; "
            f"expected {EXPECTED_SPEEDUP} or more) and rescores "
            f"{result['mean_share_rescored']:.1%} of the candidates",
            conditions_line(where, "candidates"),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print it, write `cascade.json`; 1 where the top 10 differ."""
    parser = command_line("cascade", __doc__)
    parser.add_argument("demo", type=Path, help="folder that `edje demo --out` has written")
    parser.add_argument("--queries", type=int, default=None, help="only so many test queries")
    options = parser.parse_args(arguments)
    given = options.demo, options.queries
    return run_benchmark(options, lambda *more: measure_demo(*given, *more), summary)


if __name__ == "__main__":
    sys.exit(main())
