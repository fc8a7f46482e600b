"""`make gpu` without a GPU: what it says, the steps it chooses, the table and the JSON."""

import json
import sys

import pytest

from edje.errors import EdjeError
from edje.perf import gpu_ceilings as ceilings
from edje.perf import gpu_run, gpu_work
from edje.perf.gpu_ceilings import Probe, measure_ceilings, measure_probe
from edje.perf.gpu_run import ceilings_of, chosen_steps, faults_of, result_of, safe_name, summary
from edje.perf.gpu_steps import FAILED, OK, SKIPPED, TIMED_OUT, Report, StepResult
from edje.perf.random_model import full_size

SIZES = full_size()
CEILINGS = [
    {"name": "h2d", "key": "h2d", "unit": "byte/s", "per_s": 55e9, "fault": None},
    {"name": "fp16 large", "key": "fp16", "unit": "flop/s", "per_s": 790e12, "fault": None},
    {"name": "fp8 large", "key": "fp8", "unit": "flop/s", "per_s": None, "fault": "no fp8"},
]


def row(engine="E", via="bare", batch=64, speed=1e5, fault=None, **more):
    compared = {"max_abs_diff": 0.01, "mean_abs_diff": 0.001, "kendall_tau": 0.99}
    found = {"engine": engine, "via": via, "batch": batch, "pairs_per_s": speed, "fault": fault}
    point = {"wordpieces": 12, "slots": 79, "precision": "fp16", "agreement": compared}
    return {**found, **point, **more}


def steps_with(rows, *others):
    return [
        StepResult("ceilings", OK, 9.0, None, {"ceilings": CEILINGS}),
        StepResult("compiled", OK, 9.0, None, {"rows": rows}),
        *others,
    ]


def test_without_a_gpu_it_ends_with_2_and_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(gpu_run, "gpu_fault", lambda: "no NVIDIA driver here")
    assert gpu_run.main([]) == 2
    said = capsys.readouterr()
    assert said.err == "make gpu needs an NVIDIA GPU: no NVIDIA driver here\n"
    assert said.out == ""


def test_steps_are_chosen_by_name_in_their_own_order():
    names = [step.name for step in gpu_work.STEPS]
    assert len(set(names)) == len(names)
    assert [s.name for s in chosen_steps([], [])] == names
    assert [s.name for s in chosen_steps(["eager", "found"], [])] == ["found", "eager"]
    assert [s.name for s in chosen_steps(["eager", "found"], ["found"])] == ["eager"]
    with pytest.raises(EdjeError, match="no such step: nothing, warp") as caught:
        chosen_steps(["warp"], ["nothing"])
    assert "tensorrt-fp16" in caught.value.hint


def test_a_run_survives_its_steps_and_ends_inside_nine_minutes(tmp_path):
    """Real processes, which know no such step."""
    steps = [gpu_work.Step(name, "help", 60, print) for name in ("warp", "weft")]
    results = gpu_run.run_steps(steps, tmp_path, 200)
    assert [(result.name, result.status) for result in results] == [
        ("warp", FAILED), ("weft", FAILED)
    ]  # fmt: skip
    assert results[0].reason.startswith("exit status 1: no such step: warp | Hint: ")
    result = json.loads(json.dumps(result_of(results, SIZES, "none")))
    assert set(result["steps"][0]["values"]["clocks"]) == {"before", "after"}
    assert "weft: failed after" in summary(result)
    late = gpu_run.run_steps(chosen_steps([], []), tmp_path, 1)
    assert {result.status for result in late} == {SKIPPED}
    assert gpu_run.BUDGET_S + gpu_run.MARGIN_S < 9 * 60


