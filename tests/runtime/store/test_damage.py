"""Every kind of damage: found, named, and no obstacle to what is whole; then repaired."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import xxhash

import store_bytes
from edje.errors import EdjeError, StoreError
from edje.runtime.store import TokenStore
from edje.runtime.store.verify import verify_store
from store_history import MEMORY, Operation, Sizes, buffers, expected_bytes, findings, joined

PAGE = 4096
TABLES = ("state", "segments", "batches", "deletions", "retired")


@dataclass
class Damaged:
    """A store of two sealed segments and an open one, with some dead records, to be damaged."""

    path: Path
    model: dict[str, int]
    layout: object
    rows: dict[str, int]

    def segment(self, number: int) -> Path:
        return self.path / f"segments/{number:06d}.tokens"

    def in_segment(self, number: int) -> list[str]:
        return [image_id for image_id, row in self.rows.items() if row >> 32 == number]

    def serve(self, access: str = "cached") -> tuple[set[str], list[str]]:
        """Read everything; return the ids that came whole, and the bad records in words.

        Whatever comes must be what was stored.
        """
        ids = list(self.model)
        with TokenStore.open(self.path, access=access) as store:  # type: ignore[arg-type]
            known = [image_id for image_id in ids if image_id in store]
            tokens, scales = buffers(store, len(known))
            bad = store.read(store.rows(known), tokens, scales, bad="mark")
        got = joined(known, tokens, scales)
        lost = {record.id for record in bad}
        expected = expected_bytes(self.model, store.layout)
        assert {i for i in known if i not in lost and got[i] != expected[i]} == set()
        assert not any(any(got[image_id]) for image_id in lost), "nothing unverified comes out"
        return set(known) - lost, [str(record) for record in bad]

    def findings(self) -> list[str]:
        """Return what verification says, the records first."""
        return findings(verify_store(self.path))


@pytest.fixture(params=["float16", "int8"])
def damaged(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Damaged]:
    if "access" in request.fixturenames:  # O_DIRECT wants a disk
        yield make_store(tmp_path / "s", request.param)
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield make_store(Path(folder) / "s", request.param)


def make_store(path: Path, dtype: str) -> Damaged:
    sizes = Sizes(8, 256, dtype, segment_bytes=10 * PAGE)
    operations = [
        Operation("append", tuple((f"é/{number}", number) for number in range(20))),
        Operation("delete", (("é/3", 0), ("é/12", 0))),
        Operation("replace", (("é/5", 77),)),
    ]
    model: dict[str, int] = {}
    with sizes.create(path) as store:
        for operation in operations:
            operation.apply(store)
            model = operation.after(model)
        rows = dict(zip(model, store.rows(list(model)).tolist(), strict=True))
    assert len({row >> 32 for row in rows.values()}) == 3
    return Damaged(path, model, store.layout, rows)


def refused_by(part: str, call: Callable[[], object]) -> bool:
    """Return whether `call` is refused; the refusal must name the part that is damaged."""
    try:
        call()
    except EdjeError as error:
        if part not in str(error):
            raise
        return True
    return False


@pytest.fixture(params=["cached", "direct", "resident"])
def access(damaged: Damaged, request: pytest.FixtureRequest) -> str:
    if request.param == "direct":
        try:
            damaged.serve("direct")
        except StoreError as error:
            pytest.skip(f"no O_DIRECT here: {error}")
    return str(request.param)


def flip(path: Path, bit: int) -> None:
    """Flip one bit in place."""
    store_bytes.flip(path, bit // 8, 1 << bit % 8)


def some(count: int, seed: int, *always: int) -> list[int]:
    """Return `always` and eight more numbers below `count`."""
    return [*always, *random.Random(seed).sample(range(count), min(8, count))]


def test_a_flipped_bit_of_a_record_is_found_and_the_others_are_served(
    damaged: Damaged, access: str
) -> None:
    layout = damaged.layout
    for image_id, row in list(damaged.rows.items())[::5]:
        size, at = layout.record_bytes * 8, layout.offset(row & 255) * 8
        bits = [at + bit for bit in some(size, row, 0, size - 1)]
        if layout.scale_bytes:
            size, at = layout.scale_bytes * 8, layout.scales_offset(row & 255) * 8
            bits += [at + bit for bit in some(size, row, 0, size - 1)]
        for bit in bits:
            flip(damaged.segment(row >> 32), bit)
            served, bad = damaged.serve(access)
            assert served == set(damaged.model) - {image_id}
            assert len(bad) == 1
            assert bad[0].startswith(f"id {image_id!r} (segment {row >> 32}, row {row & 255}): ")
            flip(damaged.segment(row >> 32), bit)
    assert damaged.findings() == []


def test_a_damaged_record_is_named_by_whoever_reads_it(damaged: Damaged) -> None:
    image_id, row = list(damaged.rows.items())[7]
    flip(damaged.segment(row >> 32), damaged.layout.offset(row & 0xFFFFFFFF) * 8 + 100)
    with TokenStore.open(damaged.path) as store:
        with pytest.raises(StoreError) as caught:
            store.read(store.rows(list(damaged.model)), *buffers(store, len(damaged.model)))
        with pytest.raises(StoreError, match="damaged"):
            list(store.iterate(4))
    assert f"1 of {len(damaged.model)} records" in caught.value.message
    assert repr(image_id) in caught.value.faults[0]


@pytest.mark.parametrize("segment", [1, 3])
def test_a_flipped_bit_of_a_header_page_is_found(damaged: Damaged, segment: int) -> None:
    path = damaged.segment(segment)
    lost = set(damaged.in_segment(segment))
    for bit in [*some(PAGE * 8, 1, 0, PAGE * 8 - 1), *range(0, 64 * 8, 9)]:
        flip(path, bit)
        served, bad = damaged.serve()
        assert served == set(damaged.model) - lost
        assert len(bad) == len(lost)
        assert all(path.name in line and "header page is damaged" in line for line in bad)
        flip(path, bit)
    assert damaged.findings() == []


def test_a_flipped_bit_of_a_footer_is_found_and_all_is_served(damaged: Damaged) -> None:
    path, size = damaged.segment(1), damaged.segment(1).stat().st_size
    start = damaged.layout.end(damaged.layout.max_rows)
    assert start < size
    for bit in [
        *some((size - start) * 8, 2, 0),
        *range((size - start - 64) * 8, (size - start) * 8, 7),
    ]:
        flip(path, start * 8 + bit)
        assert damaged.serve() == (set(damaged.model), [])
        found = damaged.findings()
        assert len(found) == 1
        assert path.name in found[0] or "segment 1" in found[0]
        assert "footer" in found[0]
        flip(path, start * 8 + bit)
    assert damaged.findings() == []


def cells(path: Path) -> Iterator[tuple[str, int, str, int | bytes]]:
    """Yield (table, rowid, column, value) of the whole catalog, copies included."""
    with closing(sqlite3.connect(path / "catalog.sqlite")) as catalog:
        for table in (name + copy for name in TABLES for copy in ("", "_copy")):
            cursor = catalog.execute(f"SELECT rowid, * FROM {table}")
            columns = [entry[0] for entry in cursor.description][1:]
            for row_id, *values in cursor.fetchall():
                for column, value in zip(columns, values, strict=True):
                    yield table, row_id, column, value


def set_cell(path: Path, table: str, row_id: int, column: str, value: int | bytes) -> None:
    with closing(sqlite3.connect(path / "catalog.sqlite", isolation_level=None)) as catalog:
        catalog.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, row_id))


def flipped(value: int | bytes, bit: int) -> int | bytes:
    if isinstance(value, bytes):
        at = bit // 8 % len(value)
        return value[:at] + bytes([value[at] ^ 1 << bit % 8]) + value[at + 1 :]
    return value ^ 1 << bit % 31


def test_a_flipped_bit_of_a_catalog_row_is_found_and_all_is_served(damaged: Damaged) -> None:
    """Every cell of every table: the other copy serves, and verification says so."""
    with TokenStore.open(damaged.path), TokenStore.open(damaged.path, mode="a") as store:
        store.compact()  # beside a reader: its segments become retired ones
        store.delete(["é/0"])
    del damaged.model["é/0"]
    kept = (damaged.path / "catalog.sqlite").read_bytes()
    tried = set()
    for table, row_id, column, value in list(cells(damaged.path)):
        for bit in (20,) if value == row_id else (5, 77):
            set_cell(damaged.path, table, row_id, column, flipped(value, bit))
            assert damaged.serve() == (set(damaged.model), []), (table, column, bit)
            assert damaged.findings() != [], (table, row_id, column, bit)
            (damaged.path / "catalog.sqlite").write_bytes(kept)
        tried.add((table, column))
    assert len({table for table, _ in tried}) == 2 * len(TABLES)
    assert damaged.findings() == []


@pytest.mark.parametrize("segment", [1, 3])
def test_a_row_lost_in_both_copies_is_named_and_the_others_are_served(
    damaged: Damaged, segment: int
) -> None:
    """A sealed segment's footer knows it as well; that of the open one is lost."""
    for table, row_id, column, value in list(cells(damaged.path)):
        if table.startswith("batches") and column == "digests" and row_id >> 32 == segment:
            set_cell(damaged.path, table, row_id, column, flipped(value, 9))
    served, bad = damaged.serve()
    rest = set(damaged.model) - set(damaged.in_segment(segment))
    assert bad == []
    assert rest <= served < set(damaged.model)
    assert any(f"segment {segment}" in line for line in damaged.findings())
    verify_store(damaged.path, repair=True)
    assert damaged.findings() == []
    assert damaged.serve() == (set(damaged.model) if segment == 1 else served, [])


