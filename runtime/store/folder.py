"""A store's folder: made whole or not at all, and what it takes on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...errors import EdjeError, StoreError
from ...files import is_free, publish_folder
from .catalog import Catalog, CatalogState, sqlite_errors
from .format import INCOMING, LOCK, READERS, SEGMENTS, STORE_JSON, StoreLayout, segment_name
from .writer import StoreWriter

NEW_FOLDER = "choose a new or an empty folder for the store"


@dataclass(frozen=True, slots=True)
class StoreStat:
    """What a store holds.

    Attributes:
        num_records: live ones; `num_deleted` others still take space until `compact`.
        total_bytes: on disk, of every file in the folder.
        record_bytes: tokens of one image; `scale_bytes` more for int8.
        faults: what opening found damaged in the catalog, in words.
    """

    path: str
    num_records: int
    num_deleted: int
    num_segments: int
    num_retired: int
    total_bytes: int
    record_bytes: int
    scale_bytes: int
    num_tokens: int
    hidden: int
    dtype: str
    fingerprint_encoder: str
    generation: int
    format_version: int
    created_by: str
    faults: tuple[str, ...]


def disk_bytes(folder: Path) -> int:
    """Return what the files and folders in a store's folder take on disk, as `du` counts it.

    Raises:
        StoreError: the folder cannot be read.
    """
    try:
        return _blocks_of(folder.rglob("*"))
    except OSError as error:
        raise StoreError(
            f"cannot measure the store {folder}: {error.strerror or error}; no record is lost"
        ) from error


def waiting_bytes(folder: Path, state: CatalogState) -> int:
    """Return what the files take on disk that only readers of older generations need."""
    return _blocks_of(folder / SEGMENTS / segment_name(segment) for segment in state.retired)


def _blocks_of(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        with suppress(FileNotFoundError):  # SQLite removes its log when the writer closes
            total += path.stat().st_blocks * 512
    return total


def create_folder(folder: Path, layout: StoreLayout) -> None:
    """Write the files of an empty store, whole or not at all.

    Raises:
        StoreError: sizes that no store can have; `folder` is there and not empty, or cannot be
            written.
    """
    faults = layout.faults()
    if faults:
        raise StoreError(f"cannot make a token store at {folder}", faults=faults)
    try:
        if not is_free(folder):
            there = (folder / STORE_JSON).exists()
            raise StoreError(
                f"{folder} exists already and is left as it was",
                hint='open the store there with mode="a"' if there else NEW_FOLDER,
            )
        with publish_folder(folder, manifest=STORE_JSON) as staging:
            (staging / STORE_JSON).write_bytes(layout.to_bytes())
            (staging / SEGMENTS).mkdir()
            (staging / INCOMING).mkdir()
            (staging / LOCK).touch()
            (staging / READERS).touch()
            _make_catalog(staging, folder, layout)
    except StoreError:
        raise
    except EdjeError as error:
        raise StoreError(error.message, hint=NEW_FOLDER) from error
    except OSError as error:
        raise StoreError(f"cannot make a token store at {folder}: {error.strerror}") from error


def _make_catalog(staging: Path, folder: Path, layout: StoreLayout) -> None:
    """Make the catalog, and open it once: a store that cannot be written is not published."""
    try:
        with sqlite_errors(staging):
            Catalog.create(staging, layout.to_bytes())
        StoreWriter(staging, layout).close()
    except StoreError as error:
        message = error.message.replace(str(staging), str(folder))
        raise StoreError(message, hint=error.hint) from error


def stat_of(
    folder: Path, layout: StoreLayout, state: CatalogState, faults: Sequence[str]
) -> StoreStat:
    """Return what the store at `folder` holds."""
    num_rows = sum(info.num_rows for info in state.segments.values())
    return StoreStat(
        path=str(folder),
        num_records=num_rows - len(state.deleted),
        num_deleted=len(state.deleted),
        num_segments=len(state.segments),
        num_retired=len(state.retired),
        total_bytes=disk_bytes(folder),
        record_bytes=layout.record_bytes,
        scale_bytes=layout.scale_bytes,
        num_tokens=layout.num_tokens,
        hidden=layout.hidden,
        dtype=layout.dtype,
        fingerprint_encoder=layout.fingerprint_encoder,
        generation=state.generation,
        format_version=layout.format_version,
        created_by=layout.created_by,
        faults=tuple(faults),
    )
