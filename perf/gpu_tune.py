"""`make tune`: time every tile of every product on the GPU at hand; write `kernels/tuning`.

    python -m edje.perf.gpu_tune [--out FOLDER] [--pairs N] [--seconds S]

A layer's products at the size of a full batch, in CUDA graphs, over inputs that take turns (one
alone would lie in the L2 cache). All tiles of a step run interleaved; the least time counts, and
each tile's rows are compared with the reference before. The tiles of int8 and fp8 stay as they are:
only 9.0 has more than one. An engine that was built with other tiles says so when it is opened.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from time import monotonic
from typing import cast

import numpy as np

from ..arrays import Array, DeviceArray
from ..bundle import ATTENTION_OUTPUT, FFN1, FFN2, QKV
from ..engines.native.memory import NUMPY_TYPES, upload
from ..errors import EdjeError
from ..kernels import layer_references
from ..kernels.device import open_gpu
from ..kernels.device.contract import Device, Graph, Stream
from ..kernels.device.facts import current_gpu, current_index, gpu_fault
from ..kernels.launch import KernelLibrary
from ..kernels.layer_variants import POINTER_TILES, TMA_TILES, product_name, product_tma_name
from ..kernels.layers import Product
from ..kernels.tuning import (
    FOLDER,
    FORMAT_VERSION,
    Table,
    read_tuning,
    serving_table,
    tuned_capabilities,
)
from .random_model import HIDDEN, INTERMEDIATE

PAIRS, SLOTS = 256, 80
NUM_INPUTS = 4  # together more than any L2 cache
CALLS_A_GRAPH, NUM_ROUNDS = 12, 7
ROWS_COMPARED = 64
BUDGET_S = 90.0
# Half a unit in the last place, and the order of sums.
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2}
# Step, inputs, outputs and GELU of a layer's products.
STEPS = (
    (QKV, HIDDEN, 3 * HIDDEN, "none"),
    (ATTENTION_OUTPUT, HIDDEN, HIDDEN, "none"),
    (FFN1, HIDDEN, INTERMEDIATE, "exact"),
    (FFN2, INTERMEDIATE, HIDDEN, "none"),
)


@dataclass(frozen=True, slots=True)
class Bench:
    """A GPU ready to time products.

    Attributes:
        device: current; owns what is allocated.
        num_pairs: pairs of a batch, of `SLOTS` rows each.
    """

    device: Device
    library: KernelLibrary
    stream: Stream
    num_pairs: int

    def wait(self) -> None:
        """Block until the stream's work until now has run."""
        passed = self.device.event()
        self.stream.record(passed)
        passed.synchronize()

    def least_us(self, graphs: Mapping[str, Graph], until: float) -> dict[str, float]:
        """Launch the graphs in turns; return the least microseconds of one call in each."""
        begin, end = self.device.event(), self.device.event()
        least = dict.fromkeys(graphs, float("inf"))
        for done in range(NUM_ROUNDS):
            if done > 1 and monotonic() > until:
                break
            for name, graph in graphs.items():
                self.stream.record(begin)
                graph.launch(self.stream)
                self.stream.record(end)
                end.synchronize()
                least[name] = min(least[name], end.elapsed_ms(begin) * 1e3 / CALLS_A_GRAPH)
        return {name: round(us, 2) for name, us in least.items()}


def tune(bench: Bench, element: str, seconds: float) -> dict[str, dict[str, float]]:
    """Return the microseconds of every tile of every step: step -> tile -> us.

    Raises:
        EdjeError: a tile's rows differ from the reference.
    """
    share = seconds / len(STEPS)
    return {
        step: _tune_step(bench, element, num_in, num_out, gelu, monotonic() + share)
        for step, num_in, num_out, gelu in STEPS
    }


def _tune_step(
    bench: Bench, element: str, num_in: int, num_out: int, gelu: str, until: float
) -> dict[str, float]:
    random, rows = np.random.default_rng(0), bench.num_pairs * SLOTS
    host = {
        f"x{number}": _typed(random.standard_normal((rows, num_in), np.float32), element)
        for number in range(NUM_INPUTS)
    }
    host["weight"] = _typed(
        random.standard_normal((num_out, num_in), np.float32) / np.sqrt(num_in), element
    )
    host["bias"] = random.standard_normal(num_out).astype(np.float32)
    host["control"] = np.array([0, bench.num_pairs], np.int64)
    held = upload(bench.device, host)
    kind = NUMPY_TYPES[element]
    found = bench.device.pinned(rows * num_out, kind)
    outs = [bench.device.memory(rows * num_out, kind) for _ in range(NUM_INPUTS)]
    graphs = {}
    for tile in tiles_of(bench.library, element, gelu):
        product = Product(
            bench.library,
            dtype=element,
            gelu=gelu,
            tile=tile,
            num_processors=bench.device.num_processors,
        )
        calls = [
            partial(
                product.enqueue,
                held[f"x{number}"],
                held["weight"],
                held["bias"],
                cast(DeviceArray, outs[number].view((rows, num_out))),
                held["control"],
                num_pairs=bench.num_pairs,
                rows_per_pair=SLOTS,
            )
            for number in range(NUM_INPUTS)
        ]
        calls[0](stream=bench.stream)
        bench.stream.download(found, outs[0], rows * num_out)
        bench.wait()
        _compare(tile, found.view((rows, num_out)), host, element, gelu)
        graphs[tile] = bench.device.capture(partial(_all, calls), bench.stream)
    try:
        return bench.least_us(graphs, until)
    finally:
        for graph in graphs.values():
            graph.close()


