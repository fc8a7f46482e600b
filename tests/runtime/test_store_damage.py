"""The store's bytes, written out; and every kind of damage to them found and named."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash

from edje.errors import RequestError, StoreError
from edje.runtime.store import TokenStore

SIZES = {"num_tokens": 2, "hidden": 3, "fingerprint_encoder": "sha256:tower"}
IDS = ["a", "b/c.png", "é"]
PAGE = 4096


def tokens_of(count: int) -> np.ndarray:
    """Return float16 [count, 2, 3]: 0, 1, 2 ... in the order of memory."""
    return np.arange(count * 6, dtype=np.float16).reshape(count, 2, 3)


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    """A store of three small records in two segments of two."""
    with TokenStore.create(tmp_path / "s", segment_bytes=3 * PAGE, **SIZES) as store:
        store.append(IDS, tokens_of(3))
    return tmp_path / "s"


def read_marked(path: Path) -> tuple[np.ndarray, list[str]]:
    """Return float16 [3, 2, 3] and the bad records, as text."""
    out = np.full((3, 2, 3), np.nan, np.float16)
    with TokenStore.open(path) as store:
        bad = store.read(store.rows(IDS), out, bad="mark")
    return out, [str(record) for record in bad]


def flip(path: Path, bit: int) -> None:
    """Flip one bit in place (ext4 would flush a file that is cut and written anew)."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        value = file.read(1)[0] ^ (1 << (bit % 8))
        file.seek(bit // 8)
        file.write(bytes([value]))


def test_golden_header_page(store_path: Path) -> None:
    page = (store_path / "segments/000001.tokens").read_bytes()[:PAGE]
    expected = (
        b"EDJETOK\0"
        b"\x01\x00\x00\x00"  # format version
        b"\x00\x10\x00\x00"  # header bytes
        b"\x01\x00\x00\x00"  # segment
        b"\x01\x00\x00\x00"  # float16
        b"\x02\x00\x00\x00"  # tokens
        b"\x03\x00\x00\x00"  # hidden
        b"\x0c\x00\x00\x00\x00\x00\x00\x00"  # record bytes
        b"\x00\x10\x00\x00\x00\x00\x00\x00"  # stride
        b"\x00\x00\x00\x00\x00\x00\x00\x00"  # scale bytes
        b"\x00\x00\x00\x00\x00\x00\x00\x00"
        b"sha256:tower"
    )
    assert page[:76] == expected
    assert page[76:4088] == bytes(4012)
    assert page[4088:].hex() == "04ba35589f94c157"
    assert page[4088:] == xxhash.xxh3_64_intdigest(page[:4088]).to_bytes(8, "little")


def test_golden_records(store_path: Path) -> None:
    first = (store_path / "segments/000000.tokens").read_bytes()
    assert len(first) == 3 * PAGE
    # float16: 1 = 0x3c00, 2 = 0x4000, 3 = 0x4200 ...
    assert first[PAGE : PAGE + 12].hex() == "0000003c0040004200440045"
    assert first[PAGE + 12 : 2 * PAGE] == bytes(PAGE - 12), "padded to whole pages"
    assert first[2 * PAGE : 2 * PAGE + 12].hex() == "004600470048804800498049"


def test_golden_store_json(store_path: Path) -> None:
    values = json.loads((store_path / "store.json").read_bytes())
    created_by = values.pop("created_by")
    assert created_by.startswith("edje-runtime ")
    assert len(values.pop("checksum")) == 16
    assert values == {
        "format": "edje-token-store",
        "format_version": 1,
        "num_tokens": 2,
        "hidden": 3,
        "dtype": "float16",
        "record_bytes": 12,
        "stride_bytes": 4096,
        "segment_bytes": 12288,
        "fingerprint_encoder": "sha256:tower",
    }


def test_records_of_whole_pages_are_not_padded(tmp_path: Path) -> None:
    tokens = np.arange(64 * 384, dtype=np.uint16).view(np.float16).reshape(1, 64, 384)
    sizes = {"num_tokens": 64, "hidden": 384, "fingerprint_encoder": "x"}
    with TokenStore.create(tmp_path / "s", **sizes) as store:
        store.append(["a"], tokens)
    content = (tmp_path / "s/segments/000000.tokens").read_bytes()
    assert content[PAGE:] == tokens.tobytes()
    assert len(content[PAGE:]) == 49_152


@pytest.mark.parametrize("bit", [0, 7, 40, 12 * 8 - 1])
def test_a_flipped_bit_of_a_record_is_found_and_the_others_are_served(
    store_path: Path, bit: int
) -> None:
    flip(store_path / "segments/000000.tokens", (2 * PAGE) * 8 + bit)
    out, bad = read_marked(store_path)
    assert bad == ["id 'b/c.png' (segment 0, row 1): its bytes do not fit its checksum"]
    assert np.array_equal(out[[0, 2]], tokens_of(3)[[0, 2]])
    assert not out[1].any(), "nothing unverified leaves the store"
    with TokenStore.open(store_path) as store, pytest.raises(StoreError) as caught:
        store.read(store.rows(IDS), out)
    assert caught.value.faults == tuple(bad)
    assert "1 of 3 records" in caught.value.message


def test_a_flipped_bit_of_a_header_page_is_found(store_path: Path) -> None:
    header = store_path / "segments/000000.tokens"
    for bit in [*random.Random(0).sample(range(PAGE * 8), 40), 0, PAGE * 8 - 1]:
        flip(header, bit)
        out, bad = read_marked(store_path)
        assert [line[:40] for line in bad] == [
            "id 'a' (segment 0, row 0): its file 0000",
            "id 'b/c.png' (segment 0, row 1): its fil",
        ]
        assert "header page is damaged" in bad[0]
        assert np.array_equal(out[2], tokens_of(3)[2])
        flip(header, bit)
    assert read_marked(store_path)[1] == []


def test_truncation_is_found_at_every_length(store_path: Path) -> None:
    segment = store_path / "segments/000000.tokens"
    for length in reversed(range(0, segment.stat().st_size, 512)):
        os.truncate(segment, length)
        out, bad = read_marked(store_path)
        whole = [length >= PAGE + 12, length >= 2 * PAGE + 12, True]
        expected = [image_id for image_id, good in zip(IDS, whole, strict=True) if not good]
        assert [line.split("'")[1] for line in bad] == expected, f"cut to {length} bytes"
        assert np.array_equal(out[whole], tokens_of(3)[whole])


def test_a_file_that_shrinks_while_open_gives_an_error(store_path: Path) -> None:
    out = np.empty((3, 2, 3), np.float16)
    with TokenStore.open(store_path) as store:
        assert store.read(store.rows(IDS), out) == []
        os.truncate(store_path / "segments/000000.tokens", PAGE + 5)
        with pytest.raises(StoreError, match=r"id 'a' \(segment 0, row 0\): .* ends 7 bytes early"):
            store.read(store.rows(IDS), out)


def test_a_missing_or_exchanged_segment_is_found(store_path: Path) -> None:
    first, second = (store_path / f"segments/00000{number}.tokens" for number in (0, 1))
    shutil.copy(first, second)
    assert read_marked(store_path)[1] == [
        "id 'é' (segment 1, row 0): its file 000001.tokens cannot be used: "
        "it belongs to another store or place (its header says segment 0)"
    ]
    second.unlink()
    assert "No such file or directory" in read_marked(store_path)[1][0]


def test_records_in_each_others_place_are_found(store_path: Path) -> None:
    """Whole records, but under wrong ids: the checksum is seeded with the id."""
    with TokenStore.open(store_path, mode="a") as store:
        store.append(["twin", "other"], np.zeros((2, 2, 3), np.float16))
    segment = store_path / "segments/000000.tokens"
    content = segment.read_bytes()
    segment.write_bytes(content[:PAGE] + content[2 * PAGE :] + content[PAGE : 2 * PAGE])
    assert [line.split("'")[1] for line in read_marked(store_path)[1]] == ["a", "b/c.png"]


def test_any_flipped_bit_of_store_json_is_found(store_path: Path) -> None:
    path = store_path / "store.json"
    for bit in range(len(path.read_bytes()) * 8):
        flip(path, bit)
        with pytest.raises(StoreError, match=r"store\.json (is damaged|has format version)"):
            TokenStore.open(store_path)
        flip(path, bit)
    TokenStore.open(store_path).close()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"null"])
