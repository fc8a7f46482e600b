"""`STORE/skipped.jsonl`: what gave no record, and why. One line an id, the truth after each run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ...arguments import StrPath
from ...files import Closing, rewrite_file, sync_folder
from .sources import SkippedImage

SKIPPED = "skipped.jsonl"


class SkippedLog(Closing):
    """Lines `{"id", "reason", "source"}`, appended as a run goes and put in order at its end.

    A kill leaves the lines of that run behind those of earlier ones; the next run tries the
    images again and replaces what it finds out.
    """

    def __init__(self, store: Path):
        self._path = store / SKIPPED
        for draft in store.glob(f".{SKIPPED}.*"):  # of a run that was killed
            draft.unlink()
        self._file = self._path.open("a+b")
        self._mend_tail()
        self._start = self._file.tell()
        self.count = 0

    def add(self, skipped: SkippedImage) -> None:
        """Append one line."""
        line = json.dumps(skipped.as_text()._asdict(), ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self.count += 1

    def finish(self, is_stale: Callable[[SkippedImage], bool]) -> None:
        """Rewrite the file: the lines of this run, and the older ones that are not stale.

        A kill in between leaves the file as it was. Without a line there is no file.
        """
        seen: set[str] = set()
        with rewrite_file(self._path) as file:
            for line, is_new in self._lines():
                entry = _parsed(line)
                if entry is None or entry.id in seen or (not is_new and is_stale(entry)):
                    continue
                seen.add(entry.id)
                file.write(line + b"\n")
        if not seen:
            self._path.unlink()
            sync_folder(self._path.parent)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _lines(self) -> Iterator[tuple[bytes, bool]]:
        """Yield every line, and whether this run wrote it: these first."""
        with self._path.open("rb") as file:
            file.seek(self._start)
            for line in file:
                yield line.rstrip(b"\n"), True
            file.seek(0)
            left = self._start
            for line in file:
                left -= len(line)
                if left < 0:
                    return
                yield line.rstrip(b"\n"), False

    def _mend_tail(self) -> None:
        """End a line that a kill has torn."""
        end = self._file.seek(0, os.SEEK_END)
        if end and os.pread(self._file.fileno(), 1, end - 1) != b"\n":
            self._file.write(b"\n")
            self._file.flush()


def read_skipped(store: StrPath) -> list[SkippedImage]:
    """Return what `STORE/skipped.jsonl` holds, a new list; empty where there is no such file."""
    path = Path(store) / SKIPPED
    if not path.exists():
        return []
    entries = (_parsed(line) for line in path.read_bytes().split(b"\n") if line)
    return [entry for entry in entries if entry is not None]


def _parsed(line: bytes) -> SkippedImage | None:
    """Return a line's entry, None for one that is torn or not ours."""
    try:
        values = json.loads(line)
        return SkippedImage(values["id"], values["reason"], values["source"])
    except (ValueError, KeyError, TypeError):
        return None
