"""`TokenStore`: the visual tokens of many images, durable, verified, read at random."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Literal

import numpy as np
import numpy.typing as npt

from ...errors import EdjeError, RequestError, StoreError, named
from ...folders import publish_folder
from .catalog import Catalog, Int64, UInt64
from .index import RecordIndex
from .layout import (
    DEFAULT_SEGMENT_BYTES,
    LOCK,
    SEGMENTS,
    STORE_JSON,
    StoreLayout,
    is_id,
)
from .reader import BadRecord, SegmentReader
from .writer import SegmentWriter, lock_writer

Float16 = npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class StoreStat:
    """What a store holds. `total_bytes` counts every file of the folder."""

    path: str
    num_records: int
    num_segments: int
    total_bytes: int
    record_bytes: int
    num_tokens: int
    hidden: int
    dtype: str
    fingerprint_encoder: str
    generation: int
    format_version: int
    created_by: str


class TokenStore:
    """A folder of token records. Made by `create` or `open`; use it as a context manager.

    One process writes at a time, any number read; a reader sees the records that were
    acknowledged before it opened. All methods may be called from several threads.
    """

    def __init__(self, path: Path, layout: StoreLayout, *, writable: bool):
        self.path = path
        self.layout = layout
        self._mutex = RLock()
        self._closed = False
        self._lock = lock_writer(path) if writable else None
        self._catalog: Catalog | None = None
        self._writer: SegmentWriter | None = None
        self._reader = SegmentReader(path, layout)
        try:
            self._load(writable)
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
            dtype: `float16`.
            segment_bytes: a segment file grows no larger (1 GiB).

        Raises:
            StoreError: `path` exists or cannot be written, or sizes that no store can have.
        """
        folder = Path(path)
        created_by = f"edje-runtime {_package_version()}"
        layout = StoreLayout(
            num_tokens, hidden, dtype, fingerprint_encoder, segment_bytes, created_by
        )
        faults = layout.faults()
        if faults:
            raise StoreError(f"cannot make a token store at {folder}", faults=faults)
        if folder.exists() or folder.is_symlink():
            raise StoreError(
                f"{folder} exists already and is left as it was",
                hint='choose another folder, or open the store there with mode="a"',
            )
        _publish(folder, layout)
        return cls(folder, layout, writable=True)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, mode: Literal["r", "a"] = "r") -> TokenStore:
        """Open the store at `path`: `"r"` to read, `"a"` to append as well.

        Raises:
            StoreError: no store there, damaged, of another version, or (`"a"`) another writer.
        """
        if mode not in ("r", "a"):
            raise StoreError(f'mode is {mode!r}, expected "r" or "a"')
        folder = Path(path)
        return cls(folder, StoreLayout.read(folder), writable=mode == "a")

    def append(self, ids: Sequence[str], tokens: Float16) -> None:
        """Add records; durable when it returns, all of them or none.

        Args:
            ids: N ids, each new to the store.
            tokens: float16 [N, m, H], host, the caller's; copied before this returns.

        Raises:
            StoreError: opened for reading; ids twice, present or no text; wrong dtype or shape
                (all named); the disk is full. Then nothing was added.
        """
        with self._mutex:
            if self._writer is None or self._catalog is None:
                raise StoreError(
                    f"the store {self.path} is not open for appending",
                    hint='open it (again) with TokenStore.open(path, mode="a")',
                )
            self._check_append(ids, tokens)
            if len(ids) == 0:
                return
            self._append(tuple(ids), tokens, self._writer, self._catalog)

    def rows(self, ids: Sequence[str]) -> Int64:
        """Return the row handles of `ids`: int64 [N], the caller's; the same id may come twice.

        A handle stays valid as long as this store is open.

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
        self, rows: Int64, out: Float16, *, bad: Literal["raise", "mark"] = "raise"
    ) -> list[BadRecord]:
        """Copy records into `out` and verify each against its checksum.

        Args:
            rows: int64 [N] from `rows`, in any order, repeats allowed.
            out: float16 [N, m, H], C-contiguous, host or pinned, the caller's; record i goes to
                `out[i]`. A bad record leaves zeros there.
            bad: `"raise"` on a bad record, or `"mark"` it in the returned list.

        Returns:
            The bad records by position: empty when all is well.

        Raises:
            StoreError: (`"raise"`) damaged records, each with id, segment, row and reason.
            RequestError: `out` does not fit, or rows that this store did not give out.
        """
        rows = np.asarray(rows)
        self._check_read(rows, out)
        if len(rows) == 0:
            return []
        plan = self._index.plan(rows)
        # A view of numbers, since memoryview cannot cast every dtype to bytes.
        buffer = out.reshape(-1).view(np.uint8).data
        reasons = self._reader.gather(plan, buffer)
        if not reasons:
            return []
        found = [self._index.bad_record(plan, place, why) for place, why in reasons.items()]
        found.sort(key=lambda record: record.position)
        if bad == "mark":
            return found
        raise StoreError(
            f"{len(found)} of {len(rows)} records of the store {self.path} are damaged",
            faults=[str(record) for record in found[:20]],
            hint='index these images again, or read with bad="mark" to use the others',
        )

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
        """Return all ids in the order they were appended; a new list, the caller's."""
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
        return StoreStat(
            path=str(self.path),
            num_records=len(self),
            num_segments=self._num_segments,
            total_bytes=_folder_bytes(self.path),
            record_bytes=self.layout.record_bytes,
            num_tokens=self.layout.num_tokens,
            hidden=self.layout.hidden,
            dtype=self.layout.dtype,
            fingerprint_encoder=self.layout.fingerprint_encoder,
            generation=self._generation,
            format_version=self.layout.format_version,
            created_by=self.layout.created_by,
        )

    def close(self) -> None:
        """Close all files and release the writer's lock. Calling it twice is allowed."""
        with self._mutex:
            self._closed = True
            self._stop_writing()
            self._reader.close()

    def __enter__(self) -> TokenStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _load(self, writable: bool) -> None:
        catalog = Catalog.open(self.path, writable=writable)
        try:
            state, batches, deleted = catalog.load()
        except BaseException:
            catalog.close()
            raise
        self._index = RecordIndex(batches, deleted)
        self._generation = state.generation
        self._num_segments = len(state.segments)
        if writable:
            self._catalog = catalog
            self._writer = SegmentWriter(self.path, self.layout, state)
        else:
            catalog.close()  # a reader's snapshot is in memory

    def _append(
        self, ids: tuple[str, ...], tokens: Float16, writer: SegmentWriter, catalog: Catalog
    ) -> None:
        """Bytes on disk first, then the commit that makes them records, then memory."""
        records = np.ascontiguousarray(tokens).reshape(len(ids), -1).view(np.uint8)
        try:
            batches = writer.write(ids, records)
        except OSError as error:
            raise StoreError(
                f"cannot append to the store {self.path}, nothing was added: {error.strerror}"
            ) from error
        try:
            catalog.commit(batches, max_rows=self.layout.max_rows)
            self._index.add(batches)
        except BaseException:
            # Whether the commit reached the disk is not known here, and its rows must not be
            # written over if it did: opening the store again reads the truth.
            self._stop_writing()
            raise
        self._generation += 1
        self._num_segments += sum(batch.first_row == 0 for batch in batches)

    def _stop_writing(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._catalog is not None:
            self._catalog.close()
        self._writer = self._catalog = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_append(self, ids: Sequence[str], tokens: Float16) -> None:
        shape = (len(ids), *self.record_shape)
        faults = []
        if tokens.dtype != np.float16 or tokens.shape != shape:
            got = f"{tokens.dtype} {list(tokens.shape)}"
            faults.append(f"tokens: got {got}, expected float16 {list(shape)}")
        no_ids = [repr(image_id) for image_id in ids if not is_id(image_id)]
        if no_ids:
            faults.append(f"{len(no_ids)} ids are empty or no text: {named(no_ids)}")
        else:
            seen: set[str] = set()
            twice = [i for i in ids if i in seen or seen.add(i)]  # type: ignore[func-returns-value]
            present = [image_id for image_id in ids if image_id in self._index]
            faults += [f"{len(twice)} ids come twice: {named(twice)}"] if twice else []
            if present:
                faults.append(f"{len(present)} ids are in the store already: {named(present)}")
        if faults:
            what = f"cannot append to the store {self.path}, nothing was added"
            raise StoreError(what, faults=faults)

    def _check_read(self, rows: Int64, out: Float16) -> None:
        if self._closed:
            raise StoreError(f"the store {self.path} is closed")
        if rows.dtype != np.int64 or rows.ndim != 1:
            raise RequestError(f"rows is {rows.dtype} {list(rows.shape)}, expected int64 [N]")
        shape = (len(rows), *self.record_shape)
        usable = out.flags.c_contiguous and out.flags.writeable
        if out.dtype != np.float16 or out.shape != shape or not usable:
            got = f"{out.dtype} {list(out.shape)}, C-contiguous and writeable: {usable}"
            raise RequestError(f"out is {got}; expected float16 {list(shape)}, True")


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # SQLite removes its log when the writer closes
            total += path.stat().st_size if path.is_file() else 0
    return total


def _publish(folder: Path, layout: StoreLayout) -> None:
    """Write the files of an empty store, whole or not at all."""
    try:
        with publish_folder(folder) as staging:
            (staging / STORE_JSON).write_bytes(layout.to_bytes())
            (staging / SEGMENTS).mkdir()
            (staging / LOCK).touch()
            Catalog.create(staging)
    except StoreError:
        raise
    except EdjeError as error:
        raise StoreError(error.message, hint="choose another folder for the store") from error
    except OSError as error:
        raise StoreError(f"cannot make a token store at {folder}: {error.strerror}") from error


def _package_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("edje-runtime")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "(not installed)"
