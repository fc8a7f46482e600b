"""Charts say what the results say: names, figures, roofs and conditions stand in the SVG."""

from __future__ import annotations

import re

import pytest

from edje.perf.charts import (
    Bar,
    Panel,
    draw_contest,
    draw_depths,
    draw_load,
    draw_stages,
    draw_sweep,
)
from edje.perf.report import Measured, benchmark_json


def text_of(path):
    return re.sub(r"\s+", " ", path.read_text(encoding="utf-8"))


@pytest.fixture
def stages():
    runs = [
        Measured("read", "stages", [0.001], pairs=100, share_of_roof=0.5),
        Measured("rank", "stages", [0.2], pairs=100),
        Measured("memcpy", "roof", [0.1]),
    ]
    return benchmark_json(runs, conditions={"engine": "openvino int8", "candidates": 100})


def test_stages_have_their_cost_and_their_share(stages, tmp_path):
    shown = text_of(draw_stages(stages, tmp_path / "new" / "stages.svg"))
    for said in ("read", "rank", "10.00 (50% of its roof)", "2,000.00", "engine openvino int8"):
        assert said in shown.replace("  ", " "), said
    assert "memcpy" not in shown


def test_a_sweep_has_every_value_and_the_roof(tmp_path):
    runs = [
        Measured(
            "forward", "stages", [0.1 * n], pairs=10 * n, params={"batch": n}, share_of_roof=0.5
        )
        for n in (1, 8, 256)
    ]
    result = {**benchmark_json(runs), "swept": "batch"}
    shown = text_of(draw_sweep(result, tmp_path / "batch.svg"))
    assert all(f">{said}<" in shown for said in ("batch", "256", "forward", "roof: forward"))


def test_load_has_both_percentiles_and_the_clients(tmp_path):
    runs = [
        Measured("serve", "load", [0.1] * n, pairs=10, params={"clients": n}, elapsed_s=1.0)
        for n in (1, 64)
    ]
    shown = text_of(draw_load(benchmark_json(runs), tmp_path / "load.svg"))
    assert all(f">{said}<" in shown for said in ("p50", "p99", "64"))
    assert draw_load(benchmark_json(runs), tmp_path / "load.png").read_bytes()[1:4] == b"PNG"


def test_a_contest_tells_multiples_of_its_base_and_is_the_same_every_time(tmp_path):
    bars = [Bar("we", 120.0, "ours"), Bar("bare", 90.0, "library"), Bar("official", 10.0)]
    panels = [Panel("a machine", bars, "official", 500.0, "products alone:")]
    path = draw_contest(panels, "conditions below", tmp_path / "a.svg", "what it shows")
    shown = text_of(path)
    for said in ("a machine", "120 (12.0x)", "products alone: 500", "conditions below"):
        assert said in shown.replace("  ", " "), said
    assert "what it shows" in shown
    again = draw_contest(panels, "conditions below", tmp_path / "b.svg", "what it shows")
    assert again.read_bytes() == path.read_bytes()


def test_depths_have_a_line_a_number_of_candidates_and_the_agreement(tmp_path):
    def way(name, candidates, engines, layers, seconds, others):
        return Measured(
            name,
            "depths",
            [seconds] * 4,
            candidates,
            {"candidates": candidates, "engines": engines, "first": "int8", "layers": layers},
            counters={"other_top_10": others, "other_first": 0},
            conditions={"survivors": "all"},
        )

    first = benchmark_json([way("a", 50, 1, 6, 0.1, 0), way("b", 50, 2, 4, 0.2, 1)])
    second = benchmark_json(
        [way("a", 1000, 1, 6, 1.0, 0), way("b", 1000, 2, 4, 0.5, 0), way("c", 1000, 3, 4, 0.4, 2)]
    )
    shown = text_of(draw_depths([first, second], tmp_path / "depths.svg"))
    lines = (
        "50 candidates, int8 first",
        "1,000 candidates, int8 first",
        "50 candidates, int8 alone",
    )
    for said in (*lines, "6 (whole)", ">0.75<", ">1<"):
        assert said in shown, said
    assert ">0.5<" not in shown  # three engines in a row are no point of these lines
