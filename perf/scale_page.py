"""`SCALE.md`: what a deployment needs, written from the model; never by hand.

edje bench capacity --write
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import inf
from pathlib import Path

from ..runtime.pipeline import NUM_SLOTS
from . import capacity, costs, measured
from .capacity import MAX_PAIRS, PLACES, Need, Node, Traffic, best_need, h200_stages
from .costs import RECORD_BYTES, Cost, StageCosts
from .predictions import TOLERANCE, Prediction, all_predictions
from .simulate import Served, Server, poisson_arrivals

PAGE = Path(__file__).parent / "SCALE.md"
TEMPLATE = Path(__file__).parent / "scale_template.md"
IMAGES = (1e6, 100e6, 10e9)
ASKED = ((10, 100), (50, 1000), (500, 1000), (5000, 1000))  # queries/s, candidates
GPUS = (1, 2, 4, 8, 16, 32, 64)
LOADS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
NUM_REQUESTS = 4000
GOAL = 1.8  # times the measured engine: what our own 8-bit kernels are to reach
FASTER = (1.0, 1.35, GOAL, 3.0, 5.0)  # engines to come, in times of the measured one
NAMES = {
    "gpu": "GPU",
    "cpu": "reading thread (CPU)",
    "pcie": "PCIe",
    "disk": "NVMe",
    "python": "Python's lock (CPU)",
    "network": "network",
}
ONE = Traffic(1e6, 1, 1000)


def page() -> str:
    """Return the text of `SCALE.md`."""
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.format(**_facts(), **_tables(), **_model(), **_trust(), **_assumed())


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int = 1) -> str:
    """Return a Markdown table; columns from `numbers_from` on stand right."""
    rule = ["---" if at < numbers_from else "--:" for at in range(len(head))]
    lines = [head, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def short(number: float) -> str:
    """Return a number to three digits: 950, 83.9 k, 100 M, 10 B."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


@cache
def stages(dtype: str = "float16", slots: int = costs.SLOTS_OF_SHORT) -> dict[str, StageCosts]:
    """Return the costs of the measured H200 by place."""
    return h200_stages(slots=slots, dtype=dtype)


@cache
def node_bounds(place: str) -> Mapping[str, float]:
    """Return pairs/s of a node of eight GPUs at 1,000 candidates, by resource."""
    return capacity.node_bounds(Node(), ONE, stages()[place], place)


