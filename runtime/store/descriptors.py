"""Open files of a store's segments: checked as they open, shared, the least used closed first."""

from __future__ import annotations

import errno
import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from threading import Lock

import numpy as np

from ...arrays import Int64
from ...errors import StoreError
from .format import PAGE_BYTES, SEGMENTS, StoreLayout, header_fault, segment_name


@dataclass(slots=True)
class _Open:
    """A descriptor and how many readers use it now."""

    descriptor: int
    num_users: int = 0


class SegmentFiles:
    """Descriptors of segment files; safe to use from several threads.

    Attributes:
        max_open: no more stay open, but for those in use: a `share`-th of what the process may.
    """

    def __init__(
        self,
        folder: Path,
        layout: StoreLayout,
        key_of: Callable[[int], int | None],
        *,
        direct: bool = False,
        share: int = 2,
    ):
        self._folder, self._layout, self._key_of = folder / SEGMENTS, layout, key_of
        self._flags = os.O_RDONLY | os.O_CLOEXEC | (_direct_flag(folder) if direct else 0)
        self._open: OrderedDict[int, _Open] = OrderedDict()  # least recently used first
        self._lock = Lock()
        self._closed = False
        soft_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        unlimited = soft_limit == resource.RLIM_INFINITY
        self.max_open = 4096 if unlimited else max(1, soft_limit // share)

    @contextmanager
    def use(self, segments: Iterable[int]) -> Iterator[dict[int, int | str]]:
        """Lend the descriptor of each segment, or why its file cannot be used.

        Raises:
            StoreError: too many open files, no O_DIRECT there, or closed.
        """
        lent: dict[int, _Open] = {}
        found: dict[int, int | str] = {}
        try:
            for segment in segments:
                file = self._take(segment)
                if isinstance(file, str):
                    found[segment] = file
                else:
                    lent[segment] = file
                    found[segment] = file.descriptor
            yield found
        finally:
            self._give_back(lent)

    @contextmanager
    def lend(self, segments: Int64) -> Iterator[Int64]:
        """Lend descriptors int64 [N] for `segments` int64 [N]; -1 where none can be used.

        `segments` are sorted, and one at least.

        Raises:
            StoreError: as `use`.
        """
        if segments[0] == segments[-1]:
            with self.use([int(segments[0])]) as found:
                (file,) = found.values()
                yield np.full(len(segments), -1 if isinstance(file, str) else file)
            return
        begins = np.ones(len(segments), np.bool_)
        begins[1:] = segments[1:] != segments[:-1]
        with self.use(segments[begins].tolist()) as found:
            descriptors = [-1 if isinstance(file, str) else file for file in found.values()]
            yield np.array(descriptors, np.int64)[np.cumsum(begins) - 1]

    def retire(self) -> None:
        """Keep no file open that is not in use."""
        with self._lock:
            self.max_open = 0
            self._close_unused(0)

    def close(self) -> None:
        """Close all files; those in use as soon as they are given back."""
        with self._lock:
            self._closed = True
            self._close_unused(0)

    def abandon(self) -> None:
        """Close what a forked child has inherited. Takes no lock: a thread of the parent has it."""
        while self._open:
            os.close(self._open.popitem()[1].descriptor)

    def _take(self, segment: int) -> _Open | str:
        """Return the file of a segment with one user more, or why it cannot be used."""
        with self._lock:
            if self._closed:
                raise StoreError(f"the store {self._folder.parent} is closed")
            file = self._open.get(segment)
            if file is not None:
                self._open.move_to_end(segment)
                file.num_users += 1
                return file
        opened = self._open_checked(segment)
        if isinstance(opened, str):
            return opened
        with self._lock:
            file = self._open.setdefault(segment, _Open(opened))
            file.num_users += 1
            if file.descriptor != opened:  # another thread was faster
                os.close(opened)
            self._close_unused(self.max_open)
            return file

    def _give_back(self, lent: dict[int, _Open]) -> None:
        with self._lock:
            for file in lent.values():
                file.num_users -= 1
            self._close_unused(0 if self._closed else self.max_open)

    def _close_unused(self, max_open: int) -> None:
        if len(self._open) <= max_open:
            return
        for segment in [segment for segment, file in self._open.items() if not file.num_users]:
            os.close(self._open.pop(segment).descriptor)
            if len(self._open) <= max_open:
                return

    def _open_checked(self, segment: int) -> int | str:
        """Open a segment file and check its header page."""
        name = segment_name(segment)
        key = self._key_of(segment)
        if key is None:
            return f"the catalog knows no segment {segment}"
        try:
            descriptor = self._open_file(self._folder / name)
        except OSError as error:
            return f"its file {name} cannot be opened ({error.strerror})"
        fault = self._header_fault(descriptor, key)
        if fault is None:
            return descriptor
        os.close(descriptor)
        return f"its file {name} cannot be used: {fault}"

    def _open_file(self, path: Path) -> int:
        try:
            return os.open(path, self._flags)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise StoreError(
                    f"cannot open {path} with O_DIRECT: its file system has none",
                    hint='open the store with access="cached"',
                ) from error
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        with self._lock:  # files of ours that nobody uses may be in the way
            self._close_unused(0)
        try:
            return os.open(path, self._flags)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            raise StoreError(
                f"cannot open {path}: {error.strerror}",
                hint="raise the limit of open files (`ulimit -n`)",
            ) from error

    def _header_fault(self, descriptor: int, key: int) -> str | None:
        page = mmap(-1, PAGE_BYTES)  # aligned, as O_DIRECT wants it
        try:
            found = os.preadv(descriptor, [page], 0)
        except OSError as error:
            return f"its header page cannot be read ({error.strerror})"
        return header_fault(page[:found], self._layout, key)


def _direct_flag(folder: Path) -> int:
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        raise StoreError(
            f"cannot read the store {folder} past the page cache: this system has no O_DIRECT",
            hint='open the store with access="cached"',
        )
    return int(flag)
