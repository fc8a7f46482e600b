"""How much one node carries, and what a deployment needs: bounds in closed form.

    edje bench capacity --images 100e6 --queries 50 --candidates 1000

Every resource gives a bound in pairs/s; the least of them is the node's capacity, and its resource
the bottleneck. `SCALE.md` states the formulas, `simulate.py` what they leave out: waiting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, inf

from ..errors import EdjeError
from . import costs, measured
from .costs import RECORD_BYTES, Cost, StageCosts

PLACES = ("device", "host", "disk")  # the fastest first
MAX_PAIRS = 1024
GB, TB = 1e9, 1e12


@dataclass(frozen=True, slots=True)
class Node:
    """One machine. What is not measured is assumed: `SCALE.md` names the sources.

    Attributes:
        gpus, cores_a_gpu: of the node.
        gpu_bytes, host_bytes, disk_bytes: for tokens; of one GPU, of the node, of the node.
        pcie_bytes_per_s: of one GPU.
        disk_reads_per_s: bytes/s of all drives, records in random order.
        network_bytes_per_s: of the node.
    """

    gpus: int = 8
    cores_a_gpu: int = 16
    gpu_bytes: float = 120 * GB
    host_bytes: float = 1.5 * TB
    disk_bytes: float = 8 * 15.36 * TB * 0.9
    pcie_bytes_per_s: float = 55.4 * GB
    disk_reads_per_s: float = 8 * 4.2 * GB
    network_bytes_per_s: float = 12.5 * GB


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is asked of the whole deployment.

    Attributes:
        images: in the store.
        queries_per_s, candidates: requests, and images that each ranks.
        dtype: of the tokens, float16 or int8.
        cached: share of the candidates that lie in the page cache where tokens are on disk.
        most_busy: share of its capacity that a node is loaded to: what is left keeps p99 low.
    """

    images: float
    queries_per_s: float
    candidates: int
    dtype: str = "float16"
    cached: float = 0.0
    most_busy: float = 0.7

    @property
    def pairs_per_s(self) -> float:
        """Pairs to be scored."""
        return self.queries_per_s * self.candidates

    @property
    def store_bytes(self) -> float:
        """Bytes of all tokens."""
        return self.images * RECORD_BYTES[self.dtype]

    def check(self) -> None:
        """Refuse what cannot be meant, all of it.

        Raises:
            EdjeError
        """
        faults = [
            f"{name} is {value}, expected more than 0"
            for name, value in (
                ("images", self.images),
                ("queries", self.queries_per_s),
                ("candidates", self.candidates),
            )
            if not 0 < value < inf
        ]
        if self.dtype not in RECORD_BYTES:
            faults.append(f"dtype is {self.dtype!r}, expected one of {', '.join(RECORD_BYTES)}")
        if not 0 <= self.cached <= 1:
            faults.append(f"cached is {self.cached}, expected 0 to 1")
        if not 0 < self.most_busy < 1:
            faults.append(f"most busy is {self.most_busy}, expected between 0 and 1")
        if faults:
            raise EdjeError("this load cannot be planned", faults=faults)


@dataclass(frozen=True, slots=True)
class Need:
    """What a load needs.

    Attributes:
        place: where the tokens lie.
        nodes, gpus: in all; every node has the same number.
        copies: of the store, spread over the nodes.
        bounds: pairs/s of one node, by resource.
        busy: share of the capacity in use.
    """

    place: str
    nodes: int
    gpus: int
    copies: int
    bounds: Mapping[str, float]
    busy: float

    @property
    def bottleneck(self) -> str:
        """The resource that is full first."""
        return min(self.bounds, key=self.bounds.__getitem__)

    @property
    def next_bottleneck(self) -> str:
        """The one that would be, were the first without end."""
        others = {name: bound for name, bound in self.bounds.items() if name != self.bottleneck}
        return min(others, key=others.__getitem__)


def front_cost() -> Cost:
    """Return the event loop's CPU time a request of n candidates, all results sent back."""
    front = measured.result(measured.SERVE)["front"]
    few, *_, many = sorted(front, key=int)
    ends = [(int(each), front[each]["cpu_us"] / 1e6) for each in (few, many)]
    return costs.through(*ends)