def tiles_of(library: KernelLibrary, element: str, gelu: str) -> list[str]:
    """Return the tiles that this GPU has a product for: the copy engine's where it has one."""
    found = [tile for tile in TMA_TILES if library.has(product_tma_name(element, gelu, tile))]
    return found or [t for t in POINTER_TILES if library.has(product_name(element, gelu, t))]


def _compare(tile: str, out: Array, host: Mapping[str, Array], element: str, gelu: str) -> None:
    """Compare some of a tile's rows, the last one among them, with the reference."""
    some = np.linspace(0, len(out) - 1, ROWS_COMPARED).astype(int)
    expected = layer_references.product(
        _widened(host["x0"][some], element), _widened(host["weight"], element), host["bias"], gelu
    )
    found = _widened(out[some], element)
    worst = float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))
    if not worst <= TOLERANCE[element]:
        raise EdjeError(
            f"the product {tile} of {element} differs from its reference by {worst:.1e} of the "
            f"largest value, expected at most {TOLERANCE[element]:.1e}"
        )


def _typed(values: Array, element: str) -> Array:
    """Return float32 values in the element type; bfloat16 in its bits, cut off."""
    if element == "float16":
        return values.astype(np.float16)
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _widened(values: Array, element: str) -> Array:
    if element == "float16":
        return values.astype(np.float32)
    return (values.astype(np.uint32) << 16).view(np.float32)


def table_of(
    measured: Mapping[str, Mapping[str, Mapping[str, float]]],
    conditions: str,
    others: Mapping[str, Mapping[str, str]] | None = None,
) -> Table:
    """Return the tuning table of what was measured: element type -> step -> tile -> us.

    Args:
        others: tiles of other types, which were not measured: the table keeps them.
    """
    tiles = {**(others or {}), **_fastest(measured)}
    return Table(FORMAT_VERSION, conditions, tiles, measured)


def _fastest(
    measured: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> dict[str, dict[str, str]]:
    return {
        element: {step: min(times, key=lambda tile: times[tile]) for step, times in steps.items()}
        for element, steps in measured.items()
    }


def write_table(folder: Path, capability: str, table: Table) -> Path:
    """Write `<capability>.json` into `folder`; return its path."""
    path = folder / f"{capability}.json"
    path.write_text(json.dumps(asdict(table), indent=1) + "\n", encoding="utf-8")
    return path


def measure(num_pairs: int, seconds: float) -> tuple[str, Table]:
    """Tune on the current GPU; return its compute capability and the table.

    Raises:
        EdjeError: no GPU, or a kernel whose rows are wrong.
    """
    gpu = current_gpu()
    with closing(open_gpu("cuda_core", current_index())) as device, device.current():
        assert device.compute_capability is not None
        library = KernelLibrary(device, device.compute_capability)
        bench = Bench(device, library, device.stream(), num_pairs)
        measured = {
            element: tune(bench, element, seconds / len(NUMPY_TYPES)) for element in NUMPY_TYPES
        }
    conditions = (
        f"{gpu.name}, {num_pairs} pairs of {SLOTS} slots, in CUDA graphs, inputs in turns, random "
        f"data, least of {NUM_ROUNDS} rounds; rows compared with the reference in the same run"
    )
    known = serving_table(gpu.capability, tuned_capabilities())
    others = {} if known is None else read_tuning(known).tiles
    kept = {element: tiles for element, tiles in others.items() if element not in measured}
    if kept:
        conditions += f"; {' and '.join(kept)} not measured"
    return gpu.capability, table_of(measured, conditions, kept)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 where a kernel is wrong, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m edje.perf.gpu_tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the table")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of a batch")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="for the whole run")
    options = parser.parse_args(arguments)
    fault = gpu_fault()
    if fault is not None:
        print(f"make tune needs an NVIDIA GPU: {fault}", file=sys.stderr)
        return 2
    try:
        capability, table = measure(options.pairs, options.seconds)
    except EdjeError as error:
        print(error, file=sys.stderr)
        return 1
    for element, steps in table.measured_us.items():
        for step, times in steps.items():
            shown = ", ".join(f"{tile} {us:.1f}" for tile, us in times.items())
            print(f"{element} {step}: {table.tiles[element][step]} of {shown} us")
    print(f"written to {write_table(options.out, capability, table)}")
    return 0


def _all(calls: Sequence[Callable[..., None]], stream: Stream) -> None:
    turns = cycle(calls)
    for _ in range(CALLS_A_GRAPH):
        next(turns)(stream=stream)


if __name__ == "__main__":
    sys.exit(main())
