"""Files are written whole or not at all; what closes is closed."""

from __future__ import annotations

from pathlib import Path

import pytest

from edje.files import Closing, rewrite_file


def fail_after(_: object) -> None:
    raise ZeroDivisionError


def test_a_file_is_rewritten_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    with rewrite_file(path) as file:
        file.write(b"old")
    path.chmod(0o640)
    with rewrite_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o640)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_rewritten_stays(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), rewrite_file(path) as file:
        fail_after(file.write(b"half"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_closes_is_closed_at_the_end_of_a_block_that_fails() -> None:
    class Held(Closing):
        is_open = True

        def close(self) -> None:
            self.is_open = False

    held = Held()
    with pytest.raises(ZeroDivisionError), held as entered:
        fail_after(held.is_open)
    assert entered is held
    assert not held.is_open
