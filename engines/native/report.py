"""`report.json`: the kernels that a native engine launches, with what each takes of a GPU."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...bundle import FFN1, FFN2, QKV
from ...kernels.cuda_manifest import all_kernels
from ...kernels.cuda_variants import product_norm_name
from ...kernels.launch import choose_cubin
from ...kernels.layer_variants import (
    NORM_COLUMNS,
    add_norm_name,
    attention_name,
    attention_sizes,
    product_name,
    product_tma_name,
    score_name,
    shallow_score_name,
)
from ...kernels.layer_variants8 import (
    WIDE,
    add_norm8_name,
    product8_name,
    product8_tma_name,
    quantize_name,
)
from ...kernels.tuning import FUSED, read_tuning
from ...kernels.variant import TMA_CAPABILITIES
from ...kernels.variants import ASSEMBLE_COLUMNS, assemble_name
from .plan import STEPS8, Plan
from .steps import fused_norms, is_copied, step_before

REPORT = "report.json"


def write_report(folder: Path, plan: Plan) -> Mapping[str, Any]:
    """Write `report.json` into `folder`; return the manifest's entry for it."""
    values = {
        "tuning": {each: read_tuning(each).table.conditions for each in plan.tiles},
        "kernels": {
            each: [_described(each, *used) for used in _kernels(plan, each)] for each in plan.tiles
        },
    }
    (folder / REPORT).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return {"report": REPORT}


def _kernels(plan: Plan, capability: str) -> Iterator[tuple[str, str, int, float | None]]:
    """Yield step, kernel, launches a forward and measured microseconds on one architecture."""
    element = plan.element
    columns = min(size for size in ASSEMBLE_COLUMNS if size >= plan.width)
    yield "assemble", assemble_name(plan.token_dtype, element, columns), 1, None
    name_of = product_tma_name if capability in TMA_CAPABILITIES else product_name
    measured = read_tuning(capability).table.measured_us.get(element, {})
    fused = fused_norms(plan, plan.fused.get(capability, ()))
    with_norm = Counter(step for _, step in map(step_before, fused))
    for step, times in with_norm.items():
        us = measured.get(step, {}).get(FUSED)
        yield f"{step}, add and norm", product_norm_name(element), times, us
    for step, tile in plan.tiles[capability].items():
        name = name_of(element, plan.activation if step == FFN1 else "none", tile)
        times = sum(
            1 + _is_twice(plan, layer, step)
            for layer in range(plan.num_layers)
            if not plan.is_quantized(layer, step)
        )
        times -= with_norm[step]
        if times:
            yield step, name, times, measured.get(step, {}).get(tile)
    yield from _eight_bit_kernels(plan, capability)
    for bucket in plan.text_buckets:
        num_slots = plan.num_slots(bucket)
        made_for = attention_sizes(num_slots, num_slots)
        step = f"attention, {bucket} text slots"
        yield step, attention_name(element, plan.head, *made_for), plan.num_whole_layers, None
    if not plan.shallow:
        made_for = attention_sizes(1, num_slots)
        yield "attention, CLS rows", attention_name(element, plan.head, *made_for), 1, None
    columns = min(size for size in NORM_COLUMNS if size >= plan.width)
    norms = range(2 * plan.num_layers)
    copied = sum(is_copied(plan, number) for number in norms)
    plain = len(norms) - copied - len(fused)
    if plain:
        yield "add and norm", add_norm_name(element, columns), plain, None
    if copied:
        name = add_norm8_name(plan.kind, columns)
        yield f"add and norm, and {plan.kind}", name, copied, None
    yield "score", (shallow_score_name if plan.shallow else score_name)(element), 1, None


def _eight_bit_kernels(plan: Plan, capability: str) -> Iterator[tuple[str, str, int, float | None]]:
    """Yield as `_kernels`: 8-bit products, and what makes rows 8 bit before them."""
    name_of = product8_tma_name if capability in TMA_CAPABILITIES else product8_name
    measured = read_tuning(capability).table.measured_us.get(plan.kind, {})
    layers = range(plan.num_layers)
    for step in STEPS8:
        for out in (plan.kind, WIDE):
            times = sum(
                1 + _is_twice(plan, layer, step)
                for layer in layers
                if plan.is_quantized(layer, step)
                and (out != WIDE) == (step == FFN1 and plan.is_quantized(layer, FFN2))
            )
            if times:
                gelu = plan.activation if step == FFN1 else "none"
                tile = plan.tiles8[capability][step]
                # Behind a GELU the 8-bit form was timed.
                us = measured.get(step, {}).get(tile) if (out != WIDE) == (step == FFN1) else None
                name = name_of(plan.kind, gelu, out, tile)
                yield f"{step}, {plan.kind} to {out}", name, times, us
    times = plan.is_quantized(0, QKV) + sum(
        plan.is_quantized(layer, FFN2) and not plan.is_quantized(layer, FFN1) for layer in layers
    )
    if times:
        yield f"to {plan.kind}", quantize_name(plan.kind), times, None


def _is_twice(plan: Plan, layer: int, step: str) -> bool:
    """Tell whether a layer launches a product twice: one that is not whole, for its CLS rows."""
    return step == QKV and layer == plan.num_whole_layers


def _described(
    capability: str, step: str, name: str, launches: int, us: float | None
) -> dict[str, Any]:
    """Return one row of the report."""
    major, _, minor = capability.partition(".")
    _, entry = all_kernels()[name]
    cubin = choose_cubin(entry, (int(major), int(minor)))
    return {
        "step": step,
        "kernel": name,
        "launches": launches,
        "warps": entry.num_warps,
        "registers": cubin.registers,
        "shared_bytes": cubin.shared_bytes,
        "spill_bytes": cubin.spill_bytes,
        "measured_us": us,
    }