def test_the_table_shows_the_best_batch_its_share_and_every_fault():
    rows = [
        row(batch=64, speed=1e5),
        row(batch=256, speed=1.2e5),
        row(via="pipeline", speed=0.9e5, stages_ms=dict.fromkeys(gpu_run.STAGES, 0.25)),
        row("Other", via="", speed=None, fault="OutOfMemoryError: 4096"),
        row("Other", via="", batch=256, speed=None, fault="the same again"),
        row("Late", speed=None, fault="first"), row("Late", batch=8, speed=7.0),
    ]  # fmt: skip
    for failed in rows[3:6]:
        del failed["agreement"]  # nothing was compared
    steps = steps_with(rows, StepResult("rtx-fp8", TIMED_OUT, 100.0, "over its 100 s"))
    result = result_of(steps, SIZES, "NVIDIA H200")
    text = summary(result)
    best = next(line for line in text.splitlines() if "120,000" in line)
    assert f"{1.2e5 * 3.230e9 / 790e12:.1%}" in best
    for said in (
        "0.25 + 0.25 + 0.25 + 0.25",
        "Other, 12 words, batch 64: OutOfMemoryError: 4096",
        "rtx-fp8: timed out after 100 s: over its 100 s",
        "55.0 GB/s",
        "790.0 TFLOP/s",
        "not measured: no fp8",
    ):
        assert said in text
    assert "100,000" not in text
    assert "the same again" not in text
    assert "Late, 12 words" not in text, "any speed comes before a fault"
    assert faults_of(result) == []


def test_the_json_keeps_every_row_with_its_roofs_and_conditions():
    steps = steps_with([row(), row(precision="fp8"), row(precision="fp32")])
    result = json.loads(json.dumps(result_of(steps, SIZES, "NVIDIA H200")))
    assert result["conditions"]["gpu"] == "NVIDIA H200"
    assert safe_name("NVIDIA GeForce RTX 4090 / D (x)") == "nvidia-geforce-rtx-4090-d-x"
    assert "random" in result["conditions"]["data"]
    fp16, fp8, fp32 = result["ladder"]
    assert fp16["roofs"]["product"] == pytest.approx(790e12 / 3.230e9, rel=1e-3)
    assert fp16["share_of_roof"] == pytest.approx(1e5 / fp16["roofs"]["product"])
    assert fp8["share_of_roof"] is None  # its ceiling was not measured
    assert fp32["share_of_roof"] is None
    assert result["steps"][1]["values"] == {}  # rows stand once


def test_what_is_written_has_the_form_of_all_results():
    runs = {"name": "bare", "pairs": 64, "wall_ms": [4.0, 2.0], "cpu_ms": [8.0, 4.0]}
    steps = steps_with([row(**runs), row("Late", speed=None, fault="out of memory")])
    written = json.loads(json.dumps(gpu_run.one_form(result_of(steps, SIZES, "NVIDIA H200"))))
    [entry] = written["benchmarks"]
    assert entry["fullname"] == "gpu::E: bare[wordpieces=12,batch=64]"
    assert entry["extra_info"]["pairs_per_s"] == 32_000.0
    assert entry["extra_info"]["conditions"]["gpu"] == "NVIDIA H200"
    assert entry["extra_info"]["share_of_roof"] > 0
    kept = written["result"]["ladder"]
    assert [one["fault"] for one in kept] == [None, "out of memory"]
    assert "wall_ms" not in kept[0]


def test_failing_tests_and_wrong_scores_fail_the_run():
    wrong = row(speed=None, fault="scores disagree with float32")
    tests = StepResult("tests", OK, 1.0, None, {"failures": ["tests.a::test_b"]})
    lost = StepResult("prepare", FAILED, 1.0, "no disk")
    faults = faults_of(result_of(steps_with([wrong], tests, lost), SIZES, "g"))
    assert faults == [
        "prepare: no disk",
        "tests.a::test_b",
        "E bare, batch 64: scores disagree with float32",
    ]


def test_pytest_counts_come_from_its_report_with_the_output_of_failures():
    junit = """<testsuites><testsuite><testcase classname="a" name="ok"/>
    <testcase classname="a" name="bad"><failure message="no">what it printed</failure></testcase>
    <testcase classname="" name="broken"><error/></testcase>
    <testcase classname="a" name="off"><skipped message="no tensorrt"/></testcase>
    </testsuite></testsuites>"""
    counts = gpu_work.counts_of(junit)
    assert counts == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "skip_reasons": ["no tensorrt"],
        "failures": ["a::bad", "::broken"],
        "failure_texts": {"a::bad": "what it printed", "::broken": ""},
    }
    steps = [StepResult("tests", OK, 1.0, None, counts)]
    text = summary(result_of(steps, SIZES, "g"))
    assert "tests: 1 passed, 2 failed, 1 skipped" in text
    assert "a::bad\nwhat it printed" in text