def test_flipped_bits_of_the_catalog_file_never_give_wrong_tokens(damaged: Damaged) -> None:
    """Anywhere in SQLite's own pages: refused, or served, or named; never other tokens."""
    catalog = damaged.path / "catalog.sqlite"
    served_all = 0
    served: list[tuple[set[str], list[str]]] = []
    bits = random.Random(1).sample(range(catalog.stat().st_size * 8), 250)
    for bit in [*range(0, 100 * 8, 11), *bits]:
        flip(catalog, bit)
        if not refused_by("catalog.sqlite", lambda: served.append(damaged.serve())):
            whole, bad = served.pop()
            served_all += whole == set(damaged.model)
            assert whole == set(damaged.model) or bad or damaged.findings(), bit
        flip(catalog, bit)
        for extra in damaged.path.glob("catalog.sqlite-*"):
            extra.unlink()
    assert served_all > 200
    assert damaged.serve() == (set(damaged.model), [])


def test_a_catalog_cut_anywhere_never_loses_silently(damaged: Damaged) -> None:
    catalog = damaged.path / "catalog.sqlite"
    content = catalog.read_bytes()
    served: list[tuple[set[str], list[str]]] = []
    for length in range(0, len(content), 512):
        catalog.write_bytes(content[:length])
        if not refused_by("catalog.sqlite", lambda: served.append(damaged.serve())):
            whole, bad = served.pop()
            assert whole == set(damaged.model) or bad or damaged.findings(), length
        for extra in damaged.path.glob("catalog.sqlite-*"):
            extra.unlink()
    catalog.write_bytes(content)
    assert damaged.serve() == (set(damaged.model), [])


