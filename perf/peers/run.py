"""`edje bench peers`: everybody in one process, tables, one JSON; `PLAN.md` says who is who."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ...arrays import Float32
from ...bundle import BundleManifest
from ...engines.cpu import why_no_bf16, why_no_vnni
from ...engines.registry import load_backend
from ...errors import EdjeError
from ...machine import usable_cores
from ...runtime.text import QueryTokenizer
from ...show import note, print_table, progress_steps
from ..harness import ROOT, Progress
from ..random_model import (
    DESCRIPTION,
    Pairs,
    full_size_bundle,
    image_id,
    query_ids,
    random_tokens,
    write_store,
)
from ..report import Measured, benchmark_json, summary, write_result
from ..subjects import AUTO, engines_folder, query_of_length
from .contest import GROUP, NUM_CHECKED, Bench, Contestant, Question, contest, opened
from .ours import auto_engine, words_of_auto
from .pytorch import asking, joint_encoder
from .roster import OFFICIAL, on_cpu, on_gpu
from .serving import GROUP as SERVING_GROUP
from .serving import measure_serving
from .stores import GROUP as STORE_GROUP
from .stores import measure_stores

NUM_CANDIDATES, NUM_WORDPIECES, MOST_ROUNDS = 1000, (13, 61), 5
SERVING_ROUNDS = 3
STORE_ROUNDS = 100
STORES, SERVING = PARTS = ("stores", "serving")  # contests of their own, beside the scorers'
# What `auto` must reach, in times the pairs/s of the official code, by what the CPU has.
EXPECTED_BF16, EXPECTED_VNNI, EXPECTED_AVX2 = 12.0, 6.0, 3.0
LEAST_OF_LIBRARY = 0.97  # of the library we call: 1.0, and ratios of minima move by 3 %


def run_peers(
    *,
    name: str,
    out: Path,
    only: Collection[str] = (),
    num_rounds: int = MOST_ROUNDS,
    seconds: float = inf,
    num_candidates: int = NUM_CANDIDATES,
    wordpieces: Sequence[int] = NUM_WORDPIECES,
    device: str = "cpu",
    bundle: Path | None = None,
) -> dict[str, Any]:
    """Measure everybody, print the tables, write the JSON; return it.

    Args:
        only: ids of contestants, `stores`, `serving`; none: all.
        num_rounds: of everybody at most; who has settled takes no more turns. Those that are
            compared to a percent (`rivals`) take equally many, twice that at most.
        seconds: of each text length, after which no round begins but for the second.
        device: PyTorch's name, `cpu` or `cuda`.
        bundle: of the random model; None: the full-size one.

    Raises:
        EdjeError: an unknown id or device, or somebody whose scores are wrong.
    """
    everybody = roster_of(device)(num_candidates)
    contestants = chosen(everybody, only)
    cache = ROOT / ".cache"
    cache.mkdir(exist_ok=True)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(dir=cache)))
        progress = stack.enter_context(progress_steps("bench peers"))
        model = bundle or full_size_bundle()
        asked = (num_candidates, wordpieces, progress, device)
        bench, questions = prepared(model, scratch, stack, *asked)
        measured, skipped = measure(contestants, bench, questions, num_rounds, seconds)
        if not only or STORES in only:
            stores, without = measure_stores(bench, questions[0].pairs.tokens, STORE_ROUNDS)
            measured, skipped = measured + stores, skipped | without
        if not only or SERVING in only:
            query = questions[0].text
            measured += measure_serving(bench, auto_engine(bench), query, SERVING_ROUNDS)
        named = {one.name for one in measured}
        more = {"auto": words_of_auto(bench)} if AUTO in named else {}
    result = benchmark_json(
        measured,
        conditions={
            "model": DESCRIPTION,
            "candidates": num_candidates,
            "rounds_at_most": num_rounds,
            "cores": usable_cores(),
            **more,
        },
        skipped=skipped,
    )
    result["ratios"] = ratios(measured, contestants)
    result["faults"] = list(faults_of(result["ratios"])) if device == "cpu" else []
    print_result(result)
    note(f"written to {write_result(name, result, out)}")
    return result


def roster_of(device: str) -> Callable[[int], list[Contestant]]:
    """Return who takes part on a device.

    Raises:
        EdjeError: no such device, or PyTorch does not see it.
    """
    if device == "cpu":
        return on_cpu
    if device != "cuda":
        raise EdjeError(f"the device is {device!r}, expected cpu or cuda")
    if not torch.cuda.is_available():
        raise EdjeError(f"PyTorch {torch.__version__} sees no NVIDIA GPU", hint="use --device cpu")
    return on_gpu


def chosen(everybody: Sequence[Contestant], only: Collection[str]) -> list[Contestant]:
    """Return those whose ids are asked for, all where none is.

    Raises:
        EdjeError: ids that nobody has.
    """
    names = [one.name for one in everybody]
    unknown = sorted(set(only) - {*names, *PARTS})
    if unknown:
        known = ", ".join((*names, *PARTS))
        raise EdjeError(f"no peer is called {', '.join(unknown)}", hint=f"there are {known}")
    return [one for one in everybody if not only or one.name in only]


def prepared(
    bundle: Path,
    scratch: Path,
    stack: ExitStack,
    num_candidates: int,
    wordpieces: Sequence[int],
    progress: Progress,
    device: str = "cpu",
) -> tuple[Bench, list[Question]]:
    """Write a store of random tokens; return the bench and a question of each length."""
    manifest = BundleManifest.read(bundle)
    progress(f"writing a store of {num_candidates:,} images")
    tokens = random_tokens(num_candidates, manifest.sizes)
    store = scratch / "tokens.store"
    write_store(store, tokens, encoder=manifest.fingerprint_encoder).close()
    bench = Bench(
        bundle,
        engines_folder(bundle),
        store,
        [image_id(number) for number in range(num_candidates)],
        stack,
        scratch,
        device,
        progress,
    )
    tokenizer = QueryTokenizer.open(bundle, manifest.text)
    texts = [query_of_length(tokenizer, length) for length in wordpieces]
    return bench, [
        Question(text, Pairs(length, query_ids(bundle, manifest.text, text), tokens))
        for text, length in zip(texts, wordpieces, strict=True)
    ]


def measure(
    contestants: Sequence[Contestant],
    bench: Bench,
    questions: Sequence[Question],
    num_rounds: int,
    seconds: float = inf,
) -> tuple[list[Measured], dict[str, str]]:
    """Open everybody once, then hold a contest for each question."""
    asks, skipped = opened(contestants, bench)
    measured: list[Measured] = []
    for question in questions if asks else ():
        expected = official_scores(bench, question)
        turns: dict[str, Any] = {"num_rounds": num_rounds, "seconds": seconds}
        made, unable = contest(
            contestants, asks, question, expected, progress=bench.progress, **turns
        )
        measured += made
        skipped |= unable
    return measured, skipped


def official_scores(bench: Bench, question: Question) -> Float32:
    """Return what the official code gives for the first pairs in float32: float32 [n]."""
    official = asking(bench, joint_encoder(bench, trimmed=False))
    return official(question, min(NUM_CHECKED, len(question.pairs.tokens)))()


def ratios(measured: Sequence[Measured], contestants: Sequence[Contestant]) -> dict[str, Any]:
    """Return, for each text length, `auto` over everybody and our engines over their libraries."""
    scorers = [one for one in measured if one.group == GROUP]
    lengths = sorted({one.params["wordpieces"] for one in scorers})
    found: dict[str, Any] = {}
    for length in lengths:
        speed = {
            one.name: one.pairs_per_s or 0.0
            for one in scorers
            if one.params["wordpieces"] == length
        }
        auto, libraries = speed.get(AUTO), {}
        for one in contestants:
            rivals = [name for name in one.rivals if name in speed]
            if one.name in speed and rivals:
                best = max(rivals, key=lambda name: speed[name])
                libraries[one.name] = {
                    "best_rival": best,
                    "ratio": round(speed[one.name] / speed[best], 4),
                }
        found[str(length)] = {
            "auto_over": {name: round(auto / rate, 3) for name, rate in speed.items()}
            if auto
            else {},
            "over_library": libraries,
        }
    return found


def faults_of(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield one sentence for every ratio below what it must be."""
    least, why = expected_of_auto()
    for length, both in found.items():
        got = both["auto_over"].get(OFFICIAL)
        if got is not None and got < least:
            yield f"{length} wordpieces: auto is {got} times {OFFICIAL}, expected {least} ({why})"
        for name, one in both["over_library"].items():
            if one["ratio"] < LEAST_OF_LIBRARY:
                yield (
                    f"{length} wordpieces: {name} is {one['ratio']} times {one['best_rival']}, "
                    "expected 1.0"
                )