def test_copies_that_block_fail_the_run_and_latencies_are_said():
    copies = {
        "cuda_core": {"blocks": True, "text": "7.2 GB/s, as with pageable memory", "fault": None},
        "pycuda": {"fault": "pycuda cannot be imported"},
    }
    latency = {"engine": "E", "via": "host", "candidates": 100, "p50_ms": 3.456, "min_ms": 3.1}
    steps = [
        StepResult("found", OK, 1.0, None, {"copies": copies}),
        StepResult("rank", OK, 1.0, None, {"latencies": [latency]}),
    ]
    result = result_of(steps, SIZES, "g")
    assert faults_of(result) == ["cuda_core: 7.2 GB/s, as with pageable memory"]
    text = summary(result)
    assert "copies by pycuda: pycuda cannot be imported" in text
    assert "E, host: 100 candidates, one caller, p50 3.46 ms, least 3.10 ms" in text


def test_ceilings_without_a_library_say_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EdjeError, match="PyTorch measures the ceilings"):
        measure_ceilings(Report(tmp_path / "r", 9))


def test_a_ceiling_is_amount_over_time_and_a_failing_one_has_its_reason():
    def fail():
        raise RuntimeError("no int8 here")

    def timed(run, times):
        return times * run()

    good = measure_probe(Probe("memory", "memory", "byte", 100, lambda: lambda: 0.5), timed)
    bad = measure_probe(Probe("int8", "int8", "flop", 1, fail), timed)
    assert (good["per_s"], good["unit"], good["fault"]) == (200.0, "byte/s", None)
    assert (bad["per_s"], bad["fault"]) == (None, "RuntimeError: no int8 here")
    assert ceilings_of([good, bad]) == {"memory": 200.0}


@pytest.mark.parametrize(
    ("words", "slots", "whole", "cls_only"),
    [(12, 79, 3.470, 3.230), (29, 96, 4.247, 3.953), (61, 128, 5.738, 5.338)],
)
def test_the_work_of_a_pair_is_what_was_worked_out_by_hand(words, slots, whole, cls_only):
    assert ceilings.slots_of(words, SIZES) == slots
    flops = [ceilings.flops_per_pair(slots, SIZES, cls_only=only) / 1e9 for only in (False, True)]
    assert flops == pytest.approx([whole, cls_only], abs=6e-4)
    # 14 hidden + 2 FFN values of two bytes, for each slot of each of 12 layers.
    moved = ceilings.activation_bytes_per_pair(slots, SIZES)
    assert moved == 12 * slots * (14 * 384 + 2 * 1536) * 2
    limits = ceilings.roofs(slots, SIZES, {"fp16": 790e12, "h2d": 55e9})
    assert limits == pytest.approx(
        {"fp16": 790e12 / (cls_only * 1e9), "h2d": 55e9 / 49_152}, rel=1e-3
    )


def test_what_was_found_is_printed():
    values = {
        "gpu": {"name": "NVIDIA H200", "capability": "9.0", "cuda_version": "13.0"},
        "python": "3.12.3",
        "versions": {"torch": "2.11.0", "tensorrt": None},
        "onnxruntime_providers": ["CPUExecutionProvider"],
        "backends": {
            "tensorrt": {"version": None, "precisions": {"fp16": "is not installed"}},
            "tensorrt-rtx": {"version": "1", "precisions": {"fp16": None, "int8": "no"}},
        },
    }
    steps = [StepResult("found", OK, 1.0, None, values)]
    text = summary(result_of(steps, SIZES, "g"))
    assert "NVIDIA H200, compute capability 9.0" in text
    assert "here: torch 2.11.0" in text
    assert "not here: tensorrt" in text
    assert "tensorrt: nothing: is not installed" in text
    assert "tensorrt-rtx: fp16" in text
