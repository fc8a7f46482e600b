"""`verify`: every byte of a store against what is known of it; `--repair`: mend what can be mended.

What is known twice is mended from the other copy: `store.json`, header pages, footers, rows of the
catalog. A record is known once: a damaged one is taken out, so that indexing makes it anew.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...arguments import Progress
from ...errors import StoreError
from .format import CATALOG, SEGMENTS, STORE_JSON, StoreLayout
from .pins import Pin
from .read import BadRecord
from .store import TokenStore
from .structure import Structure, inspect
from .writer import lock_writer

BATCH_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify_store` found, and with `repair` what it did.

    Attributes:
        num_records: live records when it was done.
        num_checked: records whose bytes were compared with their checksum; `read_bytes` of them.
        damaged: records that are not whole; after a repair they are no longer in the store.
        faults: other damage, in words.
        repaired: what was mended, in words.
        leftovers: files that the store does not need; they do no harm.
        is_clean: no damage, or all of it was mended.
    """

    path: str
    num_records: int
    num_segments: int
    num_checked: int
    read_bytes: int
    seconds: float
    damaged: tuple[BadRecord, ...]
    faults: tuple[str, ...]
    repaired: tuple[str, ...]
    leftovers: tuple[str, ...]
    is_clean: bool

    @property
    def bad(self) -> tuple[str, ...]:
        """The ids of the damaged records."""
        return tuple(record.id for record in self.damaged)

    @property
    def bytes_per_s(self) -> float:
        """How fast records were read and compared, together with everything else."""
        return self.read_bytes / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        damaged = [str(record) for record in self.damaged]
        values = {**asdict(self), "bytes_per_s": self.bytes_per_s}
        return {**values, "damaged": damaged, "bad": list(self.bad)}


def verify_store(
    path: str | os.PathLike[str], *, repair: bool = False, progress: Progress | None = None
) -> VerifyReport:
    """Check every file of a store: catalog, header pages, footers, every live record.

    Args:
        path: the store's folder; others may read and, without `repair`, write it meanwhile.
        repair: mend what can be mended and take damaged records out. Whole records stay as they
            are; records that cannot be read for another reason than damage stay too.
        progress: called with (records done, records in all).

    Raises:
        StoreError: no store there, another version's; with `repair`, another writer, or a disk
            that cannot be written.
    """
    folder, started = Path(path), time.perf_counter()
    if not any((folder / name).exists() for name in (STORE_JSON, CATALOG, SEGMENTS)):
        StoreLayout.read(folder)  # says that there is no store
    with _mending(folder) if repair else _holding(folder):
        structure = inspect(folder)
        repaired = structure.mend() if repair else []
        # What stays wrong after mending needs a person.
        left = inspect(folder).faults if repaired else structure.faults
    checked = _Records(folder, structure, repair, progress)
    checked.run()
    # Without a repair, the records of a missing file were tried to be read as well.
    damaged = {(record.segment, record.row): record for record in checked.damaged}
    damaged |= {(record.segment, record.row): record for record in structure.damaged}
    num_dropped = len(structure.damaged) + len(checked.dropped)
    if repair and num_dropped:
        repaired.append(f"{num_dropped} damaged records were taken out")
    is_clean = not left and not checked.faults and len(checked.dropped) == len(checked.damaged)
    return VerifyReport(
        path=str(folder),
        num_records=checked.num_left,
        num_segments=len(structure.contents.segments),
        num_checked=checked.num_checked,
        read_bytes=checked.num_checked * _bytes_of(structure.layout),
        seconds=time.perf_counter() - started,
        damaged=tuple(damaged[place] for place in sorted(damaged)),
        faults=(*structure.faults, *checked.faults),
        repaired=tuple(repaired),
        leftovers=tuple(structure.leftovers),
        is_clean=is_clean and (repair or not damaged),
    )


@contextmanager
def _mending(folder: Path) -> Iterator[None]:
    """Be the store's one writer."""
    lock = lock_writer(folder)
    try:
        yield
    finally:
        os.close(lock)


@contextmanager
def _holding(folder: Path) -> Iterator[None]:
    """Keep every file that the store has now, whatever a writer does meanwhile."""
    pin = Pin.take(folder)
    try:
        yield
    finally:
        pin.close()


class _Records:
    """The pass over all live records."""

    def __init__(self, folder: Path, structure: Structure, repair: bool, progress: Progress | None):
        self._folder, self._structure = folder, structure
        self._repair, self._progress = repair, progress
        self.num_checked = self.num_left = 0
        self.damaged: list[BadRecord] = []
        self.dropped: list[BadRecord] = []
        self.faults: list[str] = []

    def run(self) -> None:
        """Read every record; with `repair`, take the damaged ones out."""
        try:
            store = TokenStore.open(self._folder, mode="a" if self._repair else "r")
        except StoreError as error:
            if self._repair:
                raise
            self.faults.append(f"no record could be checked: {error.message}")
            return
        with store:
            self._read(store)
            if self._repair:
                self._drop(store)
            self.num_left = len(store)

    def _read(self, store: TokenStore) -> None:
        total = len(store)
        size = max(1, BATCH_BYTES // _bytes_of(store.layout))
        for batch in store.iterate(size, bad="mark"):
            self.num_checked += len(batch.ids)
            self.damaged += batch.bad
            if self._progress is not None:
                self._progress(self.num_checked, total)

    def _drop(self, store: TokenStore) -> None:
        """Take out what is damaged, but nothing of a file that is only out of reach."""
        out_of_reach = self._structure.out_of_reach
        self.dropped = [record for record in self.damaged if record.segment not in out_of_reach]
        store.delete([record.id for record in self.dropped])


def _bytes_of(layout: StoreLayout) -> int:
    return layout.record_bytes + layout.scale_bytes
