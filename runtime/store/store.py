"""`TokenStore`: the visual tokens of many images, durable, verified, read at random."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Literal

from ... import __version__
from ...arguments import Arguments, Progress, StrPath, is_whole, path_of, plain
from ...arrays import Float16
from ...errors import StoreError
from ...files import Closing
from . import disk
from .catalog import Catalog, CatalogState
from .format import DEFAULT_SEGMENT_BYTES, StoreLayout
from .ids import RecordIndex
from .memory import ResidentRecords
from .read import SegmentReader
from .reading import ReadableStore, Tokens

if TYPE_CHECKING:  # the writer's half of the store waits until it is asked for
    from .incoming import CommitReport
    from .verify import VerifyReport
    from .writer import CompactReport, StoreWriter

Access = Literal["cached", "direct", "resident"]


class TokenStore(ReadableStore, Closing):
    """A folder of token records. Made by `create` or `open`; use it as a context manager.

    One process writes at a time, any number read; a reader keeps the generation that it opened,
    whatever a writer appends, deletes or compacts. All methods may be called from several threads.
    """

    def __init__(self, path: Path, layout: StoreLayout, *, writable: bool, access: Access):
        self.path = path
        self.layout = layout
        self.access: Access = access
        self._mutex = RLock()
        self._lock = disk.Lock()
        self._writer: StoreWriter | None = None
        if writable:
            from .writer import StoreWriter

            self._writer = StoreWriter(path, layout)
        try:
            if self._writer is None:
                self._lock = disk.lock_reader(path)
            self._load()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(
        cls,
        path: StrPath,
        *,
        num_tokens: int,
        hidden: int,
        fingerprint_encoder: str,
        dtype: str = "float16",
        segment_bytes: int = DEFAULT_SEGMENT_BYTES,
    ) -> TokenStore:
        """Make an empty store at `path` and open it for appending.

        Args:
            path: a folder that is not there yet, or empty (as a mounted volume is).
            num_tokens: m, visual tokens an image.
            hidden: H, values a token.
            fingerprint_encoder: names the encoder; an engine of another one refuses the store.
            dtype: `float16`, or `int8` with a float16 scale a token: half the bytes.
            segment_bytes: a segment's records take no more (1 GiB).

        Raises:
            RequestError: `path` is no path.
            StoreError: `path` holds something or cannot be written; sizes that no store can have
                (all of them).
        """
        folder = path_of("path", path)
        sizes = (num_tokens, hidden, segment_bytes)
        num_tokens, hidden, segment_bytes = (int(n) if is_whole(n) else n for n in sizes)
        created_by = f"edje-runtime {__version__}"
        layout = StoreLayout(
            num_tokens, hidden, dtype, fingerprint_encoder, segment_bytes, created_by
        )
        disk.create_folder(folder, layout)
        return cls(folder, layout, writable=True, access="cached")

    @classmethod
    def open(
        cls,
        path: StrPath,
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
            RequestError: `path` is no path.
            StoreError: no store there, damaged, of another version, or (`"a"`) another writer; or
                modes that there are not.
        """
        folder = path_of("path", path)
        faults = []
        if mode not in ("r", "a"):
            faults.append(f'mode is {mode!r}, expected "r" or "a"')
        if access not in ("cached", "direct", "resident"):
            faults.append(f'access is {access!r}, expected "cached", "direct" or "resident"')
        if mode == "a" and access == "resident":
            faults.append('access "resident" is for reading, expected mode "r"')
        if faults:
            raise StoreError("; ".join(faults))
        return cls(folder, StoreLayout.read(folder), writable=mode == "a", access=access)

    def append(
        self,
        ids: Iterable[str],
        tokens: Tokens,
        scales: Float16 | None = None,
        *,
        allow_nonfinite: bool = False,
    ) -> None:
        """Add records; durable when it returns, all of them or none.

        Args:
            ids: N ids, each new to the store; any iterable but a set, which has no order.
            tokens: float16 [N, m, H] (an int8 store quantises them), or int8 [N, m, H]; host, the
                caller's, copied before this returns.
            scales: float16 [N, m] with int8 tokens.
            allow_nonfinite: let NaN and infinity in, which give an image no score.

        Raises:
            RequestError: arguments of another kind (all of them).
            StoreError: opened for reading; ids twice, present or no ids; wrong dtype or shape;
                tokens that are not finite (all named); the disk is full. Then nothing was added.
        """
        from .records import NewRecords

        new = NewRecords.take(ids, tokens, scales, allow_nonfinite)
        with self._mutex:
            self._writing().append(self._index, new)

    def replace(
        self,
        ids: Iterable[str],
        tokens: Tokens,
        scales: Float16 | None = None,
        *,
        allow_nonfinite: bool = False,
    ) -> None:
        """Put new records in the place of present ones, all or none; arguments as in `append`.

        Raises:
            As `append`; StoreError: ids that the store does not hold.
        """
        from .records import NewRecords

        new = NewRecords.take(ids, tokens, scales, allow_nonfinite)
        with self._mutex:
            self._writing().replace(self._index, new)

    def delete(self, ids: Iterable[str]) -> None:
        """Take records away, all or none; durable when it returns. `compact` frees their space.

        Raises:
            RequestError: no list of ids.
            StoreError: opened for reading; ids twice or not present (named); the disk is full.
        """
        given = Arguments("delete")
        names = plain(given.items("ids", ids, "a list of ids"))
        given.check()
        with self._mutex:
            self._writing().delete(self._index, names)

    def commit_segments(self, paths: Iterable[StrPath]) -> CommitReport:
        """Add segments that `SegmentWriter` wrote, and remove their files.

        Ids that the store holds already are left out, so a task that ran twice does no harm.

        Raises:
            RequestError: no list of paths.
            StoreError: opened for reading; a file that is no whole segment of this store's layout
                (it was not added, those before it were).
        """
        from .incoming import commit_segments

        given = Arguments("commit_segments")
        files = [given.path("a path", path) for path in given.items("paths", paths, "a list")]
        given.check()
        with self._mutex:
            return commit_segments(self._writing(), self._index, files)

    def compact(
        self, max_dead_share: float = 0.0, *, progress: Progress | None = None
    ) -> CompactReport:
        """Give back the space of deleted records; join segments less than half full.

        Row handles of this object are out of date afterwards; other readers keep theirs.

        Args:
            max_dead_share: segments with a larger share of deleted records are written anew.
            progress: called with (done, total) segments.

        Raises:
            RequestError: arguments of another kind (all of them), or a share that is none.
            StoreError: opened for reading; no room for one segment more; then nothing is lost.
        """
        from .writer import CompactReport, move_records

        given = Arguments("compact")
        expected = "0 or more, less than 1"
        max_dead_share = given.number("max_dead_share", max_dead_share, expected)
        given.callback("progress", progress)
        given.check()
        with self._mutex:
            writer, before = self._writing(), disk.disk_bytes(self.path)
            reader = self._open_reader()
            try:
                moved, dropped, left = move_records(
                    writer, self._index, reader, max_dead_share, progress
                )
            finally:
                if not self._closed and writer.is_open:
                    self._load()
            writer.catalog.shorten_log()
            freed = before - disk.disk_bytes(self.path)
            waiting = disk.waiting_bytes(self.path, self._state)
            return CompactReport(moved, dropped, freed, waiting, tuple(left))

    @property
    def writable(self) -> bool:
        """Whether it was opened for changes, too."""
        return self._writer is not None

    def load_into_memory(self) -> None:
        """Load all records, verified, and read from memory from now on: `access` is "resident".

        Who reads meanwhile goes on reading. A store in memory stays as it is.

        Raises:
            StoreError: the memory does not suffice (then the store reads as before); the store is
                closed, or open for changes.
        """
        with self._mutex:
            reader = self._open_reader()
            if self._writer is not None:
                raise StoreError(
                    f"the store {self.path} is open for changes: it cannot be held in memory",
                    hint='open it with mode="r"',
                )
            if isinstance(reader, SegmentReader):
                plan = self._records.plan(self._records.live_rows())
                self._reader = ResidentRecords.load(reader, plan, self.layout)
                self.access = "resident"
                reader.retire()

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Compare every byte of the store with what is known of it; changes nothing.

        Args:
            progress: called with (done, total) records.

        Returns:
            The report; `.bad` holds the ids of damaged records. `edje store verify --repair` mends.

        Raises:
            RequestError: `progress` is no function.
        """
        from .verify import verify_store

        given = Arguments("verify")
        given.callback("progress", progress)
        given.check()
        self._open_reader()
        return verify_store(self.path, progress=progress)

    def stat(self) -> disk.StoreStat:
        """Return what the store holds and what it takes on disk."""
        self._open_reader()
        state = self._state
        if self._writer is not None and self._writer.is_open:
            with self._mutex:
                state = self._writer.catalog.state()
        return disk.stat_of(self.path, self.layout, state, self._faults)

    def close(self) -> None:
        """Close all files and release the writer's lock. Calling it twice is allowed."""
        with self._mutex:
            self._closed = True
            if self._writer is not None:
                self._writer.close()
            if self._reader is not None:
                self._reader.close()
            self._lock.close()

    def _load(self) -> None:
        """Read the catalog: a reader once, a writer again after it has moved records."""
        catalog = self._writer.catalog if self._writer else Catalog.open(self.path, writable=False)
        try:
            with catalog.snapshot() as state:
                self._lock.keep(state.generation)
                counts = {segment: info.num_rows for segment, info in state.segments.items()}
                batches = (
                    batch
                    for segment, num_rows in counts.items()
                    for batch in catalog.batches(segment, num_rows)
                )
                self._records = RecordIndex(counts, batches, state.deleted)
            self._faults = list(catalog.faults)
        finally:
            if self._writer is None:
                catalog.close()  # a reader's snapshot is in memory
        self._state: CatalogState = state
        if self._writer is not None:
            self._writer.start(state)
        if self._reader is not None:
            self._reader.close()
        access: Literal["cached", "direct"] = "direct" if self.access == "direct" else "cached"
        self._reader = SegmentReader(self.path, self.layout, key_of=self._key_of, access=access)
        if self.access == "resident":
            self.load_into_memory()

    def _key_of(self, segment: int) -> int | None:
        if self._writer is not None:
            return self._writer.appender.keys.get(segment)
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
