"""The README's tables on speed: one block a result, empty where that result is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .random_model import HIDDEN
from .readme_chart import H200, LADDER, LONG, OFFICIAL_PEER, SHORT, best_of_ladder
from .report import Result, entries, summary


def _peers_block(results: Mapping[str, Result]) -> str:
    """Return the table of peers, the fastest first, at both lengths of text."""
    if "peers" not in results:
        return ""
    peers = results["peers"]
    speeds: dict[str, dict[int, float]] = {}
    about: dict[str, Mapping[str, Any]] = {}
    for one in entries(peers, "peers"):
        about[one["name"]] = one["extra_info"]["conditions"]
        own = speeds.setdefault(one["name"], {})
        own[one["params"]["wordpieces"]] = one["extra_info"]["pairs_per_s"]
    base = speeds.get(OFFICIAL_PEER, {}).get(SHORT)
    rows = []
    for name in sorted(speeds, key=lambda name: -speeds[name].get(SHORT, 0.0)):
        where, speed = about[name], speeds[name].get(SHORT)
        bold = "**" if where["kind"] == "ours" else ""
        other = " (another function)" if where["function"] == "other" else ""
        times = f"{speed / base:.1f}" if speed and base else ""
        cells = (*(_number(speeds[name].get(length)) for length in (SHORT, LONG)), times)
        rows.append((f"{bold}{where['what']}{bold}{other}", *(f"{bold}{c}{bold}" for c in cells)))
    head = ("pairs/s", f"{SHORT} wordpieces", f"{LONG} wordpieces", "times the official code")
    told = f"{summary(peers)}, {_link('peers')}; [who is who](perf/PLAN.md)."
    return "\n\n".join([_table(head, rows), *_other_contests(peers), told])


def _other_contests(peers: Result) -> list[str]:
    """Return a table for every other contest in the peers' file: stores, servers."""
    groups = dict.fromkeys(one["group"] for one in peers["benchmarks"])
    tables = []
    for group in groups:
        if group in ("peers", "roof"):
            continue
        rows = [
            (one["fullname"].partition("::")[2], _number(one["extra_info"]["pairs_per_s"]))
            for one in entries(peers, group)
        ]
        tables.append(_table((group, "records or pairs/s"), rows))
    return tables


def _stages_block(results: Mapping[str, Result]) -> str:
    """Return where the time of a ranking goes."""
    if "stages" not in results:
        return ""
    stages = results["stages"]
    measured = entries(stages, "stages")
    rows = []
    for one in measured:
        extra = one["extra_info"]
        share = extra["share_of_roof"]
        rows.append(
            (
                one["name"],
                f"{extra['us_per_pair']:,.2f}",
                *(f"{extra[f'{q}_ms']:,.3f}" for q in ("p50", "p99")),
                "" if share is None else f"{share:.0%}",
            )
        )
    where = measured[0]["extra_info"]["conditions"]
    head = ("stage", "us a pair", "p50 ms", "p99 ms", "of the roof")
    return (
        f"Where a ranking's time goes ({where['engine']}, {where['candidates']} candidates; `read` "
        "to `enqueue` are of one batch; the roof is the copy of memory, or the large product of "
        f"the same precision, measured in turns with the stages):\n\n{_table(head, rows)}\n\n"
        f"{summary(stages)}, [stages.json](perf/results/stages.json)."
    )


def _flat_block(results: Mapping[str, Result]) -> str:
    """Return what a pair costs over candidates, and over the store's size."""
    lines = []
    for over, said in (("candidates", "candidates"), ("images", "images in the store")):
        if over not in results:
            continue
        ranks = [one for one in entries(results[over], "stages") if one["name"] == "rank"]
        costs = [one["extra_info"]["us_per_pair"] for one in ranks]
        at = ", ".join(
            f"{one['params'][over]:,}: {one['extra_info']['us_per_pair']:,.0f}" for one in ranks
        )
        where = ranks[0]["extra_info"]["conditions"]
        if where.get("hidden", HIDDEN) != HIDDEN:
            said += " (the demo's trained scorer)"
        lines.append(
            f"- **us a pair by {said}**: {at} ({max(costs) / min(costs) - 1:.1%} between the "
            f"least and the most). {summary(results[over])}, "
            f"[{over}.json](perf/results/{over}.json)"
        )
    return "\n".join(lines)