def speed_of(gpus: int, images: float, times: float = 1.0) -> tuple[float, Need | None]:
    """Return pairs/s of so many GPUs with an engine so many times as fast; 0: no room."""
    size, nodes = min(gpus, 8), -(-gpus // 8)
    node, traffic = capacity.part_of(Node(), size), Traffic(images, 1, 1000)
    for place in PLACES:
        copies = capacity.fits(node, traffic, place, nodes)
        if copies:
            bounds = capacity.node_bounds(node, traffic, stages()[place], place)
            bounds["gpu"] *= times
            found = Need(place, nodes, gpus, copies, bounds, 1.0)
            return nodes * bounds[found.bottleneck], found
    return 0.0, None


def full_rate() -> float:
    """Return pairs/s of one GPU in full batches, tokens in host memory."""
    return min(capacity.stage_bounds(stages()["host"]).values())


@cache
def under_load(candidates: int, load: float) -> Served:
    """Return what a server with one GPU does at a share of its capacity; tokens in host memory."""
    front = capacity.front_cost().of(candidates)
    server = Server(stages()["host"], MAX_PAIRS, front_s=front)
    arrivals = poisson_arrivals(load * full_rate() / candidates, NUM_REQUESTS, seed=1)
    return server.run(arrivals, candidates)


def _facts() -> dict[str, str]:
    where = measured.result(measured.H200)["conditions"]
    steps = {step["name"]: step for step in measured.result(measured.H200)["steps"]}
    cpus = steps["cpu"]["values"]["cpu"]
    amx = max(cpus["batch_32"]["timings"], key=lambda each: float(each["pairs_per_s"]))
    here = measured.result(measured.END_TO_END)
    few = here["openvino_against_onnxruntime"]["timings"][0]
    return {
        "gpu": where["gpu"],
        "cores": str(where["cores"]),
        "cpu": where["cpu"],
        "date": where["time"][:10],
        "commit": where["commit"],
        "max_pairs": f"{MAX_PAIRS:,}",
        "amx_cores": str(cpus["conditions"]["cores"]),
        "amx": f"{amx['pairs_per_s']:,.0f}",
        "amx_engine": amx["name"],
        "few_cores": str(here["conditions"]["cores"]),
        "few": f"{few['pairs_per_s']:,.0f}",
        "few_engine": few["name"],
    }


def _tables() -> dict[str, str]:
    gpu = node_bounds("device")["gpu"]
    long = capacity.stage_bounds(stages(slots=128)["device"])["gpu"] * 8
    feeds = {f"{p}_feeds": short(capacity.stage_bounds(stages()[p])["cpu"]) for p in PLACES}
    return {
        "needs": _needs(),
        "node": _node(),
        "room": _room(),
        "gpus": _gpus(),
        "gpus_chart": _gpus_chart(),
        "faster": _faster(),
        "latency": _latency(),
        "latency_chart": _latency_chart(),
        "goal": f"{GOAL:g}",
        "long_text": f"{long / gpu:.0%}",
        **{f"queries_{c}": short(gpu / c) for c in (100, 1000, 50_000)},
        **feeds,
        "num_requests": f"{NUM_REQUESTS:,}",
        "full_rate": short(full_rate()),
        "batch_ms": f"{stages()['host'].compute.of(MAX_PAIRS) * 1e3:.1f}",
        **{f"p99_{c}": f"{under_load(c, 0.7).percentile_ms(99):.0f}" for c in (100, 1000)},
    }


def _needs() -> str:
    rows = []
    for images in IMAGES:
        for queries, candidates in ASKED:
            traffic = Traffic(images, queries, candidates)
            found = [
                best_need(replace(traffic, dtype=dtype), Node(), stages(dtype))
                for dtype in RECORD_BYTES
            ]
            lead = [short(images), f"{queries:,}", f"{candidates:,}", short(traffic.pairs_per_s)]
            next_full = NAMES[found[0].bottleneck], NAMES[found[0].next_bottleneck]
            rows.append([*lead, *map(_need, found), ", then ".join(next_full)])
    head = ["images", "queries/s", "candidates", "pairs/s", "float16 tokens", "int8 tokens"]
    return table([*head, "full first (float16)"], rows, numbers_from=9)


def _need(need: Need) -> str:
    gpus = f"{need.gpus} GPU" + "s" * (need.gpus > 1)
    nodes = f" in {need.nodes} nodes" if need.nodes > 1 else ""
    return f"**{gpus}**{nodes} ({need.place}, {need.busy:.0%})"


def _node() -> str:
    rows = []
    for place in PLACES:
        bounds = node_bounds(place)
        least, following, *_ = sorted(bounds.items(), key=lambda each: each[1])
        shown = ("-" if bounds[name] == inf else short(bounds[name]) for name in NAMES)
        after = f"{NAMES[following[0]]}, {following[1] / least[1]:.2f} x"
        rows.append([place, *shown, NAMES[least[0]], after])
    return table(["tokens on", *NAMES.values(), "full first", "next"], rows)


def _room() -> str:
    node = Node()
    places = (node.gpu_bytes, node.gpus * node.gpu_bytes, node.host_bytes, node.disk_bytes)
    rows = [
        [f"{dtype}, {size:,} bytes", *(short(each / size) for each in places)]
        for dtype, size in RECORD_BYTES.items()
    ]
    return table(["tokens", "one GPU", "eight GPUs", "host memory", "NVMe"], rows)


def _gpus() -> str:
    rows = [[str(gpus), *(_cell(*speed_of(gpus, each)) for each in IMAGES)] for gpus in GPUS]
    return table(["GPUs", *(f"{short(images)} images" for images in IMAGES)], rows)


def _cell(speed: float, found: Need | None) -> str:
    if found is None:
        return "no room"
    names = f"{NAMES[found.bottleneck]}, then {NAMES[found.next_bottleneck]}"
    return f"{short(speed)} from {found.place}: {names}"


def _gpus_chart() -> str:
    lines = [
        [round(speed_of(gpus, images, times)[0] / 1e3) for gpus in GPUS]
        for images, times in ((IMAGES[0], GOAL), (IMAGES[0], 1.0), (IMAGES[1], GOAL))
    ]
    return _chart("GPUs", list(map(str, GPUS)), "thousand pairs/s", lines)


def _faster() -> str:
    rows = []
    for times in FASTER:
        row = [f"{times:g} x: {short(node_bounds('device')['gpu'] / 8 * times)}"]
        for place in PLACES:
            bounds = {**node_bounds(place), "gpu": node_bounds(place)["gpu"] * times}
            least = min(bounds, key=bounds.__getitem__)
            row.append(f"{short(bounds[least] / 8)}: {NAMES[least]}")
        rows.append(row)
    return table(["the engine alone", *(f"from {place}" for place in PLACES)], rows)


def _latency() -> str:
    rows = []
    for candidates in (100, 1000):
        for load in LOADS:
            found = under_load(candidates, load)
            lead = [f"{candidates:,}", f"{load:.0%}", short(load * full_rate() / candidates)]
            times = [f"{found.percentile_ms(q):.1f}" for q in (50, 90, 99)]
            busy = f"{found.utilisation['compute']:.0%}"
            rows.append([*lead, *times, f"{found.mean_batch:.0f}", busy])
    head = ["candidates", "load", "requests/s", "p50 ms", "p90 ms", "p99 ms", "pairs a batch"]
    return table([*head, "GPU busy"], rows)


def _latency_chart() -> str:
    lines = [[round(under_load(1000, x).percentile_ms(q), 1) for x in LOADS] for q in (50, 99)]
    return _chart("share of the capacity", [f'"{x:.0%}"' for x in LOADS], "ms", lines)


def _chart(x: str, names: Sequence[str], y: str, lines: Sequence[Sequence[float]]) -> str:
    """Return a chart that GitHub draws."""
    most = max(max(line) for line in lines) * 1.05
    drawn = [f"    line [{', '.join(map(str, line))}]" for line in lines]
    axes = [f'    x-axis "{x}" [{", ".join(names)}]', f'    y-axis "{y}" 0 --> {most:.0f}']
    return "\n".join(["```mermaid", "xychart-beta", *axes, *drawn, "```", ""])


def _model() -> dict[str, str]:
    fit = costs.fit_compute(measured.rows(measured.COMPILED, measured.BARE))
    engine = f"{fit.fixed_s * 1e3:.3f} ms + n x ({fit.base_s * 1e6:.2f} + {fit.slot_s * 1e6:.4f} S)"
    rows = [
        ["engine, S slots", f"{engine} us", "bare runs, 32 to 4,096 pairs, 79 to 128 slots"],
        ["launch (Python)", _cost(costs.own_launch()), "CPU time of runs from the GPU's memory"],
        ["read, from disk", _cost(costs.fed("disk")), "`rank` without engine, less from the GPU"],
        ["read, from host", _cost(costs.fed("host")), "the same"],
        ["upload", f"n x R / {measured.ceiling('h2d') / 1e9:.1f} GB/s", "the copy alone"],
        ["download", "0.008 ms", "the runtime's timers"],
        ["rank, with resolving", _cost(costs.asked()), "`rank` without engine and reading"],
        ["front", _cost(capacity.front_cost()), "CPU time of a server without an engine"],
    ]
    return {
        "formulas": table(["stage", "cost of n pairs", "fitted to"], rows, numbers_from=9),
        "float16_bytes": f"{RECORD_BYTES['float16']:,}",
        "int8_bytes": f"{RECORD_BYTES['int8']:,}",
        "bytes_a_candidate": str(capacity.BYTES_A_CANDIDATE),
        "num_slots": str(NUM_SLOTS),
        "ids_mb": str(measured.result(measured.STORE)["ids"]["open_mb"]),
    }


def _cost(each: Cost) -> str:
    return f"{each.fixed_s * 1e3:.3f} ms + n x {each.per_pair_s * 1e6:.3f} us"


def _trust() -> dict[str, str]:
    found = all_predictions()
    groups: dict[str, list[Prediction]] = {}
    for each in found:
        groups.setdefault(f"{each.machine}: {each.group}", []).append(each)
    rows = []
    for name, some in groups.items():
        errors = [abs(each.error) for each in some if each.miss is None]
        within = f"{sum(each.is_within for each in some)} of {len(some)}"
        worst = f"{max(errors):.1%}" if errors else "-"
        rows.append([name, within, worst, some[0].constants])
    head = ["figures", f"within {TOLERANCE:.0%}", "largest error", "constants from"]
    misses = [
        f"- {each.what}: measured {each.measured:,.1f} {each.unit}, predicted "
        f"{each.predicted:,.1f} ({each.error:+.0%}): {each.miss}."
        for each in found
        if each.miss is not None
    ]
    return {
        "num_predicted": str(len(found)),
        "num_within": str(sum(each.is_within for each in found)),
        "tolerance": f"{TOLERANCE:.0%}",
        "trust": table(head, rows, numbers_from=9),
        "misses": "\n".join(misses),
    }


def _assumed() -> dict[str, str]:
    node = Node()
    return {
        "front_cpu": f"an {measured.result(measured.SERVE)['conditions']['cpu']}",
        "int8_share": f"{RECORD_BYTES['int8'] / RECORD_BYTES['float16']:.0%}",
        "gpu_gb": f"{node.gpu_bytes / 1e9:.0f}",
        "host_tb": f"{node.host_bytes / 1e12:g}",
        "disk_gb_per_s": f"{node.disk_reads_per_s / 1e9:.1f}",
        "disk_tb": f"{node.disk_bytes / 1e12:.0f}",
        "network_gbit": f"{node.network_bytes_per_s * 8 / 1e9:.0f}",
        "pcie_gb": f"{node.pcie_bytes_per_s / 1e9:.1f}",
    }
