"""The benchmark of shallow first stages: what it compares, and what it says of a wrong folder."""

import numpy as np

from edje.perf import bench_depths as bench
from edje.runtime.store import TokenStore


def test_the_whole_float32_model_alone_is_what_all_ways_are_held_against():
    built = ["fp32-whole", "fp32-2 layers", "int8-whole", "int8-2 layers"]
    names = [way.name for way in bench.ways_of(built)]
    assert names[0] == bench.WHOLE
    assert "int8, whole -> fp32, whole" in names
    assert "int8, 2 layers -> int8, whole -> fp32, whole" in names
    assert names[-1] == "int8, 2 layers -> fp32, whole (recall 0.99)"
    assert len(set(names)) == len(names)


def test_only_what_is_asked_for_runs_beside_the_whole_model():
    ways = bench.ways_of(["fp32-whole", "int8-whole", "int8-1 layers", "int8-2 layers"])
    assert [way.name for way in bench.wanted(ways, [])] == [way.name for way in ways]
    some = [way.name for way in bench.wanted(ways, ["int8, 2 layers -> fp32"])]
    assert some == [bench.WHOLE, "int8, 2 layers -> fp32, whole"]
    by_recall = "int8, 2 layers -> fp32, whole (recall"
    names = [way.name for way in bench.wanted(ways, [by_recall])]
    assert names == [bench.WHOLE, "int8, 2 layers -> fp32, whole (recall 0.99)"]


def test_a_store_is_filled_up_with_noisy_copies(tiny_store, tmp_path):
    made = bench.repeated(tiny_store, tmp_path / "many.store", 30)
    [own], [all_of_it] = list(batches(tiny_store)), list(batches(made))
    assert len(all_of_it.ids) == 30
    assert list(all_of_it.ids[: len(own.ids)]) == list(own.ids)
    assert all_of_it.tokens[: len(own.ids)].tobytes() == own.tokens.tobytes()
    tokens = dict(zip(all_of_it.ids, all_of_it.tokens.astype(np.float32), strict=True))
    name = own.ids[0]
    one, two = (tokens[f"{name}~{number}"] - tokens[name] for number in (1, 2))
    spread = tokens[name].std()
    for noise in (one, two):
        assert 0.005 < noise.std() / spread < 0.05
    assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 0.2


def batches(path):
    with TokenStore.open(path) as store:
        yield from store.iterate()


def test_a_folder_that_no_demo_wrote_ends_in_one_sentence(tmp_path, capsys):
    assert bench.main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