@pytest.mark.parametrize("mode", ["r", "a"])
@pytest.mark.parametrize("content", [None, b"", b"no database", b"SQLite format 3\0" + bytes(500)])
def test_a_missing_or_foreign_catalog_is_named(
    damaged: Damaged, content: bytes | None, mode: str
) -> None:
    catalog = damaged.path / "catalog.sqlite"
    catalog.unlink()
    if content is not None:
        catalog.write_bytes(content)
    with pytest.raises(StoreError, match=r"catalog\.sqlite"):
        TokenStore.open(damaged.path, mode=mode)  # type: ignore[arg-type]
    assert damaged.findings() != []


@pytest.mark.parametrize("segment", [1, 3])
def test_truncation_is_found_at_every_512_bytes(
    damaged: Damaged, segment: int, access: str
) -> None:
    path, layout = damaged.segment(segment), damaged.layout
    ends = {i: layout.offset(damaged.rows[i] & 255) for i in damaged.in_segment(segment)}
    for length in reversed(range(0, path.stat().st_size, 512)):
        os.truncate(path, length)
        lost = {i for i, at in ends.items() if length < at + layout.record_bytes or length < PAGE}
        served, bad = damaged.serve(access)
        assert served == set(damaged.model) - lost, f"cut to {length} bytes"
        assert len(bad) == len(lost)
        if access == "cached":
            assert any(f"segment {segment}" in line for line in damaged.findings()), length


