"""Promises of text files that users write: no byte order mark inside, faults named by line."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edje.arguments import decode_text, read_text
from edje.errors import RequestError

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


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_refused_with_the_command_that_mends_it(encoding: str) -> None:
    with pytest.raises(RequestError, match=r"line 1 .*\n.*iconv -f UTF-16"):
        decode_text("a.png\n".encode(encoding), "list")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(RequestError, match=f"cannot read {path}: "):
            read_text(str(path))
