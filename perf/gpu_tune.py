"""`make tune`: time every tile of every product on the GPU at hand; write `kernels/tuning`.

    python -m edje.perf.gpu_tune [--out FOLDER] [--pairs N] [--seconds S]

A layer's products at the size of a full batch, in CUDA graphs, over inputs that take turns (one
alone would lie in the L2 cache). All tiles of a step run interleaved; the least time counts, and
each tile's rows are compared with the reference before. An engine that was built with other tiles
says so when it is opened.

Then, with the table written, what runs a product and the norm of its rows in one kernel is timed
beside what it would replace; where it is right and faster, the table says so, and builds take it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from time import monotonic

from ..bundle import ATTENTION_OUTPUT, FFN1, FFN2, QKV
from ..engines.native.memory import NUMPY_TYPES
from ..engines.native.plan import STEPS8
from ..errors import EdjeError
from ..kernels.device import open_gpu
from ..kernels.device.contract import Graph, Stream
from ..kernels.device.facts import current_gpu, current_index, gpu_fault
from ..kernels.launch import KernelLibrary
from ..kernels.layer_variants8 import KINDS
from ..kernels.tuning import (
    FOLDER,
    FORMAT_VERSION,
    FUSED,
    NORM,
    Table,
    fused_steps,
    read_tuning,
    serving_table,
    tuned_capabilities,
)
from .random_model import HIDDEN, INTERMEDIATE
from .tuned_norms import FusedProduct, Norm, fusable
from .tuned_products import SLOTS, Place, Product8Bit, Product16, TunedProduct

PAIRS = 256
CALLS_A_GRAPH, NUM_ROUNDS = 12, 7
BUDGET_S = 90.0
SHARE_OF_FUSED = 0.1  # of the budget
# Step, inputs, outputs and GELU of a layer's products.
STEPS = (
    (QKV, HIDDEN, 3 * HIDDEN, "none"),
    (ATTENTION_OUTPUT, HIDDEN, HIDDEN, "none"),
    (FFN1, HIDDEN, INTERMEDIATE, "exact"),
    (FFN2, INTERMEDIATE, HIDDEN, "none"),
)


def tune(place: Place, element: str, seconds: float) -> dict[str, dict[str, float]]:
    """Return the microseconds of every tile of every step: step -> tile -> us.

    Empty where this GPU has no products of the type.

    Raises:
        EdjeError: a tile's rows differ from the reference.
    """
    steps = [each for each in STEPS if element in NUMPY_TYPES or each[0] in STEPS8]
    share = seconds / len(steps)
    timed = {
        step: _tune_step(place, element, num_in, num_out, gelu, monotonic() + share)
        for step, num_in, num_out, gelu in steps
    }
    return {step: times for step, times in timed.items() if times}


def _tune_step(
    place: Place, element: str, num_in: int, num_out: int, gelu: str, until: float
) -> dict[str, float]:
    kind = Product16 if element in NUMPY_TYPES else Product8Bit
    with closing(place.device.sibling()) as device:  # what a step takes is freed with it
        product = kind(replace(place, device=device), element, num_in, num_out, gelu)
        graphs = _captured(place, [(product, tile) for tile in product.tiles()])
        try:
            return least_us(place, graphs, until)
        finally:
            for graph in graphs.values():
                graph.close()


def _captured(place: Place, products: Sequence[tuple[TunedProduct, str]]) -> dict[str, Graph]:
    """Return a graph of every tile, once its rows were compared with the reference."""
    capture = place.device.capture
    return {
        tile: capture(partial(_all, product.check(tile)), place.stream)
        for product, tile in products
    }


def try_fused(
    place: Place, element: str, tiles: Mapping[str, str], seconds: float
) -> dict[str, dict[str, float]]:
    """Return microseconds of products with their norm, and of what they would replace.

    Args:
        tiles: step -> the tile that is best by itself.

    Raises:
        EdjeError: rows differ from the reference.
    """
    steps, timed = fusable(place.library, element, tiles), {}
    for step, num_in, num_out, gelu in STEPS:
        if step not in steps:
            continue
        with closing(place.device.sibling()) as device:
            here, sizes = replace(place, device=device), (num_in, num_out, gelu)
            fused = FusedProduct(here, element, *sizes)
            product = Product16(here, element, *sizes)
            norm = Norm(here, element, num_out, num_out, gelu)
            every = [(product, tiles[step]), (fused, FUSED), (norm, NORM)]
            graphs = _captured(place, every)
            try:
                times = least_us(place, graphs, monotonic() + seconds / len(steps))
            finally:
                for graph in graphs.values():
                    graph.close()
        timed[step] = {tiles[step]: times[tiles[step]], FUSED: times[FUSED]}
        timed[NORM] = {NORM: min([times[NORM], *timed.get(NORM, {}).values()])}
    return timed


def least_us(place: Place, graphs: Mapping[str, Graph], until: float) -> dict[str, float]:
    """Launch the graphs in turns; return the least microseconds of one call in each."""
    begin, end = place.device.event(), place.device.event()
    least = dict.fromkeys(graphs, float("inf"))
    for done in range(NUM_ROUNDS):
        if done > 1 and monotonic() > until:
            break
        for name, graph in graphs.items():
            place.stream.record(begin)
            graph.launch(place.stream)
            place.stream.record(end)
            end.synchronize()
            least[name] = min(least[name], end.elapsed_ms(begin) * 1e3 / CALLS_A_GRAPH)
    return {name: round(us, 2) for name, us in least.items()}


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


def with_fused(table: Table, timed: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Return a table with what `try_fused` timed, by element type; it chooses what is faster."""
    measured = {**table.measured_us}
    for element, steps in timed.items():
        kept = measured[element]
        added = {step: {**kept.get(step, {}), **us} for step, us in steps.items()}
        measured[element] = {**kept, **added}
    fused = {element: fused_steps(measured[element]) for element in timed}
    chosen = {element: steps for element, steps in fused.items() if steps}
    return replace(table, measured_us=measured, fused=chosen)


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
        place, elements = Place(device, library, device.stream(), num_pairs), (*NUMPY_TYPES, *KINDS)
        timed = {element: tune(place, element, seconds / len(elements)) for element in elements}
    measured = {element: steps for element, steps in timed.items() if steps}
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


