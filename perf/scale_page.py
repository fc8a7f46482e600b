"""`SCALE.md`: what a deployment needs, written from the model; never by hand.

edje bench capacity --write
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from math import inf
from pathlib import Path

from . import capacity, costs, measured
from .capacity import MAX_PAIRS, PLACES, Need, Node, Traffic, best_need, h200_stages
from .costs import RECORD_BYTES, StageCosts
from .predictions import TOLERANCE, Prediction, all_predictions
from .simulate import Served, Server, poisson_arrivals

PAGE = Path(__file__).parent / "SCALE.md"
IMAGES = (1e6, 100e6, 10e9)
ASKED = ((10, 100), (50, 1000), (500, 1000), (5000, 1000))  # queries/s, candidates
GPUS = (1, 2, 4, 8, 16, 32, 64)
LOADS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
NUM_REQUESTS = 4000
GOAL = 1.8  # times the measured engine: what our own 8-bit kernels are to reach
FASTER = (1.0, 1.35, 1.8, 3.0, 5.0)  # engines to come, in times of the measured one
NAMES = {
    "gpu": "GPU",
    "cpu": "CPU: reading thread",
    "pcie": "PCIe",
    "disk": "NVMe",
    "python": "CPU: Python's lock",
    "network": "network",
}


def page() -> str:
    """Return the text of `SCALE.md`."""
    parts = [_head(), _needs(), _node(), _gpus(), _faster(), _latency(), _formulas()]
    return "\n".join([*parts, _trust(), _sources()])


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


def _bound(number: float) -> str:
    return "-" if number == inf else short(number)


@cache
def _stages(dtype: str = "float16", slots: int = costs.SLOTS_OF_SHORT) -> dict[str, StageCosts]:
    return h200_stages(slots=slots, dtype=dtype)


def _head() -> str:
    where = measured.result(measured.H200)["conditions"]
    return f"""# How far it scales

`edje bench capacity --write` writes this page from `perf/capacity.py` and the committed results; a
test fails when they disagree. For your own load and machine:

```
edje bench capacity --images 100e6 --queries 50 --candidates 1000
edje bench run engine --store photos.store && edje bench capacity --stages .cache/perf/stages.json
```

A **pair** is one query with one candidate: P = Q queries/s x C candidates. All GPU figures are those
of one {where["gpu"]} with {where["cores"]} cores ({where["cpu"]}), the full-size scorer (12 layers, hidden
384, 64 tokens an image) in float16 through `torch.compile`, 13 wordpieces, batches of {MAX_PAIRS:,},
measured {where["time"][:10]} at commit `{where["commit"]}`. A node is one machine of eight such GPUs (or
of 1, 2 or 4, with its share of memory, drives and cores).
"""


def _needs() -> str:
    rows = []
    for images in IMAGES:
        for queries, candidates in ASKED:
            traffic = Traffic(images, queries, candidates)
            found = [
                best_need(replace(traffic, dtype=dtype), Node(), _stages(dtype))
                for dtype in RECORD_BYTES
            ]
            lead = [short(images), f"{queries:,}", f"{candidates:,}", short(traffic.pairs_per_s)]
            rows.append([*lead, *map(_need, found), NAMES[found[0].bottleneck]])
    head = ["images", "queries/s", "candidates", "pairs/s", "float16 tokens", "int8 tokens"]
    drawn = table([*head, "full first (float16)"], rows, numbers_from=9)
    return f"""## I have N images, Q queries/s, C candidates: I need

{drawn}
So many GPUs that none is busier than 70 %, and so much room that every image is held once. In
brackets: where the tokens lie, and how busy the GPUs are. More nodes than speed asks for means that
room decides: with fewer GPUs a node, or drives twice as large, it costs less.

Small loads need no GPU: {_cpus()}
"""


def _cpus() -> str:
    """Say what CPUs score, as `make gpu` and `end_to_end` measured it."""
    steps = {step["name"]: step for step in measured.result(measured.H200)["steps"]}
    found = steps["cpu"]["values"]["cpu"]
    best = max(found["batch_32"]["timings"], key=lambda each: float(each["pairs_per_s"]))
    here = measured.result(measured.END_TO_END)["openvino_against_onnxruntime"]["timings"][0]
    cores = measured.result(measured.END_TO_END)["conditions"]["cores"]
    return (
        f"{found['conditions']['cores']} cores with AMX score {best['pairs_per_s']:,.0f} pairs/s "
        f"({best['name']}), {cores} with AVX512 {here['pairs_per_s']:,.0f} ({here['name']})."
    )


def _need(need: Need) -> str:
    gpus = f"{need.gpus} GPU" + "s" * (need.gpus > 1)
    nodes = f" in {need.nodes} nodes" if need.nodes > 1 else ""
    return f"**{gpus}**{nodes} ({need.place}, {need.busy:.0%})"


def _node() -> str:
    node, traffic = Node(), Traffic(1e6, 1, 1000)
    bounds = {p: capacity.node_bounds(node, traffic, _stages()[p], p) for p in PLACES}
    rows = []
    for place, found in bounds.items():
        least, following, *_ = sorted(found.items(), key=lambda each: each[1])
        rows.append([place, *(_bound(found[name]) for name in NAMES), NAMES[least[0]]])
        rows[-1].append(f"{NAMES[following[0]]}, {following[1] / least[1]:.2f} x")
    room = []
    for dtype, size in RECORD_BYTES.items():
        bytes_of = (node.gpu_bytes, node.gpus * node.gpu_bytes, node.host_bytes, node.disk_bytes)
        room.append([f"{dtype}, {size:,} bytes", *(short(each / size) for each in bytes_of)])
    return f"""## What one node carries

