"""Verify finds every kind of damage; repair mends it and loses no whole record."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from disk_changes import Failure
from edje.errors import StoreError
from edje.runtime.store import TokenStore
from edje.runtime.store.format import StoreLayout
from edje.runtime.store.verify import VerifyReport, verify_store
from store_bytes import flip

PAGE = 4096
SIZES = {"num_tokens": 4, "hidden": 6, "fingerprint_encoder": "sha256:tower"}
IDS = [f"img/{number}.png" for number in range(9)]
GONE = IDS[4]
LIVE = [image_id for image_id in IDS if image_id != GONE]
SEALED = ["000001.tokens", "000002.tokens"]  # of four records each; the ninth is in the third


def tokens_of(count: int, seed: int = 0) -> np.ndarray:
    """Return float16 [count, 4, 6]."""
    return np.random.default_rng(seed).standard_normal((count, 4, 6)).astype(np.float16)


@pytest.fixture(params=["float16", "int8"])
def store_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Nine records, one deleted, in two sealed segments of four and an open one."""
    pages = 1 + 4 if request.param == "float16" else 1 + 1 + 4
    with TokenStore.create(
        tmp_path / "s", dtype=request.param, segment_bytes=pages * PAGE, **SIZES
    ) as store:
        store.append(IDS[:5], tokens_of(9)[:5])
        store.append(IDS[5:], tokens_of(9)[5:])
        store.delete([GONE])
    assert sorted(path.name for path in (tmp_path / "s/segments").iterdir()) == [
        *SEALED,
        "000003.tokens",
    ]
    return tmp_path / "s"


def served(path: Path) -> dict[str, bytes]:
    """Return id -> bytes of all records of a store, each verified."""
    with TokenStore.open(path) as store:
        return {
            image_id: batch.tokens[at].tobytes()
            + (b"" if batch.scales is None else batch.scales[at].tobytes())
            for batch in store.iterate()
            for at, image_id in enumerate(batch.ids)
        }


def cut(path: Path, length: int) -> None:
    os.truncate(path, length)


def segment(path: Path, number: int) -> Path:
    return path / f"segments/00000{number}.tokens"


def segment_bytes(path: Path) -> int:
    return segment(path, 1).stat().st_size


def sql(path: Path, *statements: str) -> None:
    """Change the catalog behind the store's back; copies are not kept equal."""
    with closing(sqlite3.connect(path / "catalog.sqlite")) as connection:
        for trigger in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'"):
            connection.execute(f"DROP TRIGGER {trigger[0]}")
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def first_record(path: Path) -> int:
    return int(StoreLayout.read(path).offset(0))