def test_a_missing_or_exchanged_segment_is_found(damaged: Damaged) -> None:
    first, second = damaged.segment(1), damaged.segment(2)
    lost = set(damaged.in_segment(2))
    shutil.copy(first, second)
    served, bad = damaged.serve()
    assert served == set(damaged.model) - lost
    assert all("another segment's file" in line for line in bad)
    second.unlink()
    served, bad = damaged.serve()
    assert served == set(damaged.model) - lost
    assert all("No such file" in line for line in bad)
    assert any("segment 2" in line for line in damaged.findings())


def test_records_in_each_others_place_are_found(damaged: Damaged) -> None:
    """Whole records, but under wrong ids: the checksum is seeded with the id."""
    (one, row), (other, _) = list(damaged.rows.items())[:2]
    path, layout = damaged.segment(row >> 32), damaged.layout
    content = bytearray(path.read_bytes())
    places = [layout.offset(damaged.rows[i] & 255) for i in (one, other)]
    parts = [bytes(content[at : at + layout.record_bytes]) for at in places]
    for at, part in zip(reversed(places), parts, strict=True):
        content[at : at + layout.record_bytes] = part
    path.write_bytes(content)
    assert damaged.serve()[0] == set(damaged.model) - {one, other}


def test_an_append_does_not_touch_a_damaged_segment(damaged: Damaged) -> None:
    flip(damaged.segment(3), 100)
    before = damaged.segment(3).read_bytes()
    with TokenStore.open(damaged.path, mode="a") as store:
        with pytest.raises(StoreError, match=r"cannot append to .* header page is damaged"):
            Operation("append", (("new", 1),)).apply(store)
        assert sorted(store.ids()) == sorted(damaged.model)
    assert damaged.segment(3).read_bytes() == before


def test_compaction_keeps_damaged_records_out_of_the_good_ones(damaged: Damaged) -> None:
    """It neither passes damage on with a new checksum nor drops the id without a word."""
    image_id, row = next((i, row) for i, row in damaged.rows.items() if row >> 32 == 1)
    flip(damaged.segment(1), damaged.layout.offset(row & 255) * 8)
    with TokenStore.open(damaged.path, mode="a") as store:
        refused_by(image_id, store.compact)
    served, bad = damaged.serve()
    assert served == set(damaged.model) - {image_id}
    assert len(bad) == 1


def test_any_flipped_bit_of_store_json_is_found(damaged: Damaged) -> None:
    path = damaged.path / "store.json"
    for bit in range(len(path.read_bytes()) * 8):
        flip(path, bit)
        with pytest.raises(StoreError, match=r"store\.json (is damaged|has format version)"):
            TokenStore.open(damaged.path)
        flip(path, bit)
    assert damaged.findings() == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"null"])
def test_a_damaged_store_json_is_named(damaged: Damaged, content: bytes) -> None:
    (damaged.path / "store.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"store\.json is damaged"):
        TokenStore.open(damaged.path)
    assert any("store.json" in line for line in damaged.findings())


@pytest.mark.parametrize("version", [1, 3])
def test_another_format_version_is_named(damaged: Damaged, version: int) -> None:
    values = json.loads((damaged.path / "store.json").read_bytes())
    del values["checksum"]
    values |= {"format_version": version, "something": "new"}
    check = xxhash.xxh3_64_hexdigest(json.dumps(values, sort_keys=True).encode())
    (damaged.path / "store.json").write_text(json.dumps({**values, "checksum": check}))
    with pytest.raises(StoreError, match=f"has format version {version}, this edje reads 2"):
        TokenStore.open(damaged.path)


@pytest.mark.parametrize("mode", ["r", "a"])
def test_a_missing_store_is_named_with_the_command(tmp_path: Path, mode: str) -> None:
    with pytest.raises(StoreError, match="there is no token store") as caught:
        TokenStore.open(tmp_path / "none", mode=mode)  # type: ignore[arg-type]
    assert "edje index" in str(caught.value)
    assert not (tmp_path / "none").exists()