def _latency_block(results: Mapping[str, Result]) -> str:
    """Return latencies: top 10 with the cascade on and off, and a cold start."""
    lines = []
    if "top10" in results:
        top10 = results["top10"]
        told = [
            f"{one['name']} {one['extra_info']['p50_ms']:,.0f} / {one['extra_info']['p99_ms']:,.0f}"
            for one in top10["benchmarks"]
        ]
        share = top10["result"]["share_equal"]
        lines.append(
            f"- **Top 10 of 1,000, p50 / p99 ms** (the demo's trained scorer): {'; '.join(told)}. "
            f"The cascade's top 10 is the precise engine's on {share:.0%} of the queries. "
            f"{summary(top10)}, [top10.json](perf/results/top10.json)"
        )
    if "cold" in results:
        cold = {one["name"]: one for one in results["cold"]["benchmarks"]}
        parts = [
            f"{name.removeprefix('of it: ')} {one['stats']['min']:.2f}"
            for name, one in cold.items()
            if name != "edje rerank"
        ]
        lines.append(
            f"- **A cold `edje rerank`**, start of the process to its answer: "
            f"{cold['edje rerank']['stats']['min']:.2f} s ({', '.join(parts)}; full-size scorer, "
            f"100 candidates). {summary(results['cold'])}, [cold.json](perf/results/cold.json)"
        )
    return "\n".join(lines)


def _h200_block(results: Mapping[str, Result]) -> str:
    """Return the H200's table."""
    if H200 not in results:
        return ""
    h200 = results[H200]
    rows = []
    for engine, via, label, kind in LADDER:
        bold = "**" if kind == "ours" else ""
        best = [best_of_ladder(h200, engine, via, length) for length in (SHORT, LONG)]
        cells = [f"{row['pairs_per_s']:,.0f} ({row['share_of_roof']:.0%})" for row in best]
        rows.append((f"{bold}{label}{bold}", *(f"{bold}{cell}{bold}" for cell in cells)))
    head = ("NVIDIA H200, pairs/s (of the roof)", f"{SHORT} wordpieces", f"{LONG} wordpieces")
    return f"{_table(head, rows)}\n\n{_h200_conditions(h200)}"


def _h200_conditions(h200: Result) -> str:
    where = h200["conditions"]
    names = ("torch", "onnxruntime", "openvino")
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in names)
    return (
        f"(best batch of each, random weights, edje through its torch.compile engine; "
        f"{where['gpu']}, {versions}, commit {where['commit']}, {where['time'][:10]}), "
        f"[{H200}.json](perf/results/{H200}.json)."
    )


def _bare_block(results: Mapping[str, Result]) -> str:
    """Return what is left of the bare library's speed in the whole ranking."""
    if "end_to_end" not in results:
        return ""
    found = results["end_to_end"]
    ranked = found["rank_against_bare_openvino"]
    rows = [
        (r["name"], *(f"{r[key]:,.1f}" for key in ("pairs_per_s", "min_ms", "median_ms")))
        for r in ranked["timings"]
    ]
    where = found["conditions"]
    head = (f"float32, {where['candidates']} candidates", "pairs/s", "min ms", "median ms")
    return (
        f"{_table(head, rows)}\n\n`Reranker.rank` reads its tokens from the store and keeps "
        f"**{ranked['share_of_bare']:.1%}** of the pairs/s that the bare library reaches on "
        f"ready-made arrays, at its best. {_old_conditions(where)}, {_link('end_to_end')}."
    )


def _old_conditions(where: Mapping[str, Any]) -> str:
    versions = where["versions"]
    names = ", ".join(f"{name} {versions[name]}" for name in ("openvino", "onnxruntime", "torch"))
    return (
        f"({where['cpu']}, {where['cores']} cores, {where['model']}, {where['wordpieces']} "
        f"wordpieces, {names}, commit {where['commit']}, {where['time'][:10]})"
    )


def _link(name: str) -> str:
    return f"[{name}.json](perf/results/{name}.json)"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rule = line(["---", *["--:"] * (len(head) - 1)]).replace(" ", "")
    return "\n".join([line(head), rule, *map(line, rows)])


BLOCKS: Sequence[Callable[[Mapping[str, Result]], str]] = (
    _peers_block,
    _bare_block,
    _h200_block,
    _stages_block,
    _flat_block,
    _latency_block,
)