def test_a_whole_store_is_clean(store_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify_store(store_path, progress=lambda done, total: seen.append((done, total)))
    assert report.is_clean
    assert (report.num_records, report.num_checked, report.num_segments) == (8, 8, 3)
    layout = StoreLayout.read(store_path)
    assert report.read_bytes == 8 * (layout.record_bytes + layout.scale_bytes)
    assert report.damaged == report.faults == report.repaired == report.leftovers == ()
    assert seen[-1] == (8, 8)
    before = {path: path.read_bytes() for path in (store_path / "segments").iterdir()}
    assert verify_store(store_path, repair=True).repaired == ()
    assert {path: path.read_bytes() for path in before} == before


def check_repair(path: Path, expected: dict[str, bytes], fault: str) -> VerifyReport:
    """Verify finds `fault` and changes nothing; repair mends it, and the next verify is clean."""
    found = verify_store(path)
    assert not found.is_clean
    assert any(fault in text for text in found.faults), found.faults
    assert found.repaired == ()
    assert not verify_store(path).is_clean
    report = verify_store(path, repair=True)
    assert report.is_clean, report
    assert report.repaired
    again = verify_store(path)
    assert again.is_clean, again
    assert served(path) == expected
    with TokenStore.open(path, mode="a") as store:
        store.append(["new"], tokens_of(1, seed=1))
        assert len(store) == len(expected) + 1
        store.compact()
    assert {i: row for i, row in served(path).items() if i != "new"} == expected
    assert verify_store(path).is_clean
    return report


# What is damaged, how, what verify says of it. All of it is known twice, so no record is lost.
MENDED: dict[str, tuple[Callable[[Path], object], str]] = {
    "store.json": (lambda path: flip(path / "store.json", 60), "store.json is damaged"),
    "store.json gone": (lambda path: (path / "store.json").unlink(), "store.json is missing"),
    "store.json empty": (lambda path: cut(path / "store.json", 0), "store.json is damaged"),
    "header page": (lambda path: flip(segment(path, 1), 9), "segment 1: its header page is"),
    "header of the open segment": (lambda path: flip(segment(path, 3), 4090), "segment 3: its"),
    "padding of a header": (lambda path: flip(segment(path, 2), 3000), "segment 2: its header"),
    "footer": (lambda path: flip(segment(path, 1), -PAGE + 3), "its footer is damaged (checksum)"),
    "trailer": (lambda path: flip(segment(path, 2), -10), "its footer is damaged (trailer)"),
    "a cut footer": (lambda path: cut(segment(path, 1), segment_bytes(path) - 1000), "no footer"),
    "bytes behind the footer": (lambda path: os.truncate(segment(path, 1), 1 << 20), "no footer"),
    "a row of the catalog": (
        lambda path: sql(path, "UPDATE batches SET checksums = ids WHERE location >> 32 = 2"),
        "table batches, location 85",
    ),
    "a row of a copy": (
        lambda path: sql(path, "UPDATE deletions_copy SET locations = x'00'"),
        "table deletions_copy",
    ),
    "a row that one copy lacks": (
        lambda path: sql(path, "DELETE FROM segments_copy WHERE segment = 2"),
        "table segments_copy: 2 rows, expected 3",
    ),
    "a whole table": (lambda path: sql(path, "DROP TABLE batches"), "no such table: batches"),
    "rows that both copies lack": (
        lambda path: sql(
            path,
            "DELETE FROM batches WHERE location >> 32 = 1",
            "DELETE FROM batches_copy WHERE location >> 32 = 1",
        ),
        "4 records of segment 1 are in no row",
    ),
    "the schema's version": (lambda path: sql(path, "PRAGMA user_version = 99"), "user_version is"),
    "two things": (
        lambda path: (flip(path / "store.json", 60), flip(segment(path, 1), 9)),
        "header page is damaged",
    ),
}


@pytest.mark.parametrize("name", MENDED)
def test_what_is_known_twice_is_mended(store_path: Path, name: str) -> None:
    expected = served(store_path)
    damage, fault = MENDED[name]
    damage(store_path)
    report = check_repair(store_path, expected, fault)
    assert report.damaged == ()
    assert StoreLayout.read(store_path).fingerprint_encoder == "sha256:tower"


def test_damaged_records_are_taken_out_and_named(store_path: Path) -> None:
    expected = served(store_path)
    layout = StoreLayout.read(store_path)
    flip(segment(store_path, 1), layout.offset(2))
    flip(segment(store_path, 2), layout.offset(3) + 5)
    report = verify_store(store_path)
    assert report.bad == (IDS[2], IDS[7])
    assert [(record.segment, record.row) for record in report.damaged] == [(1, 2), (2, 3)]
    assert not report.is_clean
    report = verify_store(store_path, repair=True)
    assert report.bad == (IDS[2], IDS[7])
    assert report.repaired == ("2 damaged records were taken out",)
    assert report.is_clean
    assert (report.num_checked, report.num_records) == (8, 6)
    del expected[IDS[2]], expected[IDS[7]]
    assert served(store_path) == expected
    assert verify_store(store_path).is_clean
    with TokenStore.open(store_path, mode="a") as store:
        store.append([IDS[2]], tokens_of(9)[2:3])
    assert len(served(store_path)) == 7


def test_a_deleted_records_bytes_may_be_anything(store_path: Path) -> None:
    flip(segment(store_path, 2), first_record(store_path))
    assert verify_store(store_path).is_clean


@pytest.mark.parametrize("number", [1, 3])
def test_a_missing_segment_loses_its_records_only(store_path: Path, number: int) -> None:
    expected = served(store_path)
    segment(store_path, number).unlink()
    lost = IDS[:4] if number == 1 else IDS[8:]
    report = verify_store(store_path)
    assert not report.is_clean
    assert list(report.bad) == lost
    for image_id in lost:
        del expected[image_id]
    report = check_repair(store_path, expected, f"segment {number}: its file")
    assert report.bad == tuple(lost)


@pytest.mark.parametrize(("number", "row"), [(1, 0), (1, 2), (3, 0)])
@pytest.mark.parametrize("more_bytes", [0, 50])
def test_a_cut_segment_loses_what_was_cut_off(
    store_path: Path, number: int, row: int, more_bytes: int
) -> None:
    expected = served(store_path)
    layout = StoreLayout.read(store_path)
    cut(segment(store_path, number), layout.offset(row) + more_bytes)
    # A record of 48 or 24 bytes is whole without the zeros behind it.
    first = row + 1 if more_bytes else row
    lost = IDS[first:4] if number == 1 else IDS[8 + first :]
    left = {image_id: expected[image_id] for image_id in LIVE if image_id not in lost}
    assert check_repair(store_path, left, "bytes early").bad == tuple(lost)


@pytest.mark.parametrize("length", [0, 1, 4095])
def test_a_segment_cut_to_less_than_its_header_is_mended(store_path: Path, length: int) -> None:
    expected = served(store_path)
    cut(segment(store_path, 1), length)
    left = {image_id: row for image_id, row in expected.items() if image_id not in IDS[:4]}
    assert check_repair(store_path, left, "its header page ends").bad == tuple(IDS[:4])


def test_swapped_files_are_told_and_nothing_is_taken_out(store_path: Path) -> None:
    expected = served(store_path)
    one, two, aside = segment(store_path, 1), segment(store_path, 2), store_path / "aside"
    for source, target in ((one, aside), (two, one), (aside, two)):
        source.rename(target)
    report = verify_store(store_path, repair=True)
    assert not report.is_clean
    assert "segment 1: it is another segment's file" in report.faults[0]
    assert report.repaired == ()
    for source, target in ((one, aside), (two, one), (aside, two)):
        source.rename(target)
    assert verify_store(store_path).is_clean
    assert served(store_path) == expected


def test_a_lost_catalog_is_rebuilt_from_the_footers(store_path: Path) -> None:
    expected = served(store_path)
    for path in store_path.glob("catalog.sqlite*"):
        path.unlink()
    report = verify_store(store_path)
    assert "catalog.sqlite is missing" in report.faults
    with pytest.raises(StoreError):
        TokenStore.open(store_path)
    report = verify_store(store_path, repair=True)
    assert report.is_clean
    lost = [text for text in report.faults if text.startswith("lost: ")]
    assert "deletions: records that were deleted may be back" in lost[0]
    assert "the ids of the records of segment 3 (1 at most)" in lost[1]
    assert [name for name in report.repaired if "set aside" in name]
    got = served(store_path)
    assert sorted(got) == sorted(IDS[:8])
    assert {i: row for i, row in got.items() if i in expected} == {i: expected[i] for i in LIVE[:7]}
    assert verify_store(store_path).leftovers == ("segments/000003.tokens.lost",)
    with TokenStore.open(store_path, mode="a") as store:
        store.append([IDS[8]], tokens_of(9)[8:])
    assert segment(store_path, 4).exists()


@pytest.mark.parametrize("damage", ["empty", "noise", "header", "cut", "directory of pages"])
def test_a_catalog_that_sqlite_cannot_read_is_rebuilt(store_path: Path, damage: str) -> None:
    catalog = store_path / "catalog.sqlite"
    size = catalog.stat().st_size
    if damage == "empty":
        cut(catalog, 0)
    elif damage == "noise":
        catalog.write_bytes(random.Random(0).randbytes(size))
    elif damage == "header":
        flip(catalog, 3)
    elif damage == "cut":
        cut(catalog, size // 2 + 100)
    else:
        with catalog.open("r+b") as file:
            file.seek(100)
            file.write(random.Random(0).randbytes(PAGE - 100))
    assert not verify_store(store_path).is_clean
    report = verify_store(store_path, repair=True)
    assert report.is_clean, report
    assert set(IDS[:4] + IDS[5:8]) <= set(served(store_path))
    assert verify_store(store_path).is_clean


def test_every_bit_of_a_catalog_may_flip(store_path: Path) -> None:
    """Sampled, and the bytes that say what a page is: found or harmless, and nothing is lost."""
    expected = served(store_path)
    whole = (store_path / "catalog.sqlite").read_bytes()
    written = [offset for offset, byte in enumerate(whole) if byte]
    offsets = [*random.Random(1).sample(written, 10), 100, *range(PAGE, len(whole), 3 * PAGE)]
    copy = store_path.with_name("copy")
    found = 0
    for offset in offsets:
        shutil.copytree(store_path, copy)
        flip(copy / "catalog.sqlite", offset)
        found += not verify_store(copy).is_clean
        assert verify_store(copy, repair=True).is_clean
        assert served(copy) == expected, f"byte {offset}"
        assert verify_store(copy).is_clean
        shutil.rmtree(copy)
    assert found >= 6


def test_the_ids_of_an_open_segment_are_known_only_to_the_catalog(store_path: Path) -> None:
    expected = served(store_path)
    sql(
        store_path,
        "DELETE FROM batches WHERE location >> 32 = 3",
        "DELETE FROM batches_copy WHERE location >> 32 = 3",
    )
    del expected[IDS[8]]
    check_repair(store_path, expected, "lost: the ids of 1 records of segment 3")


def test_lost_deletions_bring_records_back_but_never_an_old_one(store_path: Path) -> None:
    with TokenStore.open(store_path, mode="a") as store:
        store.replace([IDS[0]], tokens_of(1, seed=7))
        expected = served(store_path)
    sql(store_path, "DELETE FROM deletions", "DELETE FROM deletions_copy")
    report = verify_store(store_path, repair=True)
    assert report.is_clean
    assert any("2 deletions: records that were deleted may be back" in f for f in report.faults)
    got = served(store_path)
    assert sorted(got) == sorted(IDS)
    assert {i: got[i] for i in expected} == expected


def test_a_lost_state_is_made_anew(store_path: Path) -> None:
    expected = served(store_path)
    sql(store_path, "DELETE FROM state", "DELETE FROM state_copy")
    (store_path / "store.json").unlink()
    report = verify_store(store_path, repair=True)
    assert report.is_clean
    assert served(store_path) == expected
    assert StoreLayout.read(store_path).fingerprint_encoder == "sha256:tower"
    with TokenStore.open(store_path) as store:
        assert store.stat().generation > 1_000_000_000


def test_a_repair_that_is_cut_short_is_finished_by_the_next(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at each change to a file, then run again."""
    expected = served(store_path)
    flip(store_path / "store.json", 60)
    flip(segment(store_path, 1), 9)
    flip(segment(store_path, 2), -10)
    flip(store_path / "catalog.sqlite", 3)
    for stop in count(1):
        copy = store_path.with_name("copy")
        shutil.copytree(store_path, copy)
        with monkeypatch.context() as patch:
            failure = Failure(patch, stop, errno.EIO, stay=True)
            with suppress(StoreError):
                verify_store(copy, repair=True)
        assert verify_store(copy, repair=True).is_clean, f"stopped at change {stop}"
        assert served(copy) == expected
        shutil.rmtree(copy)
        if failure.countdown > 0:
            break
    assert stop > 10


def test_leftovers_are_named_and_left(store_path: Path) -> None:
    (store_path / "notes.txt").write_text("mine")
    (store_path / "skipped.jsonl").write_text("")
    shutil.copy(segment(store_path, 1), segment(store_path, 8))
    (store_path / "incoming/x.tokens").write_bytes(b"")
    report = verify_store(store_path)
    assert report.is_clean
    assert report.leftovers == (
        "notes.txt",
        "segments/000008.tokens",
        "incoming/x.tokens (waits to be committed)",
    )


def test_readers_keep_their_generation_while_a_store_is_mended(store_path: Path) -> None:
    expected = served(store_path)
    with TokenStore.open(store_path) as reader:
        sql(store_path, "UPDATE batches SET checksums = ids")
        flip(segment(store_path, 1), first_record(store_path))
        assert verify_store(store_path, repair=True).bad == (IDS[0],)
        out = np.empty((7, 4, 6), reader.layout.dtype)
        scales = np.empty((7, 4), np.float16) if reader.layout.dtype == "int8" else None
        assert reader.read(reader.rows(LIVE[1:]), out, scales) == []
        assert out[0].tobytes() == expected[IDS[1]][: out[0].nbytes]


def test_verify_runs_beside_a_writer_and_repair_does_not(store_path: Path) -> None:
    with TokenStore.open(store_path, mode="a") as writer:
        assert verify_store(store_path).is_clean
        with pytest.raises(StoreError, match="has a writer already"):
            verify_store(store_path, repair=True)
        writer.append(["new"], tokens_of(1))
    assert verify_store(store_path).num_records == 9


def test_no_store_and_another_version_are_refused_and_left_alone(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        for repair in (False, True):
            with pytest.raises(StoreError, match="there is no token store"):
                verify_store(path, repair=repair)
    assert list(tmp_path.iterdir()) == []
    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        store.append(IDS, tokens_of(9))
    sql(tmp_path / "s", "DELETE FROM state", "DELETE FROM state_copy", "PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="schema version 99"):
        verify_store(tmp_path / "s", repair=True)


def test_the_report_is_json(store_path: Path) -> None:
    flip(segment(store_path, 1), first_record(store_path))
    values = json.loads(json.dumps(verify_store(store_path).to_json()))
    assert values["bad"] == [IDS[0]]
    assert f"id '{IDS[0]}' (segment 1, row 0)" in values["damaged"][0]
    assert values["bytes_per_s"] > 0
