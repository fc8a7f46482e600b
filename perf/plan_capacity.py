"""`edje bench capacity`: what a load needs, on the measured H200 or with costs of your own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import EdjeError
from ..show import note, print_table
from . import capacity, costs
from .capacity import Need, Node, Traffic
from .costs import Cost, StageCosts
from .measured import stages_of
from .scale_page import NAMES, PAGE, page, short


def write_page() -> None:
    """Write `SCALE.md` anew."""
    PAGE.write_text(page(), encoding="utf-8")
    note(f"written to {PAGE}")


def read_stages(path: Path) -> StageCosts:
    """Return the costs in a result of `edje bench run`.

    Raises:
        EdjeError: the file is none, or lacks stages.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        stages = stages_of(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EdjeError(
            f"{path} is no result of `edje bench run`: {error}",
            hint="edje bench run writes one, to .cache/perf/stages.json",
        ) from error
    return costs.of_stages(stages)


def stages_for(
    path: Path | None, slots: int, dtype: str, given_us: Mapping[str, float | None]
) -> dict[str, StageCosts]:
    """Return the costs by place: measured here, or the H200's; those given count instead.

    Args:
        given_us: microseconds a pair by stage (compute, launch, read, upload); None: as measured.
    """
    if path is None:
        found = capacity.h200_stages(slots=slots, dtype=dtype)
    else:
        found = dict.fromkeys(capacity.PLACES, read_stages(path))
    changed = {
        name: Cost(per_pair_s=value / 1e6) for name, value in given_us.items() if value is not None
    }
    return {place: stages._replace(**changed) for place, stages in found.items()}


def plan(
    traffic: Traffic, node: Node, stages: Mapping[str, StageCosts], place: str | None
) -> list[Need]:
    """Return what each place needs, or the one place, the best first.

    Raises:
        EdjeError: the load cannot be meant, or there is no such place.
    """
    if place is not None and place not in capacity.PLACES:
        places = ", ".join(capacity.PLACES)
        raise EdjeError(f"the place is {place!r}, expected one of {places}")
    wanted = capacity.PLACES if place is None else (place,)
    found = [capacity.need(traffic, node, stages, each) for each in wanted]
    return sorted(found, key=lambda each: each.gpus)


def print_plan(traffic: Traffic, node: Node, needs: list[Need]) -> None:
    """Write what is needed, and how far a node goes."""
    lead = f"{short(traffic.images)} images, {short(traffic.queries_per_s)} queries/s"
    title = (
        f"{lead} x {traffic.candidates:,} candidates: {short(traffic.pairs_per_s)} pairs/s, "
        f"{traffic.store_bytes / 1e9:,.0f} GB of {traffic.dtype} tokens"
    )
    header = (
        "tokens on",
        "nodes",
        "GPUs",
        "copies",
        "busy",
        "pairs/s a node",
        "full first",
        "next",
    )
    rows = [
        (
            each.place,
            f"{each.nodes:,}",
            f"{each.gpus:,}",
            f"{each.copies:,}",
            f"{each.busy:.0%}",
            short(each.bounds[each.bottleneck]),
            NAMES[each.bottleneck],
            NAMES[each.next_bottleneck],
        )
        for each in needs
    ]
    print_table(title, header, rows)
    print(f"a node: {node.gpus} GPUs; perf/SCALE.md says what is measured and what is assumed")


def run(
    traffic: Traffic, gpus: int, place: str | None, stages: Mapping[str, StageCosts]
) -> list[Need]:
    """Plan for nodes of so many GPUs, write the table, return what is needed.

    Raises:
        EdjeError: as `plan`.
    """
    if gpus < 1:
        raise EdjeError(f"gpus is {gpus}, expected 1 or more")
    traffic.check()
    node = Node() if gpus == Node().gpus else replace(Node(), gpus=gpus)
    needs = plan(traffic, node, stages, place)
    print_plan(traffic, node, needs)
    return needs
