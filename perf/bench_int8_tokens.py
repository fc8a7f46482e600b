"""What int8 tokens do to the demo's ranking, and what reading them costs.

    python -m edje.perf.bench_int8_tokens DEMO_OUT

Ranking: every test query of a finished `edje demo` over its first-stage candidates, by the whole
`Reranker.rank`, from the demo's float16 store and from an int8 store of the same scenes. Expected:
the float32 engine loses at most 0.2 points of R@1 to int8 tokens, however it reads them.

Reading: random gathers of full-size records (64 x 384), verified, in turns, page cache hot.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..arrays import Array, Float16, Float32
from ..engines.agreement import rank_agreement, recall
from ..engines.builder.build import build_engine
from ..engines.builder.options import EngineOptions
from ..errors import EdjeError
from ..runtime.queries import StoreSamples
from ..runtime.reranker import Reranker
from ..runtime.source import Float16Tokens
from ..runtime.store import TokenStore
from ..tokens import dequantize_tokens, quantize_tokens
from .harness import Timing, add_out_option, conditions, interleave, timings_json, write_result
from .harness import table as timing_table

Tell = Callable[[str], None]

MAX_LOSS = 0.2
REFERENCE = "fp32, float16 tokens"
# Name of the row -> precision, dtype of the stored tokens, dtype that the engine takes.
ROWS = {
    REFERENCE: ("fp32", "float16", "float16"),
    "fp32, int8 tokens dequantised": ("fp32", "int8", "float16"),
    "fp32, int8 tokens": ("fp32", "int8", "int8"),
    "int8, float16 tokens": ("int8", "float16", "float16"),
    "int8, int8 tokens": ("int8", "int8", "int8"),
}
NUM_RECORDS, GATHERED = 2048, 256
NUM_TOKENS, HIDDEN = 64, 384


@dataclass(frozen=True, slots=True)
class Query:
    """A text, the ids that it ranks, and which of them is its own (None: none of them)."""

    text: str
    candidates: list[str]
    target: int | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write `int8_tokens.json`; 1 where too much R@1 is lost."""
    parser = argparse.ArgumentParser(
        prog="python -m edje.perf.bench_int8_tokens", description=__doc__
    )
    parser.add_argument("demo", type=Path, help="folder that `edje demo` has written")
    parser.add_argument("--queries", type=int, help="use no more; default: all")
    parser.add_argument("--backend", default="openvino", help="of every engine")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of gathers")
    add_out_option(parser)
    options = parser.parse_args(arguments)
    try:
        with TemporaryDirectory() as folder:
            scratch = Path(folder)
            gathers = measure_gathers(scratch, options.rounds)
            queries = read_queries(options.demo / "queries.jsonl")[: options.queries]
            rows = measure_ranking(options.demo, queries, options.backend, scratch, _tell)
    except EdjeError as error:
        print(error, file=sys.stderr)
        return 2
    broken = [name for name, row in rows.items() if is_broken(name, row)]
    print(table(rows))
    print(timing_table(gathers.pop("timings")))
    where = conditions(queries=len(queries), candidates=len(queries[0].candidates))
    where |= {"backend": options.backend, "max_loss_of_r1_points": MAX_LOSS}
    result = {**where, "rows": rows, "gather": gathers, "broken": broken}
    print(f"written to {write_result('int8_tokens', result, options.out)}")
    return 1 if broken else 0


