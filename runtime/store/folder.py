"""A store's folder: made whole or not at all, and what it takes on disk."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...errors import EdjeError, StoreError
from ...folders import publish_folder
from .catalog import Catalog
from .layout import INCOMING, LOCK, READERS, SEGMENTS, STORE_JSON, StoreLayout


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


def folder_bytes(folder: Path) -> int:
    """Return what the files and folders below `folder` take on disk."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # SQLite removes its log when the writer closes
            total += path.stat().st_blocks * 512
    return total


def publish_store(folder: Path, layout: StoreLayout) -> None:
    """Write the files of an empty store, whole or not at all."""
    try:
        with publish_folder(folder) as staging:
            (staging / STORE_JSON).write_bytes(layout.to_bytes())
            (staging / SEGMENTS).mkdir()
            (staging / INCOMING).mkdir()
            (staging / LOCK).touch()
            (staging / READERS).touch()
            Catalog.create(staging, layout.to_bytes())
    except StoreError:
        raise
    except EdjeError as error:
        raise StoreError(error.message, hint="choose another folder for the store") from error
    except OSError as error:
        raise StoreError(f"cannot make a token store at {folder}: {error.strerror}") from error


def package_version() -> str:
    """Return the version of edje-runtime for `created_by`."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("edje-runtime")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "(not installed)"
