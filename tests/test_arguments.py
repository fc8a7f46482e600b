"""What callers and files hand in: taken once, checked, text without marks, faults together."""

from __future__ import annotations

import codecs
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edje.arguments import (
    Arguments,
    decode_text,
    listed,
    path_of,
    read_fields,
    read_ids,
    read_text,
    shown,
)
from edje.errors import RequestError

WAYS: dict[str, Callable[[list[str]], Iterable[str]]] = {
    "tuple": tuple,
    "iterator": iter,
    "generator": lambda values: (value for value in values),
    "map": lambda values: map(str, values),
    "filter": lambda values: filter(lambda _: True, values),
    "keys of a dict": lambda values: dict.fromkeys(values).keys(),
    "values of a dict": lambda values: dict(enumerate(values)).values(),
    "array": lambda values: np.array(values, dtype="<U20"),
    "object array": lambda values: np.array(values, dtype=object),
}


class PathLike:
    """What `os.fspath` takes and is neither text nor a Path."""

    def __init__(self, path: str | bytes):
        self.path = path

    def __fspath__(self) -> Any:
        return self.path


@pytest.mark.parametrize("way", WAYS)
@given(st.lists(st.text(st.characters(codec="ascii", exclude_characters="\0")), unique=True))
def test_every_iterable_gives_its_strings_once_and_in_order(way: str, values: list[str]) -> None:
    arguments = Arguments("a call")
    values = [f"<{value[:8]}{number}>" for number, value in enumerate(values)]
    found = arguments.strings("ids", WAYS[way](values))
    assert (found, arguments.faults) == (values, [])
    assert {type(name) for name in found} <= {str}


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ("cd", "ids: got the string 'cd', expected a list of ids"),
        (b"cd", "ids: got the bytes \"b'cd'\", expected a list of ids"),
        (Path("cd"), "ids: got the PosixPath 'cd', expected a list of ids"),
        ({"a": 1}, "ids: got a dict, expected a list of ids: its keys() or values()"),
        (3, "ids is 3, expected a list of ids"),
        (["a", 3, None, b"x"], "3 ids are not strings: 3, None, b'x'"),
        (np.array([["a", "b"]]), "1 ids are not strings: an object of type ndarray"),
    ],
)
def test_what_is_no_list_of_strings_is_one_sentence(values: object, fault: str) -> None:
    arguments = Arguments("a call")
    arguments.strings("ids", values)
    assert arguments.faults == [fault]
    with pytest.raises(RequestError) as caught:
        arguments.check()
    assert str(caught.value) == fault


def test_a_set_has_no_order_for_what_lies_beside_it() -> None:
    arguments = Arguments("a call")
    assert sorted(arguments.items("ids", {"b", "a"}, "a list")) == ["a", "b"]
    arguments.items("ids", {"b", "a"}, "a list", paired=True)
    assert arguments.faults == [
        "ids is an object of type set, expected a list in the order of what belongs to them"
    ]


@pytest.mark.parametrize("value", [1, np.int8(1), np.uint64(1), np.int32(1)])
def test_whole_numbers_of_python_and_numpy_are_taken(value: Any) -> None:
    arguments = Arguments("a call")
    found = arguments.whole("top_k", value, "1 or more")
    assert (found, type(found), arguments.faults) == (1, int, [])


@pytest.mark.parametrize("value", ["3", 2.0, True, np.True_, np.float32(2), None, [1], 0, -1, 1j])
def test_what_is_no_whole_number_is_refused(value: object) -> None:
    arguments = Arguments("a call")
    arguments.whole("top_k", value, "1 or more")
    assert arguments.faults == [f"top_k is {shown(value)}, expected 1 or more"]


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.5), np.int64(3)])
def test_numbers_are_taken(value: Any) -> None:
    arguments = Arguments("a call")
    assert arguments.number("timeout_s", value, "0 or more") == float(value)
    assert arguments.faults == []


@pytest.mark.parametrize("value", ["1", True, None, float("nan"), -0.1, float("inf"), [1], 1j])
def test_what_is_no_number_is_refused(value: object) -> None:
    arguments = Arguments("a call")
    arguments.number("timeout_s", value, "0 or more")
    assert arguments.faults == [f"timeout_s is {shown(value)}, expected 0 or more"]


@pytest.mark.parametrize("value", [float("inf"), 10**400])
def test_infinity_is_taken_where_it_means_something(value: float) -> None:
    arguments = Arguments("a call")
    assert arguments.number("timeout_s", value, "0 or more", finite=False) == float("inf")
    assert arguments.faults == []


def test_all_faults_come_together() -> None:
    arguments = Arguments("rank")
    arguments.text("query", b"red")
    arguments.flag("graphs", 1)
    arguments.choice("missing", "skipp", ("error", "skip"))
    arguments.callback("cancelled", 3)
    arguments.settings("settings", {"a": 1, 2: "b"})
    arguments.path("store", 3)
    with pytest.raises(RequestError, match="rank cannot be called so") as caught:
        arguments.check()
    assert caught.value.faults == (
        "query is b'red', expected a string",
        "graphs is 1, expected True or False",
        'missing is \'skipp\', expected "error" or "skip"',
        "cancelled is 3, expected a function or None",
        "settings: 'a' is 1, expected strings",
        "settings: 2 is 'b', expected strings",
        "store is 3, expected a path",
    )