def expected_of_auto() -> tuple[float, str]:
    """Return how many times the official code's pairs/s `auto` must reach here, and why."""
    has_vnni = why_no_vnni() is None
    has_bf16 = why_no_bf16() is None and load_backend("openvino").why_not("bf16") is None
    if has_vnni and has_bf16:
        return EXPECTED_BF16, "VNNI and bf16"
    return (EXPECTED_VNNI, "VNNI") if has_vnni else (EXPECTED_AVX2, "no VNNI")


def print_result(result: Mapping[str, Any]) -> None:
    """Write a table for each text length, who was skipped, and the conditions."""
    header = ("peer", "what", "pairs/s", "ms a pair", "CPU ms", "auto is", "tau", "pairs", "runs")
    for length, found in result["ratios"].items():
        rows = [
            _row(entry, found["auto_over"])
            for entry in result["benchmarks"]
            if entry["group"] == GROUP and str(entry["params"]["wordpieces"]) == length
        ]
        print_table(f"{length} wordpieces, in turns", header, rows)
        for name, one in found["over_library"].items():
            print(f"{name} reaches {one['ratio']:.3f} times {one['best_rival']}")
    _print_parts(result["benchmarks"])
    for name, reason in result["skipped"].items():
        print(f"skipped {name}: {reason}")
    for fault in result["faults"]:
        print(f"NOT REACHED: {fault}")
    print(summary(result))


