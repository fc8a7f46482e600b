"""What a store is handed: any iterable once, nothing of a wrong kind, nothing that is no number."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.errors import EdjeError, RequestError, StoreError
from edje.runtime.store import SegmentWriter, StoreLayout, TokenStore, incoming_name
from edje.runtime.store.records import nonfinite_records
from edje.runtime.store.shards import export_store, import_store

SIZES = {"num_tokens": 2, "hidden": 4, "fingerprint_encoder": "sha256:tower"}
ONE_SHOT: list[Callable[[list[str]], Iterable[str]]] = [
    iter,
    lambda ids: (name for name in ids),
    lambda ids: map(str, ids),
    lambda ids: filter(None, ids),
    lambda ids: dict.fromkeys(ids).keys(),
    np.array,
]
WRONG: list[Any] = ["cd", b"cd", Path("cd"), {"c": 1, "d": 2}, 2]


def tokens_of(*values: float) -> np.ndarray:
    """Float16 [N, 2, 4], each record all of one value."""
    return np.broadcast_to(np.array(values, np.float16)[:, None, None], (len(values), 2, 4)).copy()


def first_values(store: TokenStore, ids: Iterable[str]) -> list[float]:
    rows = store.rows(ids)
    out = np.empty((len(rows), 2, 4), np.float16)
    store.read(rows, out)
    return out[:, 0, 0].tolist()


@pytest.fixture
def store(tmp_path: Path) -> Iterable[TokenStore]:
    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        store.append(["a", "b"], tokens_of(1, 2))
        yield store


@pytest.mark.parametrize("one_shot", ONE_SHOT)
def test_every_method_takes_any_iterable_once(store: TokenStore, one_shot: Any) -> None:
    store.append(one_shot(["c", "d", "e"]), tokens_of(3, 4, 5))
    store.replace(one_shot(["d", "c"]), tokens_of(40, 30))
    store.delete(one_shot(["a", "e"]))
    assert store.ids() == ["b", "d", "c"]
    assert {type(name) for name in store.ids()} == {str}
    assert first_values(store, one_shot(["c", "b", "d"])) == [30, 2, 40]


@pytest.mark.parametrize("one_shot", ONE_SHOT)
def test_segments_take_any_iterable_of_ids_and_the_store_of_paths(
    store: TokenStore, one_shot: Any
) -> None:
    paths = [f"{store.path}/incoming/{incoming_name('task')}" for _ in range(2)]
    for path, name in zip(paths, "cd", strict=True):
        with SegmentWriter(path, store.layout) as segment:
            segment.append(one_shot([name]), tokens_of(ord(name)))
    assert store.commit_segments(one_shot(paths)).num_added == 2
    assert first_values(store, ["c", "d"]) == [ord("c"), ord("d")]


def test_rows_are_taken_from_any_iterable(store: TokenStore) -> None:
    rows = store.rows(["b", "a"])
    for given_rows in (rows.tolist(), iter(rows), tuple(rows), map(int, rows)):
        out = np.zeros((2, 2, 4), np.float16)
        store.prefetch(rows.tolist())
        store.read(given_rows, out)
        assert out[:, 0, 0].tolist() == [2, 1]
    assert np.array_equal(store.checksums(iter(rows)), store.checksums(rows))
    assert store.read([], np.empty((0, 2, 4), np.float16)) == []


@pytest.mark.parametrize("rows", ["12", {1: 2}, 3, [1.0], ["1"], [True], [None], [1 << 70], [-1]])
def test_rows_that_are_none_are_refused(store: TokenStore, rows: Any) -> None:
    for call in (
        lambda: store.read(rows, np.zeros((1, 2, 4), np.float16)),
        lambda: store.prefetch(rows),
        lambda: store.checksums(rows),
    ):
        with pytest.raises(RequestError, match="rows"):
            call()


@pytest.mark.parametrize("ids", WRONG)
def test_a_lone_string_and_its_like_are_no_lists_of_ids(store: TokenStore, ids: Any) -> None:
    with SegmentWriter(store.path / "incoming/x.tokens", store.layout) as segment:
        for call in (
            lambda: store.rows(ids),
            lambda: store.append(ids, tokens_of(3, 4)),
            lambda: store.replace(ids, tokens_of(3, 4)),
            lambda: store.delete(ids),
            lambda: store.commit_segments(ids),
            lambda: segment.append(ids, tokens_of(3, 4)),
        ):
            with pytest.raises(RequestError, match="expected a list"):
                call()
    assert store.ids() == ["a", "b"]
    assert store.stat().generation == 1


def test_a_set_of_ids_does_not_say_which_tokens_are_whose(store: TokenStore) -> None:
    for change in (store.append, store.replace):
        with pytest.raises(RequestError, match="in the order of what belongs to them"):
            change({"c", "d"}, tokens_of(3, 4))
    store.delete({"a", "b"})
    assert len(store) == 0


def test_all_faults_of_new_records_come_together(store: TokenStore) -> None:
    with pytest.raises(RequestError) as kinds:
        store.append("cd", [[1.0]], scales="x", allow_nonfinite="yes")  # type: ignore[arg-type]
    assert len(kinds.value.faults) == 4
    with pytest.raises(StoreError) as values:
        store.append(["c", 3, ["d"], ""], tokens_of(1, 2))  # type: ignore[list-item]
    assert len(values.value.faults) == 2
    assert "tokens: got float16 [2, 2, 4], expected float16 [4, 2, 4]" in values.value.faults
    assert "3 are no ids" in str(values.value)
    with pytest.raises(StoreError) as odd:
        store.append(["a", "c", "c"], tokens_of(1, np.nan, np.inf))
    assert [fault.split(" ", 1)[1].split(":")[0] for fault in odd.value.faults] == [
        "records hold NaN or infinity",
        "ids come twice",
        "id is in the store already",
    ]
    with (
        SegmentWriter(store.path / "incoming/x.tokens", store.layout) as segment,
        pytest.raises(StoreError) as segments,
    ):
        segment.append(["c", ["d"]], tokens_of(1, np.nan))  # type: ignore[list-item]
    assert len(segments.value.faults) == 2


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_tokens_that_are_not_finite_stay_out_until_a_flag_lets_them_in(
    tmp_path: Path, dtype: str, value: float
) -> None:
    tokens = tokens_of(1, 2, 3)
    tokens[1, -1, -1] = value
    with TokenStore.create(tmp_path / "s", **SIZES, dtype=dtype) as store:
        segment = SegmentWriter(store.path / "incoming/x.tokens", store.layout)
        store.append(["old"], tokens_of(9))
        for add, ids in (
            (store.append, ["a", "b", "c"]),
            (segment.append, ["a", "b", "c"]),
        ):
            with pytest.raises(StoreError, match="1 records hold NaN or infinity: 'b'"):
                add(ids, tokens)
        with pytest.raises(StoreError, match="hold NaN or infinity: 'old'"):
            store.replace(["old"], tokens[1:2])
        assert store.ids() == ["old"]
        store.append(["a", "b", "c"], tokens, allow_nonfinite=True)
        store.replace(["old"], tokens[1:2], allow_nonfinite=True)
        segment.append(["d"], tokens[1:2], allow_nonfinite=True)
        store.commit_segments([str(segment.close())])
        assert len(store) == 5


def test_scales_that_are_not_finite_stay_out(tmp_path: Path) -> None:
    values, scales = np.ones((2, 2, 4), np.int8), np.ones((2, 2), np.float16)
    scales[1, 1] = np.inf
    with TokenStore.create(tmp_path / "s", **SIZES, dtype="int8") as store:
        with pytest.raises(StoreError, match="hold NaN or infinity: 'b'"):
            store.append(["a", "b"], values, scales)
        store.append(["a", "b"], values, scales, allow_nonfinite=True)


@pytest.mark.parametrize(
    ("value", "scale", "fits"), [(127, 516, False), (-128, 511.5, True), (1, 65504, True)]
)
def test_scaled_values_that_overflow_float16_stay_out(
    tmp_path: Path, value: int, scale: float, fits: bool
) -> None:
    values, scales = np.ones((2, 2, 4), np.int8), np.ones((2, 2), np.float16)
    values[1, 1, 2], scales[1, 1] = value, scale
    with TokenStore.create(tmp_path / "s", **SIZES, dtype="int8") as store:
        if not fits:
            with pytest.raises(StoreError, match="hold NaN or infinity: 'b'"):
                store.append(["a", "b"], values, scales)
        store.append(["a", "b"], values, scales, allow_nonfinite=not fits)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 0xFFFF), min_size=6, max_size=48), st.integers(1, 3))
def test_nonfinite_records_are_those_that_numpy_finds(bits: list[int], width: int) -> None:
    values = np.array(bits[: len(bits) // width * width], np.uint16).view(np.float16)
    values = values.reshape(-1, width)
    expected = np.flatnonzero(~np.isfinite(values).all(axis=1))
    assert np.array_equal(nonfinite_records(values), expected)
    assert np.array_equal(nonfinite_records(values[::-1]), len(values) - 1 - expected[::-1])


def test_an_import_leaves_out_what_is_not_finite_names_it_and_takes_the_rest(
    tmp_path: Path,
) -> None:
    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        store.append(["a", "odd", "c"], tokens_of(1, np.nan, 3), allow_nonfinite=True)
        export_store(store, str(tmp_path / "shards"))
    with pytest.raises(StoreError, match="'odd' is not finite") as caught:
        import_store(str(tmp_path / "shards"), str(tmp_path / "t"))
    assert "--allow-nonfinite" in str(caught.value)
    with TokenStore.open(tmp_path / "t") as target:
        assert target.ids() == ["a", "c"]
    report = import_store(tmp_path / "shards", tmp_path / "t", allow_nonfinite=True)
    assert (report.num_added, report.num_present) == (1, 2)


def test_unknown_ids_are_marked_where_that_is_asked_for(store: TokenStore) -> None:
    rows = store.rows(iter(["ghost", "b", "ghost"]), missing="mark")
    assert rows.tolist() == [-1, store.rows(["b"])[0], -1]
    with pytest.raises(RequestError, match="2 of 3 ids are not in the store"):
        store.rows(iter(["ghost", "b", "ghost"]))


def calls(store: TokenStore) -> dict[str, Callable[[], object]]:
    """Every method of an open store, by its name."""
    rows = store.rows(["a"])
    out = np.empty((1, 2, 4), np.float16)
    return {
        "rows": lambda: store.rows(["a"]),
        "live_rows": store.live_rows,
        "digests": store.digests,
        "read": lambda: store.read(rows, out),
        "prefetch": lambda: store.prefetch(rows),
        "iterate": store.iterate,
        "checksums": lambda: store.checksums(rows),
        "ids": store.ids,
        "ids_of": lambda: store.ids_of(rows),
        "load_into_memory": store.load_into_memory,
        "append": lambda: store.append(["z"], tokens_of(1)),
        "replace": lambda: store.replace(["a"], tokens_of(1)),
        "delete": lambda: store.delete(["a"]),
        "commit_segments": lambda: store.commit_segments([]),
        "compact": store.compact,
        "verify": store.verify,
        "stat": store.stat,
        "len": lambda: len(store),
        "in": lambda: "a" in store,
    }


@pytest.mark.parametrize("mode", ["r", "a"])
def test_a_closed_store_refuses_everything(store: TokenStore, mode: Any) -> None:
    store.close()
    again = TokenStore.open(store.path, mode=mode)
    methods = calls(again)
    public = {name for name in dir(TokenStore) if not name.startswith("_")}
    constant = {"create", "open", "close", "record_shape", "fingerprint_encoder", "writable"}
    assert public - constant == methods.keys() - {"len", "in"}, "a method without a call here"
    again.close()
    again.close()
    for name, call in methods.items():
        with pytest.raises(StoreError, match=r"is closed|not open for changes"):
            pytest.fail(f"{name} gave {call()!r}")
    assert again.record_shape == (2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda store: TokenStore.open(3), "path is 3, expected a path"),
        (lambda store: TokenStore.open(b"s"), "path is b's', expected a path"),
        (lambda store: TokenStore.open(store.path, mode=1), "mode is 1"),
        (lambda store: TokenStore.open(store.path, mode="w", access=0), "access is 0"),
        (lambda store: TokenStore.open(store.path, access="mapped"), "access is 'mapped'"),
        (lambda store: TokenStore.open(store.path, mode="a", access="resident"), 'mode "r"'),
        (lambda store: TokenStore.create(3, **SIZES), "path is 3, expected a path"),
        (lambda store: TokenStore.create(store.path / "x", **{**SIZES, "hidden": "4"}), "hidden"),
        (lambda store: TokenStore.create(store.path / "x", **{**SIZES, "hidden": True}), "hidden"),
        (lambda store: store.append(["c"], [[1.0]]), "tokens is an object of type list"),
        (lambda store: store.append(["c"], None), "tokens is None, expected a NumPy array"),
        (lambda store: store.read([], "out"), "out is 'out', expected a NumPy array"),
        (lambda store: store.read([], np.empty((0, 2, 4), np.float16), bad="skip"), "bad is"),
        (lambda store: store.rows(["a", 3, None]), "2 ids are not strings: 3, None"),
        (lambda store: store.rows(["a"], missing="skip"), "missing is 'skip'"),
        (lambda store: store.iterate("4"), "batch_size is '4'"),
        (lambda store: store.iterate(0), "batch_size is 0"),
        (lambda store: store.compact("0.5"), "max_dead_share is '0.5'"),
        (lambda store: store.compact(-0.1), "max_dead_share is -0.1"),
        (lambda store: store.compact(1), "max_dead_share is 1"),
        (lambda store: store.compact(float("nan")), "max_dead_share is nan"),
        (lambda store: store.commit_segments([3, None]), "a path is None"),
        (lambda store: StoreLayout.read(3), "folder is 3"),
        (lambda store: SegmentWriter(3, "layout"), "layout is 'layout', expected a StoreLayout"),
    ],
)
def test_arguments_of_another_kind_are_named(store: TokenStore, call: Any, message: str) -> None:
    with pytest.raises(EdjeError) as caught:
        call(store)
    assert message in str(caught.value)


def test_sizes_may_be_numbers_of_numpy(tmp_path: Path) -> None:
    sizes = {"num_tokens": np.int32(2), "hidden": np.int64(4), "segment_bytes": np.uint64(1 << 20)}
    with TokenStore.create(tmp_path / "s", fingerprint_encoder="x", **sizes) as store:  # type: ignore[arg-type]
        store.append(["a"], tokens_of(1))
    assert StoreLayout.read(tmp_path / "s").hidden == 4


class PathLike:
    """A path that is neither text nor a `Path`."""

    def __init__(self, path: Path):
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.mark.parametrize("kind", [str, Path, PathLike])
def test_paths_are_text_or_paths_everywhere(tmp_path: Path, kind: Any) -> None:
    def at(name: str) -> Any:
        return kind(tmp_path / name)

    with TokenStore.create(at("s"), **SIZES) as store:
        with SegmentWriter(at("s/incoming/1.tokens"), StoreLayout.read(at("s"))) as segment:
            segment.append(["a"], tokens_of(1))
        store.commit_segments([at("s/incoming/1.tokens")])
    with TokenStore.open(at("s")) as store:
        export_store(store, at("shards"))
    assert import_store(at("shards"), at("t")).num_added == 1
    assert os.listdir(tmp_path / "t/segments") == ["000001.tokens"]