def test_a_damaged_store_json_is_named(store_path: Path, content: bytes) -> None:
    (store_path / "store.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"store\.json is damaged"):
        TokenStore.open(store_path)


def test_another_format_version_is_named(store_path: Path) -> None:
    values = json.loads((store_path / "store.json").read_bytes())
    del values["checksum"]
    values |= {"format_version": 2, "something": "new"}
    check = xxhash.xxh3_64_hexdigest(json.dumps(values, sort_keys=True).encode())
    (store_path / "store.json").write_text(json.dumps({**values, "checksum": check}))
    with pytest.raises(StoreError, match="has format version 2, this edje reads 1"):
        TokenStore.open(store_path)


@pytest.mark.parametrize("mode", ["r", "a"])
def test_a_missing_store_is_named_with_the_command(tmp_path: Path, mode: str) -> None:
    with pytest.raises(StoreError, match="there is no token store") as caught:
        TokenStore.open(tmp_path / "none", mode=mode)  # type: ignore[arg-type]
    assert "edje index" in str(caught.value)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("mode", ["r", "a"])
@pytest.mark.parametrize("content", [None, b"", b"no database", b"SQLite format 3\0" + bytes(500)])
def test_a_missing_or_foreign_catalog_is_named(
    store_path: Path, content: bytes | None, mode: str
) -> None:
    catalog = store_path / "catalog.sqlite"
    catalog.unlink()
    if content is not None:
        catalog.write_bytes(content)
    with pytest.raises(StoreError, match=r"catalog\.sqlite"):
        TokenStore.open(store_path, mode=mode)  # type: ignore[arg-type]


def test_flipped_bits_of_the_catalog_never_give_wrong_tokens(store_path: Path) -> None:
    """Each flip is found at opening, or at reading, or changes nothing (unused bytes)."""
    catalog = store_path / "catalog.sqlite"
    size = len(catalog.read_bytes())
    used = catalog.read_bytes().find(IDS[1].encode())
    near = range((used - 60) * 8, (used + 120) * 8, 5)
    found = 0
    for bit in [*near, *random.Random(1).sample(range(size * 8), 100)]:
        flip(catalog, bit)
        try:
            out, bad = read_marked(store_path)
        except (StoreError, RequestError):
            found += 1
        else:
            found += bool(bad)
            good = [not any(f"id {name!r} " in line for line in bad) for name in IDS]
            assert np.array_equal(out[good], tokens_of(3)[good])
        flip(catalog, bit)
        for extra in store_path.glob("catalog.sqlite-*"):
            extra.unlink()
    assert found > len(near) // 2


def test_an_append_does_not_touch_a_damaged_segment(store_path: Path) -> None:
    flip(store_path / "segments/000001.tokens", 100)
    with TokenStore.open(store_path, mode="a") as store:
        with pytest.raises(StoreError, match=r"cannot append to .* header page is damaged"):
            store.append(["new"], tokens_of(1))
        assert store.ids() == IDS
