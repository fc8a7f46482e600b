"""The benchmark of shallow first stages: what it compares, and what it says of a wrong folder."""

from edje.perf import bench_depths as bench


def test_the_whole_float32_model_alone_is_what_all_ways_are_held_against():
    built = ["fp32-whole", "fp32-2 layers", "int8-whole", "int8-2 layers"]
    names = [way.name for way in bench.ways_of(built)]
    assert names[0] == bench.WHOLE
    assert "int8, whole -> fp32, whole" in names
    assert "int8, 2 layers -> int8, whole -> fp32, whole" in names
    assert names[-1] == "int8, 2 layers -> fp32, whole (recall 0.99)"
    assert len(set(names)) == len(names)


def test_a_folder_that_no_demo_wrote_ends_in_one_sentence(tmp_path, capsys):
    assert bench.main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
