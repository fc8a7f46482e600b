"""Lists of ids: what a tool wrote around the ids never becomes part of one."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from edje.arguments import listed, read_ids
from edje.errors import RequestError

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("content", [BOM + b"a.png\r\nb.png\r\n", b"a.png\n" + BOM + b"b.png\n"])
def test_a_byte_order_mark_is_no_part_of_an_id(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ids.txt").write_bytes(content)
    assert read_ids(str(tmp_path / "ids.txt")) == ["a.png", "b.png"]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert read_ids("-") == ["a.png", "b.png"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_refused_with_what_makes_it_utf_8(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "ids.txt").write_bytes("a.png\nb.png\n".encode(encoding))
    with pytest.raises(RequestError, match="UTF-8") as caught:
        read_ids(str(tmp_path / "ids.txt"))
    assert "iconv -f UTF-16" in str(caught.value)


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
