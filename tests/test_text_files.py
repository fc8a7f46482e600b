"""Promises of text files that users write: no byte order mark inside, faults named by line."""

from __future__ import annotations

import codecs
import re
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