def read_queries(path: Path) -> list[Query]:
    """Return the demo's queries with their candidates."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        ids, target = values["candidates"], values["target"]
        found.append(Query(values["query"], ids, ids.index(target) if target in ids else None))
    return found


def measure_ranking(
    demo: Path, queries: Sequence[Query], backend: str, scratch: Path, tell: Tell
) -> dict[str, dict[str, Any]]:
    """Rank every query in every way of `ROWS`; return agreement with the first, and recall."""
    stores = {"float16": demo / "scenes.store", "int8": scratch / "int8.store"}
    quantize_store(stores["float16"], stores["int8"])
    engines = build_engines(demo, backend, scratch, tell)
    found: dict[str, list[Float32]] = {}
    for name, (precision, stored, taken) in ROWS.items():
        tell(f"ranking: {name}")
        with Reranker.open(engines[precision, taken], store=stores[stored]) as reranker:
            found[name] = [scores_of(reranker, query) for query in queries]
    return compare(found, [query.target for query in queries])


def build_engines(
    demo: Path, backend: str, scratch: Path, tell: Tell
) -> dict[tuple[str, str], Path]:
    """Build what `ROWS` needs; return the folders by precision and token dtype."""
    folders = {}
    calibration = demo / "calibration"
    for precision, _, taken in ROWS.values():
        folder = folders[precision, taken] = scratch / f"{precision}-{taken}"
        if folder.exists():
            continue
        tell(f"building: {precision}, {taken} tokens")
        with ExitStack() as stack:
            pairs = None
            if precision == "int8":
                queries = calibration / "queries.jsonl"
                opened = StoreSamples.open(calibration / "scenes.store", demo / "bundle", queries)
                pairs = stack.enter_context(opened)
            build_engine(
                demo / "bundle",
                folder,
                backend=backend,
                precision=precision,
                calibration=pairs,
                options=EngineOptions(token_dtype=taken),
            )
    return folders


def quantize_store(source: Path, target: Path) -> None:
    """Make an int8 store of a float16 one, as indexing with `--dtype int8` would."""
    with ExitStack() as stack:
        store = stack.enter_context(TokenStore.open(source))
        num_tokens, hidden = store.record_shape
        made = stack.enter_context(
            TokenStore.create(
                target,
                num_tokens=num_tokens,
                hidden=hidden,
                dtype="int8",
                fingerprint_encoder=store.fingerprint_encoder,
            )
        )
        for batch in store.iterate():
            made.append(batch.ids, batch.tokens)


def scores_of(reranker: Reranker, query: Query) -> Float32:
    """Return float32 [C]: the score of every candidate, in their order.

    Raises:
        EdjeError: a candidate has no score.
    """
    result = reranker.rank(query.text, query.candidates)
    if result.errors:
        raise EdjeError(f"{len(result.errors)} candidates of {query.text!r} have no score")
    scores = np.empty(len(query.candidates), np.float32)
    for hit in result:
        scores[hit.index] = hit.score
    return scores


def compare(
    found: Mapping[str, Sequence[Float32]], targets: Sequence[int | None]
) -> dict[str, dict[str, Any]]:
    """Return each row's recall, and its agreement with the first row.

    Raises:
        EdjeError: no query knows its target.
    """
    rows = {}
    exact = recall(found[REFERENCE], targets)
    for name, scores in found.items():
        shares = recall(scores, targets)
        if exact is None or shares is None:
            raise EdjeError("no query of the demo knows its target")
        loss = 100 * (exact["R@1"] - shares["R@1"])
        agreement = asdict(rank_agreement(found[REFERENCE], scores))
        rows[name] = {**agreement, **shares, "loss_of_r1_points": round(loss, 4)}
    return rows


def is_broken(name: str, row: Mapping[str, Any]) -> bool:
    """Tell whether int8 tokens alone lose more than expected: precision int8 is not judged."""
    return bool(ROWS[name][0] == "fp32" and row["loss_of_r1_points"] > MAX_LOSS)


def measure_gathers(scratch: Path, num_rounds: int) -> dict[str, Any]:
    """Gather random full-size records of both stores; return times and bytes an image.

    Raises:
        EdjeError: what was read is not what was written.
    """
    random = np.random.default_rng(0)
    shape = (NUM_RECORDS, NUM_TOKENS, HIDDEN)
    tokens = random.standard_normal(shape, np.float32).astype(np.float16)
    ids = [f"img-{number}" for number in range(NUM_RECORDS)]
    bytes_an_image = {}
    with ExitStack() as stack:
        stores = {}
        for dtype in ("float16", "int8"):
            path = scratch / f"full-size-{dtype}"
            sizes = {"num_tokens": NUM_TOKENS, "hidden": HIDDEN}
            with TokenStore.create(path, dtype=dtype, fingerprint_encoder="-", **sizes) as made:
                made.append(ids, tokens)
            stores[dtype] = stack.enter_context(TokenStore.open(path))
            bytes_an_image[dtype] = round(stores[dtype].stat().total_bytes / NUM_RECORDS, 1)
        places = random.integers(0, NUM_RECORDS, GATHERED)
        asked = [ids[place] for place in places]
        timings = _time_gathers(stores, asked, tokens[places], num_rounds)
    extra = timings[_DEQUANTISED].min_ms - timings[_AS_STORED].min_ms
    return {
        "one_run": f"{GATHERED} random records of {NUM_RECORDS}, {NUM_TOKENS} x {HIDDEN}, verified",
        "timings": timings,
        "records": timings_json(timings),
        "dequantise_us_a_record": round(extra * 1e3 / GATHERED, 1),
        "bytes_an_image": bytes_an_image,
    }


_AS_STORED, _DEQUANTISED = "int8, as stored", "int8, dequantised"


def _time_gathers(
    stores: Mapping[str, TokenStore], asked: list[str], tokens: Float16, num_rounds: int
) -> dict[str, Timing]:
    """Time the three ways to read the records `asked`, whose tokens are float16 [N, m, H]."""
    rows = {dtype: store.rows(asked) for dtype, store in stores.items()}
    plain, found = np.empty_like(tokens), np.empty_like(tokens)
    values, scales = np.empty(tokens.shape, np.int8), np.empty(tokens.shape[:2], np.float16)
    source = Float16Tokens(stores["int8"])
    ways: dict[str, Callable[[], object]] = {
        "float16": lambda: stores["float16"].read(rows["float16"], plain),
        _AS_STORED: lambda: stores["int8"].read(rows["int8"], values, scales),
        _DEQUANTISED: lambda: source.read(rows["int8"], found),
    }
    for way in ways.values():
        way()
    timings = interleave(ways, pairs=len(asked), num_rounds=num_rounds)
    expected = quantize_tokens(tokens)
    read: tuple[Array, ...] = (plain, values, scales, found)
    written: tuple[Array, ...] = (tokens, *expected, dequantize_tokens(*expected))
    if not all(np.array_equal(got, put) for got, put in zip(read, written, strict=True)):
        raise EdjeError("the gathers read something else than was written")
    return timings


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| | R@1 | lost points | Kendall tau | same first place | mean, max score difference |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {100 * row['R@1']:.1f} % | {row['loss_of_r1_points']:.2f} "
            f"| {row['kendall_tau']:.4f} | {100 * row['top_1']:.1f} % "
            f"| {row['mean_abs_diff']:.3f}, {row['max_abs_diff']:.2f} |"
        )
    return "\n".join(lines)


def _tell(line: str) -> None:
    print(f"... {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