def stage_bounds(stages: StageCosts, max_pairs: int = MAX_PAIRS) -> dict[str, float]:
    """Return pairs/s of each stage of one GPU: batches of `max_pairs` one after the other.

    `cpu` is the thread that reads and launches.
    """
    thread = stages.read.of(max_pairs) + stages.launch.of(max_pairs)
    compute, upload = stages.compute.of(max_pairs), stages.upload.of(max_pairs)
    return {
        "gpu": max_pairs / compute,
        "cpu": max_pairs / thread if thread else inf,
        "pcie": max_pairs / upload if upload else inf,
    }


def node_bounds(
    node: Node, traffic: Traffic, stages: StageCosts, place: str, front: Cost | None = None
) -> dict[str, float]:
    """Return pairs/s of each resource of one node: a serving process for each GPU.

    `python` is a process's lock: its event loop and its launches take turns.
    """
    record, num = RECORD_BYTES[traffic.dtype], traffic.candidates
    bounds = {name: node.gpus * bound for name, bound in stage_bounds(stages).items()}
    if place != "device":
        bounds["pcie"] = node.gpus * node.pcie_bytes_per_s / record
    uncached = 1 - traffic.cached if place == "disk" else 0.0
    bounds["disk"] = node.disk_reads_per_s / record / uncached if uncached else inf
    front = front_cost() if front is None else front
    per_pair = front.of(num) / num + stages.launch.of(MAX_PAIRS) / MAX_PAIRS
    bounds["python"] = node.gpus / per_pair
    bounds["network"] = node.network_bytes_per_s / BYTES_A_CANDIDATE
    return bounds


# A 24-byte id in JSON with its quotes and comma in; out, all results: index and score, in JSON.
BYTES_A_CANDIDATE = 28 + 48


def fits(node: Node, traffic: Traffic, place: str, num_nodes: int) -> int:
    """Return how many copies of the store so many nodes hold at `place`."""
    room = {
        "device": node.gpus * node.gpu_bytes,
        "host": node.host_bytes,
        "disk": node.disk_bytes,
    }[place]
    return int(num_nodes * room // traffic.store_bytes)


def need(
    traffic: Traffic, node: Node, stages: Mapping[str, StageCosts], place: str, most: int = 100_000
) -> Need:
    """Return how many nodes a load needs with tokens at `place`: for room, and for speed.

    Raises:
        EdjeError: the load cannot be meant, or needs more nodes than `most`.
    """
    traffic.check()
    bounds = node_bounds(node, traffic, stages[place], place)
    capacity = min(bounds.values())
    for_speed = ceil(traffic.pairs_per_s / (capacity * traffic.most_busy))
    room = fits(node, replace(traffic, images=1), place, 1)
    for_room = ceil(traffic.images / room) if room else most + 1
    nodes = max(1, for_speed, for_room)
    if nodes > most:
        raise EdjeError(f"{nodes:,} nodes and more are needed, expected {most:,} at most")
    copies = max(1, fits(node, traffic, place, nodes))
    busy = traffic.pairs_per_s / (nodes * capacity)
    return Need(place, nodes, nodes * node.gpus, copies, bounds, busy)


def best_need(traffic: Traffic, node: Node, stages: Mapping[str, StageCosts]) -> Need:
    """Return the place, and the node as small as it does (1, 2, 4 GPUs or all), with fewest GPUs.

    The faster place wins where two need the same.
    """
    found: list[Need] = []
    sizes = [size for size in (1, 2, 4) if size < node.gpus] + [node.gpus]
    for place in PLACES:
        for size in sizes:
            one = need(traffic, part_of(node, size), stages, place)
            if size == node.gpus or one.nodes == 1:
                found.append(one)
    return min(found, key=lambda each: (each.gpus, PLACES.index(each.place)))


def part_of(node: Node, gpus: int) -> Node:
    """Return a node with fewer GPUs, and its share of memory and drives."""
    part = gpus / node.gpus
    return replace(
        node,
        gpus=gpus,
        host_bytes=node.host_bytes * part,
        disk_bytes=node.disk_bytes * part,
        disk_reads_per_s=node.disk_reads_per_s * part,
    )


def h200_stages(
    slots: int = costs.SLOTS_OF_SHORT, dtype: str = "float16", engine: str = measured.COMPILED
) -> dict[str, StageCosts]:
    """Return the costs of the measured H200 for every place."""
    return {place: costs.h200(place, slots=slots, dtype=dtype, engine=engine) for place in PLACES}