def _row(entry: Mapping[str, Any], auto_over: Mapping[str, float]) -> tuple[str, ...]:
    extra, name = entry["extra_info"], entry["name"]
    tau = extra["conditions"]["agreement"].get("kendall_tau")
    return (
        name,
        extra["conditions"]["what"],
        f"{extra['pairs_per_s']:,.1f}",
        f"{extra['us_per_pair'] / 1e3:,.2f}",
        f"{extra['min_cpu_ms'] / extra['pairs']:,.2f}",
        f"{auto_over[name]:.2f} x" if name in auto_over else "",
        "-" if tau is None else f"{tau:.3f}",
        f"{extra['pairs']:,}",
        f"{entry['stats']['rounds']}",
    )


def _print_parts(benchmarks: Sequence[Mapping[str, Any]]) -> None:
    """Write the tables of stores and servers."""
    rows = [
        (
            one["name"],
            f"{one['extra_info']['us_per_pair']:,.2f}",
            f"{one['extra_info']['conditions']['gigabytes_per_s']:,.2f}",
            "yes" if one["extra_info"]["conditions"]["verified"] else "no",
        )
        for one in benchmarks
        if one["group"] == STORE_GROUP
    ]
    if rows:
        print_table("stores, in turns", ("store", "us a record", "GB/s", "verified"), rows)
    served = [
        (
            one["params"]["load"],
            one["name"],
            f"{one['extra_info']['conditions']['requests_per_s']:,.1f}",
            f"{one['extra_info']['pairs_per_s']:,.0f}",
            f"{one['extra_info']['conditions']['server_cpu_ms_per_request']:,.2f}",
        )
        for one in benchmarks
        if one["group"] == SERVING_GROUP
    ]
    if served:
        header = ("load", "server", "requests/s", "pairs/s", "CPU ms a request")
        print_table("servers, in turns", header, served)
