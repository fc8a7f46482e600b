"""`TokenStore`: the visual tokens of many images, durable, verified, read at random."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import RequestError, StoreError, named
from .arrays import check_buffers, record_bytes_of
from .catalog import Catalog, CatalogState
from .changes import StoreWriter
from .compaction import CompactReport, Progress, compact
from .folder import StoreStat, create_folder, package_version, stat_of
from .incoming import CommitReport, commit_segments
from .index import RecordIndex
from .layout import DEFAULT_SEGMENT_BYTES, Int64, StoreLayout, UInt64
from .pins import Pin
from .reader import BadRecord, SegmentReader

Float16 = npt.NDArray[np.float16]
Tokens = npt.NDArray[Any]
Access = Literal["cached", "direct", "resident"]


class TokenBatch(NamedTuple):
    """Records in the order of the store: N ids, tokens [N, m, H] of its dtype, scales for int8."""

    ids: tuple[str, ...]
    tokens: Tokens
    scales: Float16 | None
    bad: tuple[BadRecord, ...]


class TokenStore:
    """A folder of token records. Made by `create` or `open`; use it as a context manager.

    One process writes at a time, any number read; a reader keeps the generation that it opened,
    whatever a writer appends, deletes or compacts. All methods may be called from several threads.
    """

    def __init__(self, path: Path, layout: StoreLayout, *, writable: bool, access: Access):
        self.path = path
        self.layout = layout
        self.access = access
        self._mutex = RLock()
        self._closed = False
        self._pin = Pin(None)
        self._reader: SegmentReader | None = None
        self._writer = StoreWriter(path, layout) if writable else None
        try:
            if self._writer is None:
                self._pin = Pin.take(path)
            self._load()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        num_tokens: int,
        hidden: int,
        fingerprint_encoder: str,
        dtype: str = "float16",
        segment_bytes: int = DEFAULT_SEGMENT_BYTES,
    ) -> TokenStore:
        """Make an empty store at `path` and open it for appending.

        Args:
            path: a folder that must not exist yet.
            num_tokens: m, visual tokens an image.
            hidden: H, values a token.
            fingerprint_encoder: names the encoder; an engine of another one refuses the store.
            dtype: `float16`, or `int8` with a float16 scale a token: half the bytes.
            segment_bytes: a segment's records take no more (1 GiB).

        Raises:
            StoreError: `path` exists or cannot be written, or sizes that no store can have.
        """
        folder = Path(path)
        created_by = f"edje-runtime {package_version()}"
        layout = StoreLayout(
            num_tokens, hidden, dtype, fingerprint_encoder, segment_bytes, created_by
        )
        create_folder(folder, layout)
        return cls(folder, layout, writable=True, access="cached")

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        mode: Literal["r", "a"] = "r",
        access: Access = "cached",
    ) -> TokenStore:
        """Open the store at `path`.

        Args:
            mode: `"r"` reads; `"a"` changes the store as well.
            access: `"cached"` reads through the system's page cache; `"direct"` past it, for a
                store larger than the memory; `"resident"` loads all records once, verified, and
                reads from memory (only with `"r"`).

        Raises:
            StoreError: no store there, damaged, of another version, or (`"a"`) another writer.
        """
        if mode not in ("r", "a"):
            raise StoreError(f'mode is {mode!r}, expected "r" or "a"')
        if access not in ("cached", "direct", "resident"):
            raise StoreError(f'access is {access!r}, expected "cached", "direct" or "resident"')
        if mode == "a" and access == "resident":
            raise StoreError('access "resident" is for reading, expected mode "r"')
        folder = Path(path)
        return cls(folder, StoreLayout.read(folder), writable=mode == "a", access=access)

    def append(self, ids: Sequence[str], tokens: Tokens, scales: Float16 | None = None) -> None:
        """Add records; durable when it returns, all of them or none.

        Args:
            ids: N ids, each new to the store.
            tokens: float16 [N, m, H] (an int8 store quantises them), or int8 [N, m, H]; host, the
                caller's, copied before this returns.
            scales: float16 [N, m] with int8 tokens.

        Raises:
            StoreError: opened for reading; ids twice, present or no ids; wrong dtype or shape
                (all named); the disk is full. Then nothing was added.
        """
        with self._mutex:
            records = record_bytes_of(self.layout, len(ids), tokens, scales)
            writer = self._writing()
            if len(ids):
                writer.append(self._index, ids, records)

    def replace(self, ids: Sequence[str], tokens: Tokens, scales: Float16 | None = None) -> None:
        """Put new records in the place of present ones, all or none; arguments as in `append`.

        Raises:
            StoreError: as `append`; or ids that the store does not hold.
        """
        with self._mutex:
            records = record_bytes_of(self.layout, len(ids), tokens, scales)
            writer = self._writing()
            if len(ids):
                writer.replace(self._index, ids, records)

    def delete(self, ids: Sequence[str]) -> None:
        """Take records away, all or none; durable when it returns. `compact` frees their space.

        Raises:
            StoreError: opened for reading; ids twice or not present (named); the disk is full.
        """
        with self._mutex:
            writer = self._writing()
            if len(ids):
                writer.delete(self._index, ids)

    def commit_segments(self, paths: Sequence[str | os.PathLike[str]]) -> CommitReport:
        """Add segments that `SegmentWriter` wrote, and remove their files.

        Ids that the store holds already are left out, so a task that ran twice does no harm, nor
        does committing one file twice.

        Raises:
            StoreError: opened for reading; a file that is no whole segment of this store's layout
                (it was not added, those before it were).
        """
        with self._mutex:
            return commit_segments(self._writing(), self._index, [Path(path) for path in paths])

    def compact(
        self, max_dead_share: float = 0.0, *, progress: Progress | None = None
    ) -> CompactReport:
        """Give back the space of deleted records; join segments less than half full.

        Row handles of this object are out of date afterwards; other readers keep theirs.

        Args:
            max_dead_share: segments with a larger share of deleted records are written anew.
            progress: called with (done, total) segments.

        Raises:
            StoreError: opened for reading; no room for one segment more; then nothing is lost.
        """
        with self._mutex:
            writer = self._writing()
            try:
                return compact(writer, self._index, self._open_reader(), max_dead_share, progress)
            finally:
                if not self._closed and writer.is_open:
                    self._load()

    def rows(self, ids: Sequence[str]) -> Int64:
        """Return the row handles of `ids`: int64 [N], the caller's; the same id may come twice.

        A handle stays valid as long as this store is open (and not compacted by this object).

        Raises:
            RequestError: ids that the store does not hold (up to 20 named, with the count).
        """
        rows, unknown = self._index.rows(ids)
        if unknown:
            count = f"{len(unknown)} of {len(ids)}"
            raise RequestError(
                f"{count} ids are not in the store {self.path}: {named(unknown)}",
                hint="`edje index` adds images; an id is the path below the indexed folder",
            )
        return rows

    def read(
        self,
        rows: Int64,
        out: Tokens,
        scales: Float16 | None = None,
        *,
        bad: Literal["raise", "mark"] = "raise",
        verify: bool = True,
    ) -> list[BadRecord]:
        """Copy records into `out` and verify each against its checksum.

        Args:
            rows: int64 [N] from `rows`, in any order, repeats allowed.
            out: the store's dtype [N, m, H], C-contiguous, host or pinned, the caller's; record i
                goes to `out[i]`. A bad record leaves zeros there.
            scales: float16 [N, m], C-contiguous, the caller's: int8 stores only.
            bad: `"raise"` on a bad record, or `"mark"` it in the returned list.
            verify: False trusts the bytes; only a record that cannot be read is bad then.

        Returns:
            The bad records by position: empty when all is well.

        Raises:
            StoreError: (`"raise"`) damaged records, each with id, segment, row and reason.
            RequestError: buffers that do not fit, or rows that this store did not give out.
        """
        rows, reader = np.asarray(rows), self._open_reader()
        check_buffers(self.layout, rows, out, scales)
        if len(rows) == 0:
            return []
        plan = self._index.plan(rows)
        # Views of numbers, since memoryview cannot cast every dtype to bytes.
        scale_bytes = None if scales is None else scales.reshape(-1).view(np.uint8).data
        buffer = out.reshape(-1).view(np.uint8).data
        reasons = reader.gather(plan, buffer, scale_bytes, verify=verify)
        if not reasons:
            return []
        found = [self._index.bad_record(plan, place, why) for place, why in reasons.items()]
        found.sort(key=lambda record: record.position)
        if bad == "mark":
            return found
        raise StoreError(
            f"{len(found)} of {len(rows)} records of the store {self.path} are damaged",
            faults=[str(record) for record in found[:20]],
            hint=f"`edje store verify --repair {self.path}` takes them out; then index these "
            'images again. read(..., bad="mark") serves the others meanwhile',
        )

    def prefetch(self, rows: Int64) -> None:
        """Ask the system to fetch records that will be read soon; returns at once."""
        if len(rows) and not self._closed:
            self._open_reader().prefetch(rows)

    def iterate(
        self, batch_size: int = 256, *, bad: Literal["raise", "mark"] = "raise"
    ) -> Iterator[TokenBatch]:
        """Yield all records in the order they lie in the store; the arrays are the caller's.

        Raises:
            StoreError: (`"raise"`) a damaged record.
        """
        rows = self._index.live_rows()
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            self.prefetch(rows[start + batch_size : start + 2 * batch_size])
            out = np.empty((len(part), *self.record_shape), self.layout.dtype)
            scaled = self.layout.dtype == "int8"
            scales = np.empty((len(part), self.layout.num_tokens), np.float16) if scaled else None
            found = self.read(part, out, scales, bad=bad)
            yield TokenBatch(tuple(self._index.ids_of(part)), out, scales, tuple(found))

    def checksums(self, rows: Int64) -> UInt64:
        """Return the catalog's checksums of `rows`: uint64 [N], the caller's; reads no record.

        Raises:
            RequestError: rows that this store did not give out.
        """
        plan = self._index.plan(rows)
        sums = np.empty(len(rows), np.uint64)
        sums[plan.positions] = plan.checksums
        return sums

    def ids(self) -> list[str]:
        """Return all ids in the order of the records; a new list, the caller's."""
        return self._index.ids()

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._index

    @property
    def fingerprint_encoder(self) -> str:
        """The encoder that made the tokens."""
        return self.layout.fingerprint_encoder

    @property
    def record_shape(self) -> tuple[int, int]:
        """(m, H) of one record."""
        return (self.layout.num_tokens, self.layout.hidden)

    def stat(self) -> StoreStat:
        """Return what the store holds and what it takes on disk."""
        state = self._state
        if self._writer is not None and self._writer.is_open:
            with self._mutex, self._writer.catalog.snapshot() as state:
                pass
        return stat_of(self.path, self.layout, state, self._faults)

    def close(self) -> None:
        """Close all files and release the writer's lock. Calling it twice is allowed."""
        with self._mutex:
            self._closed = True
            if self._writer is not None:
                self._writer.close()
            if self._reader is not None:
                self._reader.close()
            self._pin.close()

    def __enter__(self) -> TokenStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _load(self) -> None:
        """Read the catalog: a reader once, a writer again after it has moved records."""
        catalog = self._writer.catalog if self._writer else Catalog.open(self.path, writable=False)
        try:
            with catalog.snapshot() as state:
                self._pin.keep(state.generation)
                counts = {segment: info.num_rows for segment, info in state.segments.items()}
                batches = (
                    batch
                    for segment, num_rows in counts.items()
                    for batch in catalog.batches(segment, num_rows)
                )
                self._index = RecordIndex(counts, batches, state.deleted)
            self._faults = list(catalog.faults)
        finally:
            if self._writer is None:
                catalog.close()  # a reader's snapshot is in memory
        self._state: CatalogState = state
        if self._writer is not None:
            self._writer.start(state)
        if self._reader is not None:
            self._reader.close()
        self._reader = self._make_reader(state)

    def _make_reader(self, state: CatalogState) -> SegmentReader:
        access: Literal["cached", "direct"] = "direct" if self.access == "direct" else "cached"
        return SegmentReader(self.path, self.layout, key_of=self._key_of, access=access)

    def _key_of(self, segment: int) -> int | None:
        if self._writer is not None:
            return self._writer.keys.get(segment)
        info = self._state.segments.get(segment)
        return None if info is None else info.key

    def _writing(self) -> StoreWriter:
        """Return the writer, if this store is open for changes."""
        if self._writer is None or not self._writer.is_open:
            raise StoreError(
                f"the store {self.path} is not open for changes",
                hint='open it (again) with TokenStore.open(path, mode="a")',
            )
        return self._writer

    def _open_reader(self) -> SegmentReader:
        if self._closed or self._reader is None:
            raise StoreError(f"the store {self.path} is closed")
        return self._reader
