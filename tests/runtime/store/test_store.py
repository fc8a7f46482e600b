"""The token store: what goes in comes out, whatever the batches; one writer, many readers."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from call_counts import count_calls
from edje.errors import RequestError, StoreError
from edje.runtime.store import CompactReport, SegmentWriter, StoreLayout, TokenStore, memory
from edje.runtime.store.catalog import Catalog
from edje.runtime.store.store import Access
from store_bytes import open_files

SIZES = {"num_tokens": 64, "hidden": 32, "fingerprint_encoder": "sha256:tower"}


def random_tokens(count: int, seed: int = 0, shape: tuple[int, int] = (64, 32)) -> np.ndarray:
    """Return float16 [count, m, H]."""
    values = np.random.default_rng(seed).standard_normal((count, *shape))
    return values.astype(np.float16)


def read_all(store: TokenStore, ids: list[str]) -> np.ndarray:
    """Return float16 [N, m, H] of `ids`."""
    out = np.full((len(ids), *store.record_shape), np.nan, dtype=np.float16)
    assert store.read(store.rows(ids), out) == []
    return out


def du(folder: Path) -> int:
    """What `du` says: blocks on disk of a folder and all in it."""
    return sum(path.stat().st_blocks * 512 for path in (folder, *folder.rglob("*")))


def segment_bytes(store: TokenStore) -> int:
    return sum(path.stat().st_size for path in (store.path / "segments").iterdir())


def test_appended_records_come_back_in_any_order_and_twice(tmp_path: Path) -> None:
    tokens = random_tokens(5)
    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        store.append(["a", "b", "c"], tokens[:3])
        store.append(["d/é.png", "e"], tokens[3:])
    with TokenStore.open(tmp_path / "s") as store:
        assert len(store) == 5
        assert store.ids() == ["a", "b", "c", "d/é.png", "e"]
        assert "e" in store
        assert "f" not in store
        got = read_all(store, ["e", "a", "a", "d/é.png", "b", "c"])
    assert np.array_equal(got, tokens[[4, 0, 0, 3, 1, 2]])


def test_live_rows_ascend_through_segments_and_what_was_changed(tmp_path: Path) -> None:
    with TokenStore.create(tmp_path / "s", segment_bytes=4096 * 4, **SIZES) as store:
        store.append(list("abcdefg"), random_tokens(7))
        store.delete(["c", "e"])
        store.replace(["b"], random_tokens(1))
        store.append(["c"], random_tokens(1))
        for _ in range(2):
            rows = store.live_rows()
            assert (np.diff(rows) > 0).all()
            assert np.array_equal(rows, np.sort(store.rows(list("abcdfg"))))
            store.compact()


def test_stat_counts_what_is_there(tmp_path: Path) -> None:
    with TokenStore.create(tmp_path / "s", segment_bytes=4096 * 4, **SIZES) as store:
        store.append(list("abcdefg"), random_tokens(7))
        assert store.stat().num_deleted == 0
        store.delete(["c"])
        stat = store.stat()
    assert (stat.num_records, stat.num_deleted, stat.num_segments) == (6, 1, 3)
    assert (stat.record_bytes, stat.scale_bytes) == (64 * 32 * 2, 0)
    assert (stat.num_retired, stat.faults) == (0, ())
    assert (stat.num_tokens, stat.hidden, stat.dtype) == (64, 32, "float16")
    assert stat.fingerprint_encoder == "sha256:tower"
    segments = segment_bytes(store)
    assert segments == (7 + 3 + 2) * 4096, "records, headers, and footers of the sealed two"
    assert stat.total_bytes > segments


def test_threads_find_and_read_every_id_while_one_appends_and_replaces(tmp_path: Path) -> None:
    ids, kept = [f"id-{number}" for number in range(12)], random_tokens(2, seed=1)
    failures: list[BaseException] = []
    done = threading.Event()
    with TokenStore.create(tmp_path / "s", segment_bytes=4096 * 9, **SIZES) as store:
        store.append(ids, random_tokens(12))
        store.append(["kept", "too"], kept)

        def look() -> None:
            try:
                while not done.is_set():
                    assert len(set(store.rows(ids).tolist())) == 12
                    read_all(store, ids)
                    assert np.array_equal(read_all(store, ["too", "kept"]), kept[::-1])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=look) for _ in range(2)]
        for thread in threads:
            thread.start()
        for number in range(40):
            store.replace(ids[number % 5 :: 2], random_tokens(len(ids[number % 5 :: 2])))
            store.append([f"new-{number}"], random_tokens(1))
        done.set()
        for thread in threads:
            thread.join()
    assert failures == []


def test_unknown_ids_are_named_up_to_twenty_with_the_count(tmp_path: Path) -> None:
    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        store.append(["a"], random_tokens(1))
        with pytest.raises(RequestError) as caught:
            store.rows(["a", *(f"missing-{number}" for number in range(23))])
    message = str(caught.value)
    assert "23 of 24 ids" in message
    assert "'missing-19' and 3 more" in message
    assert "missing-20" not in message


@pytest.mark.parametrize("bad", ["", 7, None, "\ud800", "a\0b", "x" * 4097, "é" * 2049])
def test_what_is_no_id_is_refused(tmp_path: Path, bad: object) -> None:
    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        with pytest.raises(StoreError, match="1 are no ids: ") as caught:
            store.append(["good", bad], random_tokens(2))  # type: ignore[list-item]
        assert len(str(caught.value)) < 500
        assert len(store) == 0
        assert bad not in store
        segment = SegmentWriter(store.path / "incoming/x.tokens", store.layout)
        with segment, pytest.raises(StoreError, match="cannot add to the segment"):
            segment.append(["good", bad], random_tokens(2))  # type: ignore[list-item]


def test_nothing_asked_nothing_read_nothing_added(tmp_path: Path) -> None:
    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        store.append([], random_tokens(0))
        assert store.stat().generation == 0
        store.replace([], random_tokens(0))
        store.delete([])
        assert read_all(store, []).shape == (0, 64, 32)


def test_a_buffer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        store.append(["a", "b"], random_tokens(2))
        rows = store.rows(["a", "b"])
        fitting = np.zeros((2, 64, 32), np.float16)
        for out in (fitting[:1], fitting.astype(np.float32), fitting.transpose(0, 2, 1)):
            with pytest.raises(RequestError, match="expected float16"):
                store.read(rows, out)
        with pytest.raises(RequestError, match="1 rows are not of this store"):
            store.read(np.array([rows[0], 99], np.int64), fitting)
        with pytest.raises(RequestError, match=r"rows is int32 \[2\]"):
            store.read(rows.astype(np.int32), fitting)  # type: ignore[arg-type]


def test_an_existing_folder_or_file_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("folder", "file"):
        with pytest.raises(StoreError, match="exists already and is left as it was"):
            TokenStore.create(tmp_path / name, **SIZES)
    with pytest.raises(StoreError, match="cannot write"):
        TokenStore.create(tmp_path / "file" / "store", **SIZES)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_all_faulty_sizes_are_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as caught:
        TokenStore.create(
            tmp_path / "s", num_tokens=0, hidden=-4, dtype="int4", fingerprint_encoder=""
        )
    assert len(caught.value.faults) == 4
    with pytest.raises(StoreError, match="at most 67108864"):
        TokenStore.create(tmp_path / "s", num_tokens=10**6, hidden=10**6, fingerprint_encoder="x")
    assert not (tmp_path / "s").exists()


def test_after_a_failed_commit_the_store_must_be_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        store.append(["a"], random_tokens(1))

        def fail(*_: object, **__: object) -> None:
            raise StoreError("the disk is full")

        monkeypatch.setattr(Catalog, "commit", fail)
        with pytest.raises(StoreError, match="disk is full"):
            store.append(["b"], random_tokens(1))
        monkeypatch.undo()
        assert store.ids() == ["a"]
        with pytest.raises(StoreError, match="again"):
            store.append(["b"], random_tokens(1))
        with TokenStore.open(tmp_path / "s", mode="a") as again:
            again.append(["b"], random_tokens(1, seed=2))
            assert np.array_equal(read_all(again, ["b"]), random_tokens(1, seed=2))


def test_a_deleted_id_is_unknown_and_may_come_back(tmp_path: Path) -> None:
    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        store.append(["a", "b"], random_tokens(2))
        store.delete(["a"])
        assert store.ids() == ["b"]
        assert "a" not in store
        with pytest.raises(RequestError, match="'a'"):
            store.rows(["a"])
        with pytest.raises(StoreError, match="1 id is not in the store: 'a'"):
            store.delete(["b", "a"])
        store.append(["a"], random_tokens(1, seed=1))
    with TokenStore.open(tmp_path / "s") as store:
        assert sorted(store.ids()) == ["a", "b"]
        assert np.array_equal(read_all(store, ["a"]), random_tokens(1, seed=1))


def test_replaced_records_are_read_by_new_rows_and_by_old_ones(tmp_path: Path) -> None:
    """A row handle stays valid: what it stood for lies there until the store is compacted."""
    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        store.append(["a", "b"], random_tokens(2))
        old = store.rows(["a"])
        store.replace(["a"], random_tokens(1, seed=1))
        assert np.array_equal(read_all(store, ["a", "b"])[0], random_tokens(1, seed=1)[0])
        out = np.empty((1, 64, 32), np.float16)
        assert store.read(old, out) == []
        assert np.array_equal(out, random_tokens(2)[:1])
        with pytest.raises(StoreError, match="not in the store: 'c'"):
            store.replace(["b", "c"], random_tokens(2))
        assert len(store) == 2


def test_compaction_frees_what_was_deleted(tmp_path: Path) -> None:
    tokens = random_tokens(40)
    names = [f"id-{number}" for number in range(40)]
    with TokenStore.create(tmp_path / "s", segment_bytes=4096 * 11, **SIZES) as store:
        store.append(names, tokens)
        store.delete(names[:5] + names[10:20])
        before = segment_bytes(store)
        disk = du(store.path)
        assert store.compact(0.6).num_dropped == 1, "the one without a live record"
        between = du(store.path)
        report = store.compact()
        after = store.stat()
        assert report.num_moved >= 5
        assert disk > between > du(store.path)
        assert report.freed_bytes == between - du(store.path)
        assert report.waiting_bytes == 0
        assert (after.num_records, after.num_deleted) == (25, 0)
        assert before - segment_bytes(store) >= 15 * 4096
        left = names[5:10] + names[20:]
        assert np.array_equal(read_all(store, left), np.r_[tokens[5:10], tokens[20:]])
        assert store.compact() == CompactReport(0, 0, 0, 0, ()), "nothing is left to do"


def test_files_that_a_reader_needs_stay_until_it_has_gone(tmp_path: Path) -> None:
    tokens = random_tokens(20)
    names = [f"id-{number}" for number in range(20)]
    segments = tmp_path / "s/segments"
    with TokenStore.create(tmp_path / "s", segment_bytes=4096 * 6, **SIZES) as writer:
        writer.append(names, tokens)
        reader = TokenStore.open(tmp_path / "s")
        files = {path.name for path in segments.iterdir()}
        writer.delete(names[::2])
        before, needed = du(writer.path), du(segments)
        report = writer.compact()
        assert report.freed_bytes == before - du(writer.path)
        assert du(segments) >= needed, "no segment was freed yet"
        assert report.waiting_bytes == needed - segments.stat().st_blocks * 512
        assert files < {path.name for path in segments.iterdir()}
        assert writer.stat().num_retired == len(files)
        assert np.array_equal(read_all(reader, names), tokens)
        reader.close()
        with TokenStore.open(tmp_path / "s") as newer:
            before = du(writer.path)
            report = writer.compact()
            assert report.freed_bytes == before - du(writer.path) > 0
            assert report.waiting_bytes == 0
            assert not files & {path.name for path in segments.iterdir()}
            assert writer.stat().num_retired == 0
            assert np.array_equal(read_all(newer, names[1::2]), tokens[1::2])


def test_iterate_yields_every_record_once_in_the_order_of_the_disk(tmp_path: Path) -> None:
    tokens = random_tokens(10)
    with TokenStore.create(tmp_path / "s", segment_bytes=4096 * 4, **SIZES) as store:
        store.append(list("abcdefghij"), tokens)
        store.delete(["d"])
        batches = list(store.iterate(4))
    assert [batch.ids for batch in batches] == [tuple("abce"), tuple("fghi"), ("j",)]
    assert np.array_equal(np.concatenate([b.tokens for b in batches]), np.delete(tokens, 3, 0))
    assert all(batch.scales is None and batch.bad == () for batch in batches)


def test_segments_of_other_processes_are_committed(tmp_path: Path) -> None:
    tokens = random_tokens(6)
    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        store.append(["a"], tokens[:1])
        paths = [tmp_path / "s/incoming/1.tokens", tmp_path / "elsewhere.tokens"]
        for path, ids in zip(paths, (["b", "c"], ["a", "d"]), strict=True):
            with SegmentWriter(path, StoreLayout.read(tmp_path / "s")) as segment:
                segment.append(ids, tokens[1:3] if ids[0] == "b" else tokens[4:6])
                assert not path.exists(), "it has its name only when it is whole"
        report = store.commit_segments(paths)
        assert (report.num_added, report.num_present, len(report.segments)) == (3, 1, 2)
        assert not any(path.exists() for path in paths)
        assert store.commit_segments([]).segments == ()
        assert np.array_equal(read_all(store, list("abcd")), tokens[[0, 1, 2, 5]])


def test_a_segment_that_was_given_up_leaves_nothing(tmp_path: Path) -> None:
    def give_up(path: Path, layout: StoreLayout) -> None:
        with SegmentWriter(path, layout) as segment:
            segment.append(["a"], random_tokens(1))
            segment.append(["b"], random_tokens(2))

    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        path = tmp_path / "s/incoming/1.tokens"
        with pytest.raises(StoreError, match="expected"):
            give_up(path, store.layout)
        segment = SegmentWriter(path, store.layout)
        assert segment.close() is None, "no record, no file"
        assert list(path.parent.iterdir()) == []
        with pytest.raises(StoreError, match="closed"):
            segment.append(["a"], random_tokens(1))


def test_a_segment_takes_an_id_once_and_no_more_than_it_holds(tmp_path: Path) -> None:
    with TokenStore.create(tmp_path / "s", segment_bytes=4096 * 4, **SIZES) as store:
        path = tmp_path / "s/incoming/1.tokens"
        with SegmentWriter(path, store.layout) as segment:
            segment.append(["a"], random_tokens(1))
            for ids in (["a"], ["b", "b"]):
                with pytest.raises(StoreError, match="twice"):
                    segment.append(ids, random_tokens(len(ids)))
            with pytest.raises(StoreError, match=r"3 records, but .* room for 2"):
                segment.append(["b", "c", "d"], random_tokens(3))
            segment.append(["b", "c"], random_tokens(2))
        assert store.commit_segments([path]).num_added == 3


@pytest.mark.parametrize("access", ["cached", "direct"])
def test_a_store_is_loaded_into_memory_while_others_read(tmp_path: Path, access: Access) -> None:
    tokens, ids, wrong = random_tokens(40), [f"id {n}" for n in range(40)], []
    with TokenStore.create(tmp_path / "s", segment_bytes=4096 * 9, **SIZES) as store:
        store.append(ids, tokens)
        with pytest.raises(StoreError, match="open for changes"):
            store.load_into_memory()
    store = TokenStore.open(tmp_path / "s", access=access)
    loaded, began = threading.Event(), threading.Barrier(4, timeout=10)

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        began.wait()
        left = 5  # reads once it is loaded
        while left:
            left -= loaded.is_set()
            asked = random.integers(0, 40, 20)
            if not np.array_equal(read_all(store, [ids[n] for n in asked]), tokens[asked]):
                wrong.append(seed)

    readers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for reader in readers:
        reader.start()
    began.wait()
    store.load_into_memory()
    assert store.access == "resident"
    loaded.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert open_files(store.path / "segments") == []
    for path in (tmp_path / "s/segments").iterdir():
        path.unlink()
    store.load_into_memory()  # it is there already
    store.prefetch(store.live_rows())
    assert np.array_equal(read_all(store, ids), tokens)
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.load_into_memory()


def test_a_store_too_large_for_the_memory_reads_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(3)
    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        store.append(list("abc"), tokens)
    with TokenStore.open(tmp_path / "s") as store:
        monkeypatch.setattr(memory, "available_memory_bytes", lambda: 3 * 4096 - 1)
        with pytest.raises(StoreError, match="do not fit into memory"):
            store.load_into_memory()
        assert store.access == "cached"
        assert np.array_equal(read_all(store, list("abc")), tokens)
        monkeypatch.setattr(memory, "available_memory_bytes", lambda: 3 * 4096)
        store.load_into_memory()
        assert store.access == "resident"


def test_the_ids_of_a_few_rows_come_without_all_others(tmp_path: Path) -> None:
    with TokenStore.create(tmp_path / "s", segment_bytes=4096 * 4, **SIZES) as store:
        store.append(list("abcdefg"), random_tokens(7))
        store.delete(["c"])
        store.append(["ü"], random_tokens(1))
        rows = store.live_rows()
        assert store.ids_of(rows) == store.ids()
        assert store.ids_of(rows[[6, 0, 0, 3]].tolist()) == ["ü", "a", "a", "e"]
        assert store.ids_of([]) == []
        with pytest.raises(RequestError, match="1 rows are not of this store"):
            store.ids_of([1 << 40])


def test_a_read_of_one_batch_takes_few_calls_and_files(tmp_path: Path) -> None:
    """Each file is one more to know for who reads the code; each call costs time."""
    sizes = {**SIZES, "hidden": 384}
    with TokenStore.create(tmp_path / "s", **sizes) as store:
        store.append([str(n) for n in range(100)], random_tokens(100, shape=(64, 384)))
    with TokenStore.open(tmp_path / "s") as store:
        for count in (4, 48, 64):
            rows = store.live_rows()[np.random.default_rng(0).permutation(100)[:count]]
            out = np.empty((count, 64, 384), np.float16)
            store.read(rows, out)
            calls = count_calls(lambda rows=rows, out=out: store.read(rows, out))
            assert len(calls.modules) <= 4, calls
            assert calls.num_calls <= 35, calls
