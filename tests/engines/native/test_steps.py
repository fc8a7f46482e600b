"""A layer's products and norms: the same rows whether a norm is in one kernel with its product."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edje.bundle import layer_path, weight_name
from edje.engines.native.memory import Rows
from edje.engines.native.plan import Plan
from edje.engines.native.report import write_report
from edje.engines.native.steps import Choices, Steps, Work, fused_norms
from edje.engines.native.weights import ATTENTION_NORM, FFN_NORM
from edje.kernels.device.contract import Stream
from edje.kernels.launch import KernelLibrary
from recording_device import RecordingDevice

HIDDEN, WIDE, SLOTS = 384, 128, 41
BOTH = ("attention_output", "ffn2")
TILES = dict.fromkeys(("qkv", "attention_output", "ffn1", "ffn2"), "128x64x64")


def plan_of(quantized: tuple[str, ...] = (), fused: tuple[str, ...] = ()) -> Plan:
    """Return the plan of two layers of the full model's width."""
    return Plan(
        hidden=HIDDEN,
        intermediate=WIDE,
        num_layers=2,
        shallow=False,
        num_heads=12,
        num_tokens=25,
        sep_id=1,
        epsilons=(1e-12,) * 5,
        activation="exact",
        element="float16",
        token_dtype="float16",
        max_pairs=4,
        text_buckets=(15,),
        tiles={"9.0": TILES},
        tuning={},
        kind="int8" if quantized else "",
        quantized=quantized,
        tiles8={"9.0": dict.fromkeys(("qkv", "ffn1", "ffn2"), "64x128x128")} if quantized else {},
        fused={"9.0": fused},
    )


class Bench:
    """Random weights of the first layer on a pretended GPU, which is current."""

    def __init__(self, device: RecordingDevice):
        self.device = device
        self.stream: Stream = self.device.stream()
        self._rng = np.random.default_rng(5)
        self.weights = {}
        for step, num_in in (("attention_output", HIDDEN), ("ffn2", WIDE)):
            weight = self._rng.standard_normal((HIDDEN, num_in)) / np.sqrt(num_in)
            self.weights[weight_name(layer_path(0, step))] = self.held(weight.astype(np.float16))
            self.weights[weight_name(layer_path(0, step), "bias")] = self.vector()
        for part in (ATTENTION_NORM, FFN_NORM):
            for kind in ("weight", "bias"):
                self.weights[weight_name(layer_path(0, part), kind)] = self.vector()

    def held(self, array: np.ndarray) -> Any:
        pinned = self.device.pinned(array.size, array.dtype)
        target = self.device.mirror(pinned)
        pinned.view(array.shape)[...] = array
        self.stream.upload(target, pinned, array.size)
        return target.view(array.shape)

    def vector(self) -> Any:
        return self.held(self._rng.standard_normal(HIDDEN).astype(np.float32))

    def rows(self, num_rows: int, width: int) -> Any:
        return self.held(self._rng.standard_normal((num_rows, width)).astype(np.float16))

    def steps(self, fused: Collection[str], num_pairs: int) -> Steps:
        control = self.held(np.array([0, num_pairs], np.int64))
        library = KernelLibrary(self.device, (9, 0))
        choices = Choices(TILES, {}, fused)
        return Steps(library, plan_of(), self.weights, control, 2, choices)

    def fetched(self, array: Any) -> np.ndarray:
        size = int(np.prod(array.shape))
        (buffer,) = self.device.buffers_at([array.address])
        return buffer.memory[:size].reshape(array.shape).astype(np.float64)


@pytest.mark.parametrize(("number", "width"), [(0, HIDDEN), (1, WIDE)])
@pytest.mark.parametrize("is_cls", [False, True])
def test_a_norm_in_one_kernel_with_its_product_gives_the_same_rows(
    interpreted: Any, number: int, width: int, is_cls: bool
) -> None:
    num_pairs, slots = 3, 1 if is_cls else SLOTS
    device = RecordingDevice(None, kernels=interpreted)
    with device.current():
        bench = Bench(device)
        x = Rows(bench.rows(num_pairs * slots, width))
        residual = bench.rows(num_pairs * SLOTS, HIDDEN)
        update = bench.rows(num_pairs * slots, HIDDEN)
        work = Work(num_pairs, slots, bench.stream)
        found = []
        for fused in (BOTH, ()):
            out = Rows(bench.rows(num_pairs * slots, HIDDEN))
            steps = bench.steps(fused, num_pairs)
            before = bench.fetched(update)
            stride = SLOTS * HIDDEN if is_cls else None
            steps.product_and_norm(number, x, update, residual, out, work, stride)
            found.append(bench.fetched(out.exact))
            assert (bench.fetched(update) == before).all() == bool(fused)
    assert not device.races, device.races
    # The product by itself is rounded before its norm.
    np.testing.assert_allclose(found[0], found[1], rtol=2e-3, atol=4e-3)


def test_only_norms_that_are_16_bit_on_both_sides_go_with_their_product() -> None:
    assert fused_norms(plan_of(), BOTH) == (0, 1, 2, 3)
    assert fused_norms(plan_of(), ("ffn2",)) == (1, 3)
    # The first norm's reader is ffn1, the second's the next layer's qkv.
    assert fused_norms(plan_of(("layers.0.ffn1",)), BOTH) == (1, 2, 3)
    assert fused_norms(plan_of(("layers.1.qkv", "layers.1.ffn2")), BOTH) == (0, 2)


def test_the_report_names_what_runs_in_one_kernel(tmp_path: Path) -> None:
    write_report(tmp_path, plan_of(fused=("ffn2",)))
    text = (tmp_path / "report.json").read_text()
    assert '"step": "ffn2, add and norm",\n    "kernel": "product_norm_float16"' in text
    assert '"step": "ffn2",' not in text
    assert '"step": "attention_output",' in text
