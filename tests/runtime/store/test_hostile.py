"""Files with right checksums and values that cannot be: refused, and no memory taken for them."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from edje.errors import EdjeError, StoreError
from edje.runtime.store import SegmentWriter, StoreLayout, TokenStore
from store_bytes import rewrite, rows_of
from store_history import (
    FINGERPRINT,
    Operation,
    Sizes,
    buffers,
    joined,
    served_bytes,
    write_segment,
)

PAGE = 4096


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[TokenStore]:
    with Sizes(8, 256, segment_bytes=10 * PAGE).create(tmp_path / "s") as store:
        Operation("append", tuple((f"id-{at}", at) for at in range(20))).apply(store)
        yield store


def folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def peak_of(call: Callable[[], object]) -> tuple[int, Exception | None]:
    """Return the most bytes that were allocated while `call` ran, and what it raised."""
    raised = None
    tracemalloc.start()
    try:
        call()
    except EdjeError as error:
        raised = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak, raised


BOMB = zlib.compress(bytes(64 << 20), 9)


def forge(
    path: Path, content: bytes | None = None, *, num_rows: int | None = None, ids_bytes: int = -1
) -> None:
    """Put another footer, with right checks, behind the records of a segment of two."""
    old = path.read_bytes()
    magic, version, zero, key, count, size, check, zero2, _ = struct.unpack(
        "<8sIIQQQQQQ", old[-64:]
    )
    at = 3 * PAGE
    content = old[at : at + count * 24 + size] if content is None else content
    count = count if num_rows is None else num_rows
    size = len(content) - count * 24 if ids_bytes < 0 else ids_bytes
    size = max(0, size)
    check = xxhash.xxh3_64_intdigest(content)
    trailer = struct.pack("<8sIIQQQQQ", magic, version, zero, key, count, size, check, zero2)
    trailer += xxhash.xxh3_64_intdigest(trailer).to_bytes(8, "little")
    whole = -(-(len(content) + 64) // PAGE) * PAGE
    path.write_bytes(old[:at] + content.ljust(whole - 64, b"\0") + trailer)


def footer_content(names: list[bytes], packed: bytes) -> bytes:
    digests = b"".join(map(xxhash.xxh3_128_digest, names))
    return digests + bytes(8 * len(names)) + packed


FORGERIES: dict[str, Callable[[Path], None]] = {
    "rows": lambda path: forge(path, num_rows=1 << 62),
    "rows_of_a_segment": lambda path: forge(path, num_rows=9),
    "no_rows": lambda path: forge(path, b"", num_rows=0),
    "ids_bytes": lambda path: forge(path, ids_bytes=1 << 62),
    "overflow": lambda path: forge(path, num_rows=(1 << 64) // 24 + 1, ids_bytes=8),
    "bomb": lambda path: forge(path, footer_content([b"a", b"b"], BOMB)),
    "bomb_of_no_rows": lambda path: forge(path, BOMB, num_rows=0),
    "no_zlib": lambda path: forge(path, footer_content([b"a", b"b"], b"ids")),
    "too_few_ids": lambda path: forge(path, footer_content([b"a", b"b"], zlib.compress(b"a"))),
    "no_utf8": lambda path: forge(path, footer_content([b"a", b"b"], zlib.compress(b"a\0\xff"))),
    "twins": lambda path: forge(path, footer_content([b"a", b"a"], zlib.compress(b"a\0a"))),
    "names_of_others": lambda path: forge(
        path, path.read_bytes()[3 * PAGE :][:48] + zlib.compress(b"x\0y")
    ),
    "header": lambda path: path.write_bytes(b"EDJETOK\1" + path.read_bytes()[8:]),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-PAGE]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_segment_is_refused_and_takes_no_memory(victim: TokenStore, name: str) -> None:
    path = write_segment(victim, Operation("commit", (("a", 1), ("b", 2))))
    FORGERIES[name](path)
    size = path.stat().st_size if path.exists() else 0
    before = served_bytes(victim)
    peak, error = peak_of(lambda: victim.commit_segments([path]))
    assert isinstance(error, StoreError)
    assert path.name in str(error)
    assert peak <= size + (1 << 18)
    assert served_bytes(victim) == before
    good = write_segment(victim, Operation("commit", (("c", 1),)))
    assert victim.commit_segments([good]).num_added == 1


def test_twins_with_right_checksums_are_refused(victim: TokenStore) -> None:
    """One id twice in one segment, each record whole."""
    path = write_segment(victim, Operation("commit", (("a", 1), ("b", 2))))
    content = bytearray(path.read_bytes())
    content[2 * PAGE : 3 * PAGE] = content[PAGE : 2 * PAGE]
    footer = content[3 * PAGE :]
    twice = bytes(footer[:16] * 2 + footer[32:40] * 2) + zlib.compress(b"a\0a")
    path.write_bytes(content)
    forge(path, twice)
    with pytest.raises(StoreError, match="twice"):
        victim.commit_segments([path])
    assert "a" not in victim


def test_a_segment_of_another_layout_is_refused(victim: TokenStore) -> None:
    for sizes in (Sizes(4, 512), Sizes(8, 256, "int8"), Sizes(8, 128)):
        other = sizes.create(
            victim.path.with_name(f"{sizes.num_tokens}-{sizes.hidden}-{sizes.dtype}")
        )
        path = write_segment(other, Operation("commit", (("a", 1),)))
        with pytest.raises(StoreError, match="cannot be added"):
            victim.commit_segments([path])
        other.close()
    layout = StoreLayout(8, 256, "float16", FINGERPRINT + "2", 10 * PAGE, "")
    with SegmentWriter(victim.path / "incoming/x.tokens", layout) as segment:
        segment.append(["a"], np.zeros((1, 8, 256), np.float16))
    with pytest.raises(StoreError, match="cannot be added"):
        victim.commit_segments([victim.path / "incoming/x.tokens"])
    assert len(victim) == 20


def forge_batch(path: Path, **changes: bytes) -> None:
    location, ids, digests, checksums = rows_of(path, "batches")[0]
    row = {"ids": ids, "digests": digests, "checksums": checksums, **changes}
    rewrite(path, "batches", f"location = {location}", (location, *row.values()))


HOSTILE: dict[str, Callable[[Path], None]] = {
    "many_rows": lambda path: rewrite(path, "segments", "segment = 1", (1, 1 << 31, 1, 5)),
    "most_rows": lambda path: rewrite(path, "segments", "segment = 1", (1, 1 << 62, 0, 5)),
    "no_rows": lambda path: rewrite(path, "segments", "segment = 1", (1, -5, 0, 5)),
    "segment": lambda path: rewrite(path, "segments", "segment = 3", ((1 << 31) - 1, 2, 0, 5)),
    "most_segment": lambda path: rewrite(path, "segments", "segment = 3", (1 << 62, 2, 0, 5)),
    "no_segment": lambda path: rewrite(path, "segments", "segment = 3", (-1, 2, 0, 5)),
    "bomb": lambda path: forge_batch(path, ids=BOMB),
    "bomb_of_no_rows": lambda path: forge_batch(path, ids=BOMB, digests=b"", checksums=b""),
    "no_zlib": lambda path: forge_batch(path, ids=b"ids"),
    "odd_digests": lambda path: forge_batch(path, digests=bytes(17)),
    "long_digests": lambda path: forge_batch(path, digests=bytes(1 << 16)),
    "odd_checksums": lambda path: forge_batch(path, checksums=bytes(7)),
    "location": lambda path: rewrite(path, "batches", "FALSE", (1 << 62, b"", b"", b"")),
    "deletions": lambda path: rewrite(path, "deletions", "FALSE", (9, bytes(7))),
    "foreign_deletions": lambda path: rewrite(path, "deletions", "FALSE", (9, b"\xff" * 8)),
    "generation": lambda path: rewrite(path, "state", "TRUE", (1 << 62, 1 << 62, 3, 0, b"")),
    "counts": lambda path: rewrite(path, "state", "TRUE", (1, 4, 1 << 40, 1 << 40, b"")),
    "retired": lambda path: rewrite(path, "retired", "FALSE", (1, 1)),
    "most_retired": lambda path: rewrite(path, "retired", "FALSE", (1 << 62, -1)),
}


@pytest.mark.parametrize("mode", ["r", "a"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_catalog_takes_no_memory_and_gives_no_wrong_tokens(
    victim: TokenStore, name: str, mode: str
) -> None:
    """Rows with right checks and values that cannot be: refused, or the rest is served."""
    expected = served_bytes(victim)
    victim.close()
    HOSTILE[name](victim.path)
    size = folder_bytes(victim.path)
    got: dict[str, bytes] = {}

    def use() -> None:
        with TokenStore.open(victim.path, mode=mode) as store:  # type: ignore[arg-type]
            ids = [image_id for image_id in expected if image_id in store]
            tokens, scales = buffers(store, len(ids))
            bad = store.read(store.rows(ids), tokens, scales, bad="mark")
            lost = {record.id for record in bad}
            served = joined(ids, tokens, scales)
            got.update({i: content for i, content in served.items() if i not in lost})
            store.ids()

    peak, _ = peak_of(use)
    assert peak <= 2 * size + (1 << 20)
    assert got.items() <= expected.items()