@pytest.mark.parametrize("path", ["a/b", Path("a/b"), PathLike("a/b")])
def test_paths_are_taken_as_text_and_as_paths(path: str | os.PathLike[str]) -> None:
    assert path_of("store", path) == Path("a/b")


@pytest.mark.parametrize("path", [b"a/b", PathLike(b"a/b"), 3, None, ["a"]])
def test_what_is_no_path_is_refused(path: object) -> None:
    with pytest.raises(RequestError, match=r"store is .*, expected a path"):
        path_of("store", path)


def test_a_large_value_is_not_written_out() -> None:
    assert len(shown("x" * 10_000)) == 80
    assert shown(list(range(10_000))) == "an object of type list"


@dataclass(frozen=True)
class Part:
    name: str
    share: float
    limit: int | None


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    size: tuple[int, int]
    named: Mapping[str, Part]
    rest: Mapping[str, Any]


PART = {"name": "a", "share": 1, "limit": None}
WHOLE = {"parts": [PART], "size": [2, 3], "named": {"b": PART}, "rest": {"any": [True]}}


def test_a_json_object_becomes_a_dataclass_with_all_inside() -> None:
    faults: list[str] = []
    part = Part("a", 1, None)
    found = read_fields(Whole, WHOLE, "", faults)
    assert found == Whole((part,), (2, 3), {"b": part}, {"any": [True]})
    assert faults == []


def test_all_faults_of_a_json_object_are_named_with_their_place() -> None:
    faults: list[str] = []
    part = {"name": True, "share": "1", "limt": 3}
    values = {"parts": [PART, part], "size": [2], "named": {"b": 3}, "extra": 1}
    assert read_fields(Whole, values, "plan", faults) is None
    assert set(faults) == {
        "plan.rest: missing",
        "plan.extra: unknown field",
        "plan.parts[1].limit: missing",
        "plan.parts[1].limt: unknown field",
        "plan.parts[1].name: got True, expected str",
        "plan.parts[1].share: got '1', expected float",
        "plan.size: got 1 values, expected 2",
        "plan.named.b: expected an object, got int",
    }
    assert read_fields(Whole, [], "plan", faults) is None
    assert faults[-1] == "plan: expected an object, got list"


MARK = codecs.BOM_UTF8
LINES = st.lists(st.text(st.characters(exclude_characters="\0\n\ufeff", codec="utf-8")), max_size=5)


@given(st.lists(LINES, min_size=1, max_size=3))
def test_files_with_marks_joined_by_cat_are_the_text_without_marks(files: list[list[str]]) -> None:
    plain = "".join(f"{line}\n" for lines in files for line in lines)
    marked = b"".join(MARK + "".join(f"{line}\n" for line in lines).encode() for lines in files)
    assert decode_text(marked, "x") == plain


def test_bytes_that_are_no_text_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"a.png\nb.png\ncaf\xe9.png\n")
    with pytest.raises(RequestError, match=r"list\.txt is not UTF-8 text: line 3 .*0xe9"):
        read_text(path)


WIDE = {
    "UTF-16": (codecs.BOM_UTF16_LE, "utf-16-le"),
    "UTF-16 ": (codecs.BOM_UTF16_BE, "utf-16-be"),
    "UTF-16LE": (b"", "utf-16-le"),
    "UTF-16BE": (b"", "utf-16-be"),
    "UTF-32": (codecs.BOM_UTF32_LE, "utf-32-le"),
    "UTF-32 ": (codecs.BOM_UTF32_BE, "utf-32-be"),
    "UTF-32LE": (b"", "utf-32-le"),
    "UTF-32BE": (b"", "utf-32-be"),
}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("text", ["a.png\n", "a.png\nb.png\n日本.png\n"])
def test_wide_text_is_refused_with_the_command_that_mends_it(name: str, text: str) -> None:
    mark, encoding = WIDE[name]
    with pytest.raises(RequestError, match=r"line 1 holds") as caught:
        decode_text(mark + text.encode(encoding), "list")
    told = re.search(r"iconv -f (\S+) -t UTF-8", str(caught.value))
    assert told is not None
    assert told[1] == name.strip()
    assert (mark + text.encode(encoding)).decode(told[1]).lstrip("\ufeff") == text


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(RequestError, match=f"cannot read {path}: "):
            read_text(str(path))


@pytest.mark.parametrize("content", [MARK + b"a.png\r\nb.png\r\n", b"a.png\n" + MARK + b"b.png\n"])
def test_a_byte_order_mark_is_no_part_of_an_id(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ids.txt").write_bytes(content)
    assert read_ids(str(tmp_path / "ids.txt")) == ["a.png", "b.png"]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert read_ids("-") == ["a.png", "b.png"]


def test_what_is_listed_is_read_back(tmp_path: Path) -> None:
    ids = ["a.png", " b.png", "deep/é.png", "mid\ufeffdle.png"]
    (tmp_path / "ids.txt").write_text(listed(ids), encoding="utf-8")
    assert read_ids(str(tmp_path / "ids.txt")) == ids


@pytest.mark.parametrize("bad", ["a\nb", "a\r", " ", "\ufeffa"])
def test_an_id_that_a_line_would_change_is_not_listed(bad: str) -> None:
    with pytest.raises(RequestError, match="1 ids cannot stand on a line"):
        listed(["good", bad])


def test_a_closed_stdin_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(RequestError, match=r"cannot read the candidates from stdin.*closed"):
        read_ids("-", what="candidates")
