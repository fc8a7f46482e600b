"""Open files of a store's segments: checked as they open, shared, closed when nobody needs them."""

from __future__ import annotations

import errno
import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from mmap import mmap
from pathlib import Path

from ...errors import StoreError
from .format import PAGE_BYTES, SEGMENTS, StoreLayout, header_fault, segment_name

CACHED = 'open the store with access="cached"'


class _Descriptor(int):
    """An open file's descriptor, closed when nobody holds it any more."""

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self)  # at the interpreter's end `os` may be gone


class SegmentFiles:
    """Descriptors of segment files, checked as they open; safe to use from several threads.

    It takes no lock, so that a forked child may go on with it: a step on `_open` cannot be torn.

    Attributes:
        most_open: no more stay open, but for those in use: half of what the process may, or a
            quarter of it past the page cache.
    """

    def __init__(
        self,
        folder: Path,
        layout: StoreLayout,
        key_of: Callable[[int], int | None],
        *,
        direct: bool = False,
    ):
        self._folder, self._layout, self._key_of = folder / SEGMENTS, layout, key_of
        self._flags = os.O_RDONLY | os.O_CLOEXEC
        if direct and not hasattr(os, "O_DIRECT"):
            what = f"cannot read the store {folder} past the page cache"
            raise StoreError(f"{what}: this system has no O_DIRECT", hint=CACHED)
        if direct:
            self._flags |= os.O_DIRECT
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()  # the oldest first
        self._is_closed = False
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        unlimited = limit == resource.RLIM_INFINITY
        self.most_open = 4096 if unlimited else max(1, limit // (4 if direct else 2))

    def of(self, segments: Sequence[int]) -> list[int]:
        """Return a descriptor for each of `segments`, -1 where none can be used.

        They stay open as long as the caller holds them.

        Raises:
            StoreError: too many open files, no O_DIRECT there, or closed.
        """
        try:
            return list(map(self._open.__getitem__, segments))  # as nearly always
        except KeyError:
            pass
        once = dict.fromkeys(segments)
        files = dict(zip(once, map(self.open, once), strict=True))
        return [-1 if isinstance(file := files[each], str) else file for each in segments]

    def open(self, segment: int) -> _Descriptor | str:
        """Return the file of a segment, or why it cannot be used; raises as `of`."""
        if self._is_closed:
            raise StoreError(f"the store {self._folder.parent} is closed")
        file = self._open.get(segment)
        if file is not None:
            return file
        opened = self._open_checked(segment)
        if isinstance(opened, str):
            return opened
        file = self._open.setdefault(segment, opened)  # another thread's, if it was faster
        self.keep(self.most_open)
        return file

    def keep(self, most: int) -> None:
        """Keep at most so many files open from now on, besides those in use."""
        self.most_open = 0 if self._is_closed else most
        with suppress(KeyError):  # another thread was faster
            while len(self._open) > self.most_open:
                self._open.popitem(last=False)

    def close(self) -> None:
        """Close all files; those in use when nobody holds them any more."""
        self._is_closed = True
        self.keep(0)

    def _open_checked(self, segment: int) -> _Descriptor | str:
        """Open a segment file and check its header page."""
        name, key = segment_name(segment), self._key_of(segment)
        if key is None:
            return f"the catalog knows no segment {segment}"
        try:
            file = self._open_file(self._folder / name)
        except OSError as error:
            return f"its file {name} cannot be opened ({error.strerror})"
        page = mmap(-1, PAGE_BYTES)  # aligned, as O_DIRECT wants it
        try:
            size = os.preadv(file, [page], 0)
        except OSError as error:
            fault: str | None = f"its header page cannot be read ({error.strerror})"
        else:
            fault = header_fault(page[:size], self._layout, key)
        return file if fault is None else f"its file {name} cannot be used: {fault}"

    def _open_file(self, path: Path) -> _Descriptor:
        """Open a file; where too many are open, once more without those that nobody uses."""
        for is_last in (False, True):
            try:
                return _Descriptor(os.open(path, self._flags))
            except OSError as error:
                if error.errno == errno.EINVAL:
                    raise StoreError(
                        f"cannot open {path} with O_DIRECT: its file system has none", hint=CACHED
                    ) from error
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                if is_last:
                    raise StoreError(
                        f"cannot open {path}: {error.strerror}",
                        hint="raise the limit of open files (`ulimit -n`)",
                    ) from error
            self._open.clear()
        raise AssertionError("the last attempt returns or raises")