Pairs/s of a node of eight GPUs by what could be full first, at {traffic.candidates:,} candidates:

{table(["tokens on", *NAMES.values(), "full first", "next"], rows)}
Images that it holds:

{table(["tokens", "one GPU", "eight GPUs", "host memory", "NVMe"], room)}
At C candidates a node answers `pairs/s / C` queries/s: {short(bounds["device"]["gpu"] / 100)} at 100,
{short(bounds["device"]["gpu"] / 1000)} at 1,000, {short(bounds["device"]["gpu"] / 50_000)} at 50,000.
With 61 wordpieces (128 slots) the GPU's bound is \
{capacity.stage_bounds(_stages(slots=128)["device"])["gpu"] / bounds["device"]["gpu"] * 8:.0%} of that with 13.
"""


def _gpus() -> str:
    rows = []
    for gpus in GPUS:
        cells = [speed_of(gpus, images) for images in IMAGES]
        rows.append([str(gpus), *(_cell(*cell) for cell in cells)])
    lines = [
        [round(speed_of(gpus, images, times)[0] / 1e3) for gpus in GPUS]
        for images, times in ((IMAGES[0], GOAL), (IMAGES[0], 1.0), (IMAGES[1], GOAL))
    ]
    drawn = _chart(
        f"Thousand pairs/s: 1 M images, engine {GOAL} times as fast (upper); 1 M and 100 M as it is",
        "GPUs",
        list(map(str, GPUS)),
        "thousand pairs/s",
        lines,
    )
    return f"""## From 1 to 64 GPUs

Pairs/s with float16 tokens, the fastest place that has room for them, and in brackets what is full
first and next. A server process a GPU, `edje route` before them: nodes share nothing but the network, so
they add up.

{table(["GPUs", *(f"{short(images)} images" for images in IMAGES)], rows)}
With an engine {GOAL} times as fast 100 M images on disk gain nothing until they fit into host memory:

{drawn}"""


def speed_of(gpus: int, images: float, times: float = 1.0) -> tuple[float, Need | None]:
    """Return pairs/s of so many GPUs with an engine so many times as fast; 0: no room."""
    size, nodes = min(gpus, 8), -(-gpus // 8)
    node, traffic = capacity.part_of(Node(), size), Traffic(images, 1, 1000)
    for place in PLACES:
        copies = capacity.fits(node, traffic, place, nodes)
        if copies:
            bounds = capacity.node_bounds(node, traffic, _stages()[place], place)
            bounds["gpu"] *= times
            found = Need(place, nodes, gpus, copies, bounds, 1.0)
            return nodes * bounds[found.bottleneck], found
    return 0.0, None


def _cell(speed: float, found: Need | None) -> str:
    if found is None:
        return "no room"
    names = f"{NAMES[found.bottleneck]}, then {NAMES[found.next_bottleneck]}"
    return f"{short(speed)} from {found.place} ({names})"


def _faster() -> str:
    rows = []
    for times in FASTER:
        row = []
        for place in PLACES:
            bounds = capacity.node_bounds(Node(), Traffic(1e6, 1, 1000), _stages()[place], place)
            bounds = {**bounds, "gpu": bounds["gpu"] * times}
            least = min(bounds, key=bounds.__getitem__)
            row.append(f"{short(bounds[least] / 8)} ({NAMES[least]})")
        engine = capacity.stage_bounds(_stages()["device"])["gpu"] * times
        rows.append([f"{times:g} x: {short(engine)}", *row])
    return f"""## The next bottleneck

Pairs/s a GPU with an engine that is faster than the measured one, and what is full then:

{table(["the engine alone", *(f"from {place}" for place in PLACES)], rows)}
From NVMe and the page cache the thread that reads and verifies is full at the measured engine's
speed already: {short(capacity.stage_bounds(_stages()["disk"])["cpu"])} pairs/s on that machine. Host memory
feeds {short(capacity.stage_bounds(_stages()["host"])["cpu"])}, the GPU's own memory {short(capacity.stage_bounds(_stages()["device"])["cpu"])}.
"""


def _latency() -> str:
    rows, chart = [], {}
    for candidates in (100, 1000):
        for load in LOADS:
            found = under_load(candidates, load)
            chart[candidates, load] = found
            rows.append(
                [
                    f"{candidates:,}",
                    f"{load:.0%}",
                    short(load * _full_rate() / candidates),
                    *(f"{found.percentile_ms(q):.1f}" for q in (50, 90, 99)),
                    f"{found.mean_batch:.0f}",
                    f"{found.utilisation['compute']:.0%}",
                ]
            )
    drawn = _chart(
        "Latency (ms) against load, 1,000 candidates: p50 (lower), p99 (upper)",
        "share of the capacity",
        [f'"{load:.0%}"' for load in LOADS],
        "ms",
        [[round(chart[1000, load].percentile_ms(q), 1) for load in LOADS] for q in (50, 99)],
    )
    head = ["candidates", "load", "requests/s", "p50 ms", "p90 ms", "p99 ms", "pairs a batch"]
    return f"""## Latency under load (simulated)

One GPU, tokens in host memory, {NUM_REQUESTS:,} requests that arrive at random, the server's own scheduler, up to
{MAX_PAIRS:,} pairs a batch. 100 % is {short(_full_rate())} pairs/s: full batches without a gap.

{table([*head, "GPU busy"], rows)}
A full batch takes {_stages()["host"].compute.of(MAX_PAIRS) * 1e3:.1f} ms. Small requests share batches only where they wait for one another: below half
load each runs in a batch of its own, whose fixed costs show as GPU time; as the load grows batches
fill, and a pair costs less. A request of 1,000 is a batch by itself and waits in line for others. At
70 %, which the first table plans with, p99 is {chart[100, 0.7].percentile_ms(99):.0f} ms for 100 candidates and {chart[1000, 0.7].percentile_ms(99):.0f} ms for 1,000.

{drawn}"""


def _full_rate() -> float:
    return min(capacity.stage_bounds(_stages()["host"]).values())


@cache
def under_load(candidates: int, load: float) -> Served:
    """Return what a server with one GPU does at a share of its capacity; tokens in host memory."""
    front = capacity.front_cost().of(candidates)
    rate = load * _full_rate() / candidates
    server = Server(_stages()["host"], MAX_PAIRS, front_s=front)
    return server.run(poisson_arrivals(rate, NUM_REQUESTS, seed=1), candidates)


def _chart(
    title: str, x: str, names: Sequence[str], y: str, lines: Sequence[Sequence[float]]
) -> str:
    """Return a chart that GitHub draws."""
    most = max(max(line) for line in lines)
    drawn = "\n".join(f"    line [{', '.join(map(str, line))}]" for line in lines)
    return f"""```mermaid
xychart-beta
    title "{title}"
    x-axis "{x}" [{", ".join(names)}]
    y-axis "{y}" 0 --> {most * 1.05:.0f}
{drawn}
```
"""


def _formulas() -> str:
    compute = costs.fit_compute(measured.rows(measured.COMPILED, measured.BARE))
    own, front = costs.own_launch(), capacity.front_cost()
    asked, disk, host = costs.asked(), costs.fed("disk"), costs.fed("host")

    def cost(each: costs.Cost) -> str:
        return f"{each.fixed_s * 1e3:.3f} ms + n x {each.per_pair_s * 1e6:.3f} us"

    rows = [
        ["engine, S slots", f"{compute.fixed_s * 1e3:.3f} ms + n x ({compute.base_s * 1e6:.2f} + "
         f"{compute.slot_s * 1e6:.4f} S) us", "bare runs, 32 to 4,096 pairs, 79 to 128 slots"],
        ["launch (Python)", cost(own), "CPU time of runs from the GPU's memory"],
        ["read from disk", cost(disk), "`rank` without an engine, less the same from the GPU"],
        ["read from host", cost(host), "the same"],
        ["upload", f"n x R / {measured.ceiling('h2d') / 1e9:.1f} GB/s", "the copy alone"],
        ["download", "0.008 ms", "the runtime's timers"],
        ["tokenise, resolve, rank", cost(asked), "`rank` without engine and reading"],
        ["front (CPU time)", cost(front), "two cores, a server without an engine"],
    ]  # fmt: skip
    return f"""## Formulas

R bytes a record ({RECORD_BYTES["float16"]:,} in float16, {RECORD_BYTES["int8"]:,} in int8), B pairs a batch, G GPUs a node, C candidates.
A stage's cost of n pairs, in seconds, is t(n) = a + b n:

{table(["stage", "cost of a batch of n", "fitted to"], rows, numbers_from=9)}
- A pipeline runs as fast as its slowest stage. Reading and launching share the calling thread; copies and compute have streams of their own:
  `pairs/s of a GPU = B / max(t_compute(B), t_read(B) + t_launch(B), t_upload(B), t_download(B))`
- `pairs/s of a node = min(G x GPU, G x PCIe / R, NVMe / (R (1 - cached)), G / (t_front(C) / C + t_launch(B) / B), network / {capacity.BYTES_A_CANDIDATE})`, bytes a candidate of ids in and results out in JSON.
- One request on an idle machine, N batches: `t_request = t_read(B) + t_launch(B) + t_upload(B) + N x slowest(B) + t_download(B) + t_ask(C)`; the simulation gives the exact time with {3} slots.
- Nodes: `max(P / (0.7 x node), N_images x R / room)`. Tokens lie where the fewest GPUs are needed, of equals where they are read fastest.
- Memory beside the tokens: 50 bytes an image for ids and checksums (1 M ids: {measured.result(measured.STORE)["ids"]["open_mb"]} MB measured); a node of a sharded store holds those of its share.
- Waiting (M/D/1, one stage of service time s, load r): `mean wait = s r / (2 (1 - r))`. Batches that grow with the queue make it shorter; the simulation runs the server's own scheduler.
"""


def _trust() -> str:
    found = all_predictions()
    groups: dict[str, list[Prediction]] = {}
    for each in found:
        groups.setdefault(f"{each.machine}: {_group(each.what)}", []).append(each)
    rows = []
    for name, some in groups.items():
        errors = [abs(each.error) for each in some if each.miss is None]
        within = f"{sum(each.is_within for each in some)} of {len(some)}"
        worst = f"{max(errors):.1%}" if errors else "-"
        rows.append([name, within, worst, some[0].constants])
    misses = [
        f"- {each.what}: measured {each.measured:,.1f} {each.unit}, predicted "
        f"{each.predicted:,.1f} ({each.error:+.0%}): {each.miss}."
        for each in found
        if each.miss is not None
    ]
    return f"""## How far to trust it

{len(found)} committed figures are predicted, {sum(each.is_within for each in found)} of them within {TOLERANCE:.0%}; a test holds that. No constant is fitted to the
figure that it predicts.

{table(["figures", "within 15 %", "largest error", "constants from"], rows, numbers_from=9)}
Known misses, which the largest error leaves out:

{chr(10).join(misses)}

Not predicted: `nvidia-h200-first-run` (a fault of the pinned memory, since mended, held it up), `store.json`'s sweep over
batch sizes (its two runs of 256 records differ by 39 %), other CPUs' `precisions.json`, and cascades.
"""


def _group(what: str) -> str:
    for part in (measured.COMPILED, measured.ONNXRUNTIME, measured.EAGER):
        if what.startswith(part):
            return f"{part}, {what.removeprefix(part + ', ').partition(',')[0]}"
    return what.partition(" at ")[0].partition(" from ")[0]


def _sources() -> str:
    node = Node()
    rows = [
        ["GPU, its copies, reading, Python a batch", "measured",
         "`results/nvidia-h200-2026-11-27.json`, one GPU with 16 cores; 8 at once were not run"],
        ["the front's CPU time a request", "measured", "`results/serve.json`, on an AMD EPYC core"],
        ["51 % fewer bytes with int8 tokens", "computed", "reading and copying scale with them; the engine keeps its speed"],
        [f"GPU memory for tokens {node.gpu_bytes / 1e9:.0f} GB", "assumed", "141 GB less 21 GB for engine, slots and graphs"],
        [f"host memory for tokens {node.host_bytes / 1e12:g} TB", "assumed",
         "three quarters of the 2 TB (and 112 cores for 8 GPUs) of NVIDIA's H200 system in MLPerf Inference 4.1"],
        [f"NVMe reads {node.disk_reads_per_s / 1e9:.1f} GB/s", "assumed",
         "8 drives x 4.2 GB/s: 50,000 records in random order in 0.59 s, one PCIe 4.0 drive (EDJE paper, appendix C.1)"],
        [f"NVMe room {node.disk_bytes / 1e12:.0f} TB", "assumed", "8 drives of 15.36 TB, 90 % full"],
        [f"network {node.network_bytes_per_s * 8 / 1e9:.0f} Gbit/s", "assumed", "one port; it is never full first"],
        ["PCIe of 8 GPUs at once", "assumed", "8 times one GPU's 55.4 GB/s: a switch that GPUs share halves it, which is not full either"],
    ]  # fmt: skip
    return f"""## What is measured, and what is assumed

{table(["", "", "source"], rows, numbers_from=9)}"""
