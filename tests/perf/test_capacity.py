"""Bounds, plans, and the command that prints them."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf

import pytest
from typer.testing import CliRunner

from edje.errors import EdjeError
from edje.perf import capacity
from edje.perf.capacity import Node, Traffic
from edje.perf.cli import app
from edje.perf.costs import RECORD_BYTES, Cost, StageCosts

NONE = Cost()
NODE = Node(gpus=2)


def stages_of(compute_us=10.0, read_us=0.0):
    compute, read = Cost(per_pair_s=compute_us / 1e6), Cost(per_pair_s=read_us / 1e6)
    return StageCosts(compute, NONE, read, NONE, NONE, NONE)


def bounds_of(place, node=NODE, traffic=None, **given):
    return capacity.node_bounds(node, traffic or Traffic(1e6, 1, 1000), stages_of(**given), place)


def test_each_resource_bounds_a_node_by_its_own_speed():
    found = bounds_of("disk", read_us=20.0)
    size = RECORD_BYTES["float16"]
    assert found["gpu"] == pytest.approx(200_000)
    assert found["cpu"] == pytest.approx(100_000)
    assert found["pcie"] == pytest.approx(2 * NODE.pcie_bytes_per_s / size)
    assert found["disk"] == pytest.approx(NODE.disk_reads_per_s / size)


def test_tokens_on_the_device_need_no_bus_and_no_drive():
    found = bounds_of("device")
    assert found["pcie"] == found["disk"] == inf


def test_the_page_cache_relieves_the_drives():
    half = replace(Traffic(1e6, 1, 1000), cached=0.5)
    assert bounds_of("disk", traffic=half)["disk"] == 2 * bounds_of("disk")["disk"]


def test_few_candidates_cost_the_front_more_a_pair():
    small, large = Traffic(1e6, 1, 10), Traffic(1e6, 1, 10_000)
    assert bounds_of("host", traffic=small)["python"] < bounds_of("host", traffic=large)["python"]


@pytest.mark.parametrize(
    ("traffic", "nodes"),
    [
        (Traffic(1e6, 1, 100), 1),
        (Traffic(1e6, 139, 1000), 1),  # 139 k of 200 k pairs/s: below 70 %
        (Traffic(1e6, 141, 1000), 2),
        (Traffic(20e6, 1, 100), 5),  # 983 GB in 240 GB a node
    ],
)
def test_nodes_are_as_many_as_speed_and_room_ask_for(traffic, nodes):
    found = capacity.need(traffic, NODE, {"device": stages_of()}, "device")
    assert found.nodes == nodes
    assert found.gpus == 2 * nodes
    assert found.busy <= 0.7


def test_the_bottleneck_and_what_comes_after_it_are_named():
    traffic, stages = Traffic(1e6, 1, 1000), {"disk": stages_of(read_us=9.0)}
    found = capacity.need(traffic, NODE, stages, "disk")
    assert (found.bottleneck, found.next_bottleneck) == ("gpu", "cpu")
    slow = replace(NODE, disk_reads_per_s=1e9)
    assert capacity.need(traffic, slow, stages, "disk").bottleneck == "disk"


def test_all_faults_of_a_load_are_named_at_once():
    with pytest.raises(EdjeError) as caught:
        Traffic(-1, 0, 10, dtype="fp4", cached=2, most_busy=1).check()
    assert len(caught.value.faults) == 5


def test_a_load_beyond_all_nodes_is_refused():
    with pytest.raises(EdjeError, match="nodes and more are needed"):
        capacity.need(Traffic(1e15, 1, 1), NODE, {"disk": stages_of()}, "disk")


def run(*words):
    return CliRunner().invoke(app, ["capacity", *map(str, words)])


def test_the_command_says_what_each_place_needs():
    done = run("--images", "100e6", "--queries", 500)
    assert done.exit_code == 0, done.output
    assert "500 k pairs/s, 4,915 GB of float16 tokens" in done.output
    assert [place for place in capacity.PLACES if place in done.output] == [*capacity.PLACES]


def test_costs_given_on_the_command_line_count_instead():
    slow = run("--queries", 500, "--compute-us", 100, "--place", "device", "--gpus", 1)
    assert "72" in slow.output  # 500 k pairs/s at 7 k a GPU


def test_costs_come_from_a_result_of_bench_run(tmp_path):
    stages = {"read": (64, 64e-6), "forward": (64, 640e-6), "enqueue": (64, 700e-6)}
    entries = [
        {"name": name, "group": "stages", "params": {}, "extra_info": {"pairs": pairs}}
        | {"stats": {"min": seconds}}
        for name, (pairs, seconds) in stages.items()
    ]
    path = tmp_path / "stages.json"
    path.write_text(json.dumps({"benchmarks": entries}))
    done = run("--stages", path, "--gpus", 1, "--place", "host")
    assert done.exit_code == 0, done.output
    assert "100 k" in done.output  # 10 us a pair


@pytest.mark.parametrize("content", ["{", "[]", '{"benchmarks": [{"name": "read"}]}'])
def test_a_file_without_stages_is_refused(tmp_path, content):
    path = tmp_path / "stages.json"
    path.write_text(content)
    done = run("--stages", path)
    assert isinstance(done.exception, EdjeError)
    assert "edje bench run" in done.exception.hint