def measure_fused(num_pairs: int, table: Table, seconds: float) -> Table:
    """Return a table with products and norms in one kernel timed as well.

    Raises:
        EdjeError: no GPU, or a kernel whose rows are wrong.
    """
    with closing(open_gpu("cuda_core", current_index())) as device, device.current():
        assert device.compute_capability is not None
        library = KernelLibrary(device, device.compute_capability)
        place = Place(device, library, device.stream(), num_pairs)
        timed = {
            element: try_fused(place, element, table.tiles[element], seconds / len(NUMPY_TYPES))
            for element in NUMPY_TYPES
            if element in table.measured_us
        }
    return with_fused(table, {element: steps for element, steps in timed.items() if steps})


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
        share_s = options.seconds * SHARE_OF_FUSED
        capability, table = measure(options.pairs, options.seconds - share_s)
        # A candidate that is wrong, or breaks the GPU's context, leaves the table as it is here.
        path = write_table(options.out, capability, table)
        table = measure_fused(options.pairs, table, share_s)
        write_table(options.out, capability, table)
    except EdjeError as error:
        print(error, file=sys.stderr)
        return 1
    for element, steps in table.measured_us.items():
        for step, times in steps.items():
            shown = ", ".join(f"{tile} {us:.1f}" for tile, us in times.items())
            chosen = table.tiles[element].get(step, "")
            if step in table.fused.get(element, ()):
                chosen = f"{FUSED}, product and norm in one,"
            print(f"{element} {step}: {chosen} of {shown} us")
    print(f"written to {path}")
    return 0


def _all(calls: Sequence[Callable[..., None]], stream: Stream) -> None:
    turns = cycle(calls)
    for _ in range(CALLS_A_GRAPH):
        next(turns)(stream=stream)


if __name__ == "__main__":
    sys.exit(main())
