"""A store's records as safetensors shards, and back: for other tools, other machines, backups.

An exported folder holds `tokens-00000-of-000NN.safetensors` (see `shards.py`) and `index.json`:
what the tokens are, and of every shard its name, number of records, bytes, and the xxh3-128 of
each tensor. safetensors itself has no checksum.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from ...arguments import Arguments, Progress, StrPath, path_of
from ...arrays import Array, Float16, Int64
from ...errors import RequestError, StoreError
from ...files import is_free, publish_folder
from .format import DEFAULT_SEGMENT_BYTES, StoreLayout
from .records import nonfinite_records
from .shard import (
    FORMAT,
    FORMAT_VERSION,
    ShardError,
    ShardHeader,
    ShardReader,
    ShardWriter,
    read_header,
)
from .store import TokenStore

INDEX_JSON = "index.json"
MAX_INDEX_BYTES = 64 << 20  # a line of 400 bytes for every GiB: 160 TB of tokens
DEFAULT_SHARD_BYTES = 1 << 30
MAX_FAULTS = 20
MAX_BATCH_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote; `total_bytes` is of the shards."""

    path: str
    num_records: int
    num_shards: int
    total_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import added; `num_present` records were in the store already, by their ids."""

    store: str
    num_added: int
    num_present: int
    num_shards: int
    seconds: float


def export_store(
    store: TokenStore,
    out: StrPath,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write every live record of a store into safetensors shards, verified as it is read.

    Args:
        store: open; its snapshot is what is written, in the order of the disk.
        out: the folder, published whole or not at all.
        shard_bytes: a shard's tokens take no more (one record always fits).
        overwrite: replace `out` if it is an exported folder.
        progress: called with (records done, records in all).

    Raises:
        StoreError: a damaged record, or the disk is full; then nothing is published.
        EdjeError: `out` holds something (with `overwrite`: no exported shards).
    """
    given = Arguments("export_store")
    out = given.path("out", out)
    shard_bytes = given.whole("shard_bytes", shard_bytes, "1 or more")
    given.check()
    started = time.perf_counter()
    ids = store.ids()
    rows = store.rows(ids)
    size = max(1, shard_bytes // (store.layout.record_bytes + store.layout.scale_bytes))
    starts = range(0, len(ids), size)
    entries: list[dict[str, Any]] = []
    with publish_folder(out, manifest=INDEX_JSON, overwrite=overwrite) as staging:
        for number, start in enumerate(starts):
            path = staging / f"tokens-{number:05d}-of-{len(starts):05d}.safetensors"
            shown, stop = _from(progress, start, len(ids)), start + size
            entries.append(_write_shard(store, path, ids[start:stop], rows[start:stop], shown))
        (staging / INDEX_JSON).write_bytes(_index_bytes(store.layout, entries))
    total = sum(entry["bytes"] for entry in entries)
    seconds = time.perf_counter() - started
    return ExportReport(str(out), len(ids), len(starts), total, seconds)


def import_store(
    source: StrPath,
    store: StrPath,
    *,
    dtype: str | None = None,
    fingerprint_encoder: str | None = None,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> ImportReport:
    """Append the records of shards to a store; records whose ids it has already are left out.

    So the same import again continues one that was interrupted. All headers are checked before
    the first record is added; where there is an `index.json`, a shard is verified whole before
    any of it is added, and a damaged one does not keep the others out.

    Args:
        source: an exported folder, a folder of shards that somebody else wrote, or one shard.
        store: a token store, made if there is none.
        dtype: of a new store: the shards' (None), or `int8` to quantise float16 tokens.
        fingerprint_encoder: names the encoder of shards that do not name it themselves.
        allow_nonfinite: also add records that hold NaN or infinity; else these are left out and
            named when everything else was added.
        progress: called with (records done, records in all).

    Raises:
        RequestError: no shards, or shards that cannot go into one store (all faults named).
        StoreError: a damaged shard or record (the others were added), another encoder's store,
            disk full.
    """
    source, store = path_of("source", source), path_of("store", store)
    started = time.perf_counter()
    headers, hashes = _read_source(source)
    layout = _common_layout(source, headers, fingerprint_encoder)
    total = sum(header.num_records for header in headers)
    done, added = 0, 0
    damaged: list[str] = []
    with _open_target(store, layout, dtype) as target:
        for header in headers:
            shown = _from(progress, done, total)
            try:
                left_out = None if allow_nonfinite else damaged
                added += _add_shard(target, header, hashes.get(header.path.name), left_out, shown)
            except ShardError as fault:
                damaged += [f"{header.path.name}: {reason}" for reason in fault.faults]
            done += header.num_records
    if damaged:
        raise StoreError(
            f"not all of {source} could be added to {store}: {added} records were",
            faults=damaged[:MAX_FAULTS],
            hint="put whole copies of damaged shards there, let NaN and infinity in with "
            "--allow-nonfinite, and run the same import again",
        )
    seconds = time.perf_counter() - started
    return ImportReport(str(store), added, total - added, len(headers), seconds)


def _write_shard(
    store: TokenStore, path: Path, ids: list[str], rows: Int64, progress: Progress
) -> dict[str, Any]:
    """Write one shard; return its entry of the index."""
    try:
        with ShardWriter(path, store.layout, ids) as shard:
            for part, tokens, scales in _batches(store.layout, len(rows)):
                store.read(rows[part], tokens, scales)
                shard.write(tokens, scales)
                progress(part.stop, len(rows))
            hashes = shard.hashes()
    except OSError as error:
        raise StoreError(f"cannot write {path.name}: {error.strerror}") from error
    size = path.stat().st_size
    return {"file": path.name, "num_records": len(ids), "bytes": size, "xxh3_128": hashes}


def _add_shard(
    store: TokenStore,
    header: ShardHeader,
    hashes: Mapping[str, str] | None,
    left_out: list[str] | None,
    progress: Progress,
) -> int:
    """Add what the store lacks of one shard; return how many records.

    Those that are not finite are named in `left_out`, or added where that is None.
    """
    added, layout = 0, _layout_of(header, store.fingerprint_encoder)
    with ShardReader(header) as shard:
        if hashes is not None:
            shard.verify(hashes)
        ids = shard.ids()
        for part, tokens, scales in _batches(layout, len(ids)):
            batch = ids[part]
            missing = [place for place, image_id in enumerate(batch) if image_id not in store]
            if missing:
                shard.read(part.start, tokens, scales)
                if left_out is not None:
                    odd = set(nonfinite_records(tokens, scales).tolist())
                    names = [batch[place] for place in missing if place in odd]
                    left_out += [f"{header.path.name}: {name!r} is not finite" for name in names]
                    missing = [place for place in missing if place not in odd]
                kept = None if scales is None else scales[missing]
                new = [batch[place] for place in missing]
                store.append(new, tokens[missing], kept, allow_nonfinite=left_out is None)
            added += len(missing)
            progress(part.stop, len(ids))
    return added


def _batches(layout: StoreLayout, count: int) -> Iterator[tuple[slice, Array, Float16 | None]]:
    """Yield parts of `count` records with memory for each, 32 MiB that the next one overwrites."""
    size = max(1, min(count, MAX_BATCH_BYTES // (layout.record_bytes + layout.scale_bytes)))
    tokens, scales = layout.buffers(size)
    for start in range(0, count, size):
        num = min(size, count - start)
        yield slice(start, start + num), tokens[:num], None if scales is None else scales[:num]


def _read_source(source: Path) -> tuple[list[ShardHeader], dict[str, dict[str, str]]]:
    """Return the headers of all shards, and the hashes that an index has of them."""
    if source.is_dir():
        folder, paths = source, sorted(source.glob("*.safetensors"))
    elif source.is_file():
        folder, paths = source.parent, [source]
    else:
        raise RequestError(f"there is no {source}", hint="give a folder of safetensors shards")
    entries = _read_index(folder / INDEX_JSON)
    faults = []
    if entries is not None and source.is_dir():
        here, known = {path.name for path in paths}, entries.keys()
        faults += [f"{name}: missing, {INDEX_JSON} lists it" for name in sorted(known - here)]
        faults += [f"{name}: not in {INDEX_JSON}" for name in sorted(here - known)]
    elif not paths:
        faults.append("it holds no .safetensors files")
    headers = []
    for path in paths:
        try:
            headers.append(read_header(path))
        except StoreError as error:
            faults += [f"{path.name}: {fault}" for fault in error.faults or [error.message]]
    if faults:
        raise RequestError(f"cannot import {source}", faults=faults[:MAX_FAULTS])
    return headers, entries or {}


def _read_index(path: Path) -> dict[str, dict[str, str]] | None:
    """Return shard name -> tensor name -> hash; None where there is no index."""
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError("too large")
        values = json.loads(path.read_bytes())
        if values["format_version"] != FORMAT_VERSION or values["format"] != FORMAT:
            raise ValueError("another format or version")
        if values.pop("checksum") != _checksum(values):
            raise ValueError("its checksum")
        return {entry["file"]: entry["xxh3_128"] for entry in values["shards"]}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise RequestError(
            f"{path} is damaged or no index of token shards ({error})",
            hint="restore it from a copy; without the file, shards are imported unverified",
        ) from error


def _index_bytes(layout: StoreLayout, entries: Sequence[Mapping[str, Any]]) -> bytes:
    values: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint_encoder": layout.fingerprint_encoder,
        "num_tokens": layout.num_tokens,
        "hidden": layout.hidden,
        "dtype": layout.dtype,
        "created_by": layout.created_by,
        "num_records": sum(entry["num_records"] for entry in entries),
        "shards": entries,
    }
    values["checksum"] = _checksum(values)
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _checksum(values: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(values, sort_keys=True).encode())


def _common_layout(
    source: Path, headers: Sequence[ShardHeader], fingerprint: str | None
) -> StoreLayout:
    """Return what the records of all shards look like; they must agree."""
    found: dict[StoreLayout, str] = {}
    faults = []
    for header in headers:
        name, named = header.path.name, header.metadata.get("fingerprint_encoder", fingerprint)
        if named is None:
            faults.append(f"{name}: says nothing of the encoder that made the tokens")
        elif fingerprint not in (None, named):
            faults.append(f"{name}: encoder {named}, expected {fingerprint}")
        else:
            found.setdefault(_layout_of(header, named), name)
    if len(found) > 1:
        faults += [
            f"{name}: {layout.dtype} [{layout.num_tokens}, {layout.hidden}], "
            f"encoder {layout.fingerprint_encoder}"
            for layout, name in found.items()
        ]
    if faults or not found:
        raise RequestError(
            f"the shards of {source} cannot go into one store",
            faults=faults[:MAX_FAULTS] or ["there are none"],
            hint="name the encoder with --fingerprint, as `edje store stat` shows it",
        )
    return next(iter(found))


def _layout_of(header: ShardHeader, fingerprint: str) -> StoreLayout:
    """Return what the shard's records look like, as a store would say it."""
    num_tokens, hidden = header.record_shape
    return StoreLayout(num_tokens, hidden, header.dtype, fingerprint, DEFAULT_SEGMENT_BYTES, "")


def _open_target(path: Path, source: StoreLayout, dtype: str | None) -> TokenStore:
    """Open the store to append to, or make it; refuse one that cannot take the records."""
    is_new = is_free(path)
    layout = replace(source, dtype=dtype or source.dtype) if is_new else StoreLayout.read(path)
    faults = [
        f"{name}: the store has {getattr(layout, name)}, the shards have {getattr(source, name)}"
        for name in ("fingerprint_encoder", "num_tokens", "hidden")
        if getattr(layout, name) != getattr(source, name)
    ]
    if dtype not in (None, layout.dtype):
        faults.append(f"dtype: the store has {layout.dtype}, asked for was {dtype}")
    if faults:
        raise StoreError(
            f"the store {path} cannot take these shards",
            faults=faults,
            hint="import into a new store: tokens of two encoders do not compare",
        )
    if source.dtype == "int8" and layout.dtype == "float16":
        raise StoreError(
            "int8 tokens cannot go into a float16 store: it would look exact and not be",
            hint="import into an int8 store; every engine reads one",
        )
    if not is_new:
        return TokenStore.open(path, mode="a")
    return TokenStore.create(
        path,
        num_tokens=layout.num_tokens,
        hidden=layout.hidden,
        dtype=layout.dtype,
        fingerprint_encoder=layout.fingerprint_encoder,
    )


def _from(progress: Progress | None, first: int, total: int) -> Progress:
    """Return a progress of one part that counts on from `first`."""

    def show(done: int, _: int) -> None:
        if progress is not None:
            progress(first + done, total)

    return show
