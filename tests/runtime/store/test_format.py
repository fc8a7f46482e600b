"""The bytes of a store, written out; and a reader made from the format's text alone."""

from __future__ import annotations

import json
import sqlite3
import struct
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import xxhash

from edje.runtime.store import StoreLayout, TokenStore
from edje.runtime.store import segment as segment_file
from edje.tokens import quantize_tokens
from store_bytes import rows_of
from store_history import Operation, Sizes, expected_bytes

PAGE = 4096
KEY = 0x0123456789ABCDEF
IDS = ["a", "b/c.png", "é"]
SIZES = {"num_tokens": 2, "hidden": 3, "fingerprint_encoder": "sha256:tower"}


def tokens_of(count: int) -> np.ndarray:
    """Return float16 [count, 2, 3]: 0, 1, 2 ... in the order of memory."""
    return np.arange(count * 6, dtype=np.float16).reshape(count, 2, 3)


def values_of(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 [count, 2, 3]: 0, 1, 2 ..., and scales float16 [count, 2]: 0.5, 1, 1.5 ..."""
    values = np.arange(count * 6, dtype=np.int8).reshape(count, 2, 3)
    return values, (np.arange(1, count * 2 + 1) / 2).astype(np.float16).reshape(count, 2)


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a float16 and an int8 store of three records, a sealed segment of two first."""
    monkeypatch.setattr(segment_file.secrets, "randbits", lambda bits: KEY)
    for dtype, pages in (("float16", 3), ("int8", 4)):
        path = tmp_path / dtype
        with TokenStore.create(path, dtype=dtype, segment_bytes=pages * PAGE, **SIZES) as store:
            if dtype == "int8":
                store.append(IDS, *values_of(3))
            else:
                store.append(IDS, tokens_of(3))
            store.delete(["b/c.png"])
    return tmp_path


HEADERS = {
    "float16": (
        b"\x01\x00\x00\x00\x02\x00\x00\x00\x03\x00\x00\x00"  # dtype, tokens, hidden
        b"\x00\x00\x00\x00"  # records a scales page
        b"\x0c\x00\x00\x00\x00\x00\x00\x00"  # record bytes
        b"\x00\x10\x00\x00\x00\x00\x00\x00"  # stride
        b"\x00\x00\x00\x00\x00\x00\x00\x00"  # scale bytes
    ),
    "int8": (
        b"\x02\x00\x00\x00\x02\x00\x00\x00\x03\x00\x00\x00"
        b"\x00\x04\x00\x00"
        b"\x06\x00\x00\x00\x00\x00\x00\x00"
        b"\x00\x10\x00\x00\x00\x00\x00\x00"
        b"\x04\x00\x00\x00\x00\x00\x00\x00"
    ),
}
HEADER_CHECKS = {"float16": "9c2327c55269846b", "int8": "5e38e3199e50ec85"}


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_golden_header_page(golden: Path, dtype: str) -> None:
    page = (golden / dtype / "segments/000001.tokens").read_bytes()[:PAGE]
    start = b"EDJETOK\0\x02\x00\x00\x00\x00\x10\x00\x00"  # magic, version, header bytes
    assert page[:64] == start + HEADERS[dtype] + bytes.fromhex("efcdab8967452301")
    assert page[64:76] == b"sha256:tower"
    assert page[76:4088] == bytes(4012)
    assert page[4088:].hex() == HEADER_CHECKS[dtype]
    assert page[4088:] == xxhash.xxh3_64_intdigest(page[:4088]).to_bytes(8, "little")


def test_golden_float16_records(golden: Path) -> None:
    first = (golden / "float16/segments/000001.tokens").read_bytes()
    # float16: 1 = 0x3c00, 2 = 0x4000, 3 = 0x4200 ...
    assert first[PAGE : PAGE + 12].hex() == "0000003c0040004200440045"
    assert first[PAGE + 12 : 2 * PAGE] == bytes(PAGE - 12), "padded to whole pages"
    assert first[2 * PAGE : 2 * PAGE + 12].hex() == "004600470048804800498049"
    second = (golden / "float16/segments/000002.tokens").read_bytes()
    assert len(second) == 2 * PAGE
    assert second[PAGE : PAGE + 12].hex() == "004a804a004b804b004c404c"


def test_golden_int8_records(golden: Path) -> None:
    first = (golden / "int8/segments/000001.tokens").read_bytes()
    # float16 scales 0.5, 1 | 1.5, 2, then a page each record
    assert first[PAGE : PAGE + 8].hex() == "0038003c003e0040"
    assert first[PAGE + 8 : 2 * PAGE] == bytes(PAGE - 8)
    assert first[2 * PAGE : 2 * PAGE + 6].hex() == "000102030405"
    assert first[2 * PAGE + 6 : 3 * PAGE] == bytes(PAGE - 6)
    assert first[3 * PAGE : 3 * PAGE + 6].hex() == "060708090a0b"
    second = (golden / "int8/segments/000002.tokens").read_bytes()
    assert second[PAGE : PAGE + 4].hex() == "00410042"
    assert second[2 * PAGE :] == bytes(range(12, 18)) + bytes(PAGE - 6)


DIGESTS = "a96faf705af16834e6c632b61e964e1f"  # xxh3-128 of "a"
CHECKSUMS = {"float16": "05accc75e7ec91f2", "int8": "b6ea7f9d922871be"}


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_golden_footer(golden: Path, dtype: str) -> None:
    content = (golden / dtype / "segments/000001.tokens").read_bytes()
    footer = content[-PAGE:]
    assert len(content) == (4 if dtype == "float16" else 5) * PAGE
    assert footer[:16].hex() == DIGESTS
    assert footer[16:32] == xxhash.xxh3_128_digest(b"b/c.png")
    assert footer[32:40].hex() == CHECKSUMS[dtype]
    assert footer[32:40] == checksum(b"a", dtype, 0).to_bytes(8, "little")
    assert footer[40:48] == checksum(b"b/c.png", dtype, 1).to_bytes(8, "little")
    magic, version, zero, key, count, size, check, zero2, own = struct.unpack(
        "<8sIIQQQQQQ", footer[-64:]
    )
    assert (magic, version, zero, key, count, zero2) == (b"EDJEFOOT", 2, 0, KEY, 2, 0)
    assert zlib.decompress(footer[48 : 48 + size]) == b"a\0b/c.png"
    assert footer[48 + size : -64] == bytes(PAGE - 64 - 48 - size)
    assert check == xxhash.xxh3_64_intdigest(footer[: 48 + size])
    assert own == xxhash.xxh3_64_intdigest(footer[-64:-8])


def checksum(name: bytes, dtype: str, at: int) -> int:
    """Return what the record `at` of the golden store must hash to, by the text."""
    seed = int.from_bytes(xxhash.xxh3_128_digest(name)[8:], "big")
    if dtype == "float16":
        return xxhash.xxh3_64_intdigest(tokens_of(3)[at].tobytes(), seed)
    values, scales = values_of(3)
    seed = xxhash.xxh3_64_intdigest(scales[at].tobytes(), seed)
    return xxhash.xxh3_64_intdigest(values[at].tobytes(), seed)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_golden_catalog(golden: Path, dtype: str) -> None:
    path = golden / dtype
    layout = (path / "store.json").read_bytes()
    assert rows_of(path, "state") == [(3, 3, 2, 1, layout)]
    assert rows_of(path, "segments") == [(1, 2, 1, KEY), (2, 1, 0, KEY)]
    assert rows_of(path, "deletions") == [(3, (1 << 32 | 1).to_bytes(8, "little"))]
    assert rows_of(path, "retired") == []
    (first, ids, digests, checksums), (second, *_) = rows_of(path, "batches")
    assert (first, second) == (1 << 32, 2 << 32)
    assert zlib.decompress(ids) == b"a\0b/c.png"
    assert digests[:16].hex() == DIGESTS
    assert checksums[:8].hex() == CHECKSUMS[dtype]
    with closing(sqlite3.connect(path / "catalog.sqlite")) as catalog:
        assert catalog.execute("PRAGMA application_id").fetchone() == (0x45444A45,)
        assert catalog.execute("PRAGMA user_version").fetchone() == (2,)
        assert catalog.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_golden_store_json(golden: Path) -> None:
    values = json.loads((golden / "int8/store.json").read_bytes())
    assert values.pop("created_by").startswith("edje-runtime ")
    assert len(values.pop("checksum")) == 16
    assert values == {
        "format": "edje-token-store",
        "format_version": 2,
        "num_tokens": 2,
        "hidden": 3,
        "dtype": "int8",
        "record_bytes": 6,
        "stride_bytes": 4096,
        "scale_bytes": 4,
        "group_records": 1024,
        "segment_bytes": 16384,
        "fingerprint_encoder": "sha256:tower",
    }


def test_full_size_records_take_no_byte_more_than_their_pages(tmp_path: Path) -> None:
    tokens = np.arange(64 * 384, dtype=np.uint16).view(np.float16).reshape(1, 64, 384)
    tokens[~np.isfinite(tokens)] = 0
    for dtype, pages in (("float16", 12), ("int8", 7)):
        path = tmp_path / dtype
        with Sizes(64, 384, dtype).create(path) as store:
            store.append(["a"], tokens)
        content = (path / "segments/000001.tokens").read_bytes()
        assert len(content) == (1 + pages) * PAGE
        if dtype == "float16":
            assert content[PAGE:] == tokens.tobytes()
        else:
            values, scales = quantize_tokens(tokens)
            assert content[PAGE : PAGE + 128] == scales.tobytes()
            assert content[2 * PAGE :] == values.tobytes()


@pytest.mark.parametrize(("dtype", "record_bytes"), [("float16", 49_152), ("int8", 24_576 + 128)])
def test_everything_but_the_records_takes_less_than_one_percent(
    tmp_path: Path, dtype: str, record_bytes: int
) -> None:
    """Catalog and footers of 4,096 small records, measured; then added to large ones."""
    with Sizes(2, 3, segment_bytes=PAGE * 1025).create(tmp_path / "s") as store:
        for start in range(0, 4096, 256):
            names = [f"train/{at:012}.jpg" for at in range(start, start + 256)]
            store.append(names, np.zeros((256, 2, 3), np.float16))
        assert store.stat().num_segments == 4
    files = sum(path.stat().st_size for path in (tmp_path / "s").rglob("*.*"))
    aside = files / 4096 - PAGE
    layout = StoreLayout(64, 384, dtype, "x", 1 << 30, "")
    assert layout.end(layout.max_rows) / layout.max_rows + aside <= 1.01 * record_bytes
    assert 40 < aside < 200


def read_by_the_text(path: Path) -> dict[str, bytes]:
    """Read a store as its format's text says, with nothing of the package."""
    layout = json.loads((path / "store.json").read_bytes())
    stride, scale_bytes = layout["stride_bytes"], layout["scale_bytes"]
    group = PAGE // scale_bytes if scale_bytes else 0
    dead = {
        at for _, blob in rows_of(path, "deletions") for (at,) in struct.iter_unpack("<q", blob)
    }
    records = {}
    for location, ids, digests, checksums in rows_of(path, "batches"):
        segment, first = location >> 32, location & 0xFFFFFFFF
        content = (path / f"segments/{segment:06d}.tokens").read_bytes()
        sums = struct.unpack(f"<{len(checksums) // 8}Q", checksums)
        for place, name in enumerate(zlib.decompress(ids).split(b"\0")):
            row = first + place
            scales, at = b"", PAGE + row * stride
            if group:
                at = PAGE + row // group * (PAGE + group * stride)
                scales = content[at + row % group * scale_bytes :][:scale_bytes]
                at += PAGE + row % group * stride
            tokens = content[at : at + layout["record_bytes"]]
            digest = digests[16 * place : 16 * place + 16]
            assert digest == xxhash.xxh3_128_digest(name)
            seed = int.from_bytes(digest[8:], "big")
            seed = xxhash.xxh3_64_intdigest(scales, seed) if scales else seed
            assert sums[place] == xxhash.xxh3_64_intdigest(tokens, seed)
            assert not any(content[at + len(tokens) : at + stride]), "padding is zero"
            if location + place not in dead:
                records[name.decode()] = tokens + scales
    return records


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_text_of_the_format_suffices_to_read_a_store(tmp_path: Path, dtype: str) -> None:
    """600 tokens: three records a page of scales."""
    model: dict[str, int] = {}
    with Sizes(600, 10, dtype, 40 * PAGE).create(tmp_path / "s") as store:
        for operation in (
            Operation("append", tuple((f"é/{at}", at) for at in range(31))),
            Operation("delete", (("é/4", 0), ("é/30", 0))),
            Operation("replace", (("é/7", 70), ("é/8", 80))),
            Operation("commit", (("é/7", 1), ("é/4", 2), ("new", 3))),
            Operation("delete", tuple((f"é/{at}", 0) for at in range(10, 20))),
            Operation("compact"),
        ):
            operation.apply(store)
            model = operation.after(model)
            assert read_by_the_text(store.path) == expected_bytes(model, store.layout)
