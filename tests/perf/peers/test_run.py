"""Peers and our own ways score the same on a small model; the result says who is how fast."""

import json
from shutil import which

import numpy as np
import pytest
import torch

from edje.errors import EdjeError
from edje.perf.peers import contest, roster, run
from edje.perf.report import Measured

LENGTHS = (7, 20)
WHOLE = [one.name for one in roster.on_cpu(1) if "compiled" not in one.name]


def test_everybody_who_computes_our_function_agrees(far_apart, small_model, tmp_path, capsys):
    result = run.run_peers(
        name="peers",
        out=tmp_path / "out",
        only=WHOLE,
        num_rounds=3,
        num_candidates=300,
        wordpieces=LENGTHS,
        bundle=small_model,
    )
    written = json.loads((tmp_path / "out" / "peers.json").read_text())
    assert written == json.loads(json.dumps(result))
    rows = {(row["name"], row["params"]["wordpieces"]): row for row in written["benchmarks"]}
    for name in WHOLE:
        assert (name in written["skipped"]) != all((name, n) in rows for n in LENGTHS), name
    for row in rows.values():
        where, stats = row["extra_info"]["conditions"], row["stats"]
        assert row["extra_info"]["pairs_per_s"] > 0
        assert stats["rounds"] in ((1,) if row["name"] == "blip-online" else range(2, 7))
        if where["function"] == "float32":
            assert where["agreement"]["max_abs_diff"] <= contest.FLOAT32_TOLERANCE
        assert (where["function"] == "other") == (where["agreement"] == {})
    for n in LENGTHS:
        direct = ["onnxruntime-direct-fp32", "onnxruntime-fp32"]
        assert len({rows[name, n]["stats"]["rounds"] for name in direct}) == 1, "compared: as many"
    chosen = rows["auto", 7]["extra_info"]["conditions"]["auto"]
    assert chosen.split()[0] in ("openvino", "onnxruntime")
    table = capsys.readouterr().out
    for (name, _), row in rows.items():
        assert name in table
        assert f"{row['extra_info']['pairs_per_s']:,.1f}" in table
    for name, reason in written["skipped"].items():
        assert f"skipped {name}: {reason}" in table


@pytest.mark.slow
@pytest.mark.skipif(which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_agrees(opened_bench):
    bench, questions = opened_bench(64)
    compiled = [one for one in roster.on_cpu(64) if one.name == "hf-compiled-fp32"]
    measured, skipped = run.measure(compiled, bench, questions, 1)
    assert [one.name for one in measured] == ["hf-compiled-fp32"]
    assert skipped == {}


def contestant(name, scores, function="float32", **more):
    def make(bench):
        if scores is None:
            raise contest.SkippedError("there is none")
        return lambda question, num_pairs: lambda: scores[:num_pairs]

    return contest.Contestant(name, name, 8, make, function, **more)


def test_who_scores_otherwise_stops_the_contest_and_who_is_missing_does_not(opened_bench):
    bench, [question] = opened_bench(8)
    expected = run.official_scores(bench, question)
    good = contestant("good", expected)
    asks, skipped = contest.opened([good, contestant("missing", None)], bench)
    assert skipped == {"missing": "there is none"}
    measured, unable = contest.contest([good], asks, question, expected, num_rounds=4)
    assert (len(measured), unable) == (1, {})
    assert measured[0].params == {"wordpieces": 7}
    assert 2 <= len(measured[0].seconds) <= 4
    wrong = [
        contestant("off", expected + 1e-3),
        contestant("unlike", expected[::-1].copy(), "rounded"),
        contestant("short", expected[:7]),
        contestant("lost", np.full(8, np.nan, np.float32), "other"),
    ]
    asks, _ = contest.opened([good, *wrong], bench)
    with pytest.raises(EdjeError, match="disagree") as caught:
        contest.contest([good, *wrong], asks, question, expected, num_rounds=1)
    named = [fault.partition(":")[0] for fault in caught.value.faults]
    assert named == ["off", "unlike", "short", "lost"]


def test_what_falls_short_is_named():
    def took(name, seconds):
        return Measured(name, contest.GROUP, [seconds], pairs=10, params={"wordpieces": 13})

    ours = contestant("mine", None, kind="ours", rivals=("bare-a", "bare-b", "absent"))
    measured = [took("auto", 1.0), took(roster.OFFICIAL, 2.9), took("mine", 1.0)]
    found = run.ratios([*measured, took("bare-a", 2.0), took("bare-b", 0.9)], [ours])
    assert found["13"]["auto_over"][roster.OFFICIAL] == 2.9
    assert found["13"]["over_library"] == {"mine": {"best_rival": "bare-b", "ratio": 0.9}}
    slow, lost = run.faults_of(found)
    assert f"auto is 2.9 times {roster.OFFICIAL}" in slow
    assert "mine is 0.9 times bare-b, expected 1.0" in lost


def test_a_device_that_is_not_there_is_said(tmp_path):
    with pytest.raises(EdjeError, match="expected cpu or cuda"):
        run.run_peers(name="peers", out=tmp_path, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(EdjeError, match="sees no NVIDIA GPU"):
            run.run_peers(name="peers", out=tmp_path, device="cuda")
    for everybody in (roster.on_cpu(8), roster.on_gpu(8)):
        names = [one.name for one in everybody]
        assert len(set(names)) == len(names)
        assert {rival for one in everybody for rival in one.rivals} <= set(names)


def test_unknown_ids_are_named_with_those_there_are():
    with pytest.raises(EdjeError, match="no peer is called nobody") as caught:
        run.chosen(roster.on_cpu(8), ["auto", "stores", "nobody"])
    assert "hf-official-fp32" in caught.value.hint
