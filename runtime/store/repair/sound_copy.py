"""A copy of a damaged catalog to read from, on whose first page nothing is damaged.

SQLite keeps the schema on that page; with one bit of it flipped, no table can be read. The schema
of a catalog is always the same, so the page of an empty one does as well.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ....errors import StoreError
from ..catalog import Catalog
from ..layout import CATALOG

# In the first page: u32 number of pages; u32 first free page and u32 number of free pages, which
# a reader does not need.
NUM_PAGES_AT, FREE_PAGES_AT = 28, 32
PAGE_SIZE_AT = 16


@contextmanager
def sound_copy(path: Path) -> Iterator[Path]:
    """Yield the path of a copy of the catalog at `path`, with what SQLite has logged beside it.

    Raises:
        StoreError: there is no room for the copy.
    """
    with tempfile.TemporaryDirectory(prefix="edje-catalog-") as name:
        folder = Path(name)
        Catalog.create(folder, b"", name="empty")
        copy, log = folder / CATALOG, f"{CATALOG}-wal"
        try:
            shutil.copyfile(path, copy)
            if path.with_name(log).exists():
                shutil.copyfile(path.with_name(log), folder / log)
            _replace_first_page(copy, (folder / "empty").read_bytes())
        except OSError as error:
            raise StoreError(
                f"cannot copy {path} to {folder.parent}: {error.strerror}",
                hint="make room there, or name another folder with TMPDIR",
            ) from error
        yield copy


def _replace_first_page(copy: Path, empty: bytes) -> None:
    page_bytes = int.from_bytes(empty[PAGE_SIZE_AT : PAGE_SIZE_AT + 2], "big")
    page = bytearray(empty[:page_bytes])
    num_pages = copy.stat().st_size // page_bytes
    page[NUM_PAGES_AT:FREE_PAGES_AT] = num_pages.to_bytes(4, "big")
    page[FREE_PAGES_AT : FREE_PAGES_AT + 8] = bytes(8)
    with copy.open("r+b") as file:
        file.write(page)
