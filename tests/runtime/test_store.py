"""The token store: what goes in comes out, whatever the batches; one writer, many readers."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edje.errors import RequestError, StoreError
from edje.runtime.store import TokenStore
from edje.runtime.store import store as store_module

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


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_appends_read_like_a_dict(data: st.DataObject) -> None:
    num_tokens, hidden = data.draw(st.sampled_from([(64, 32), (3, 5), (1, 1), (10, 300)]))
    segment_bytes = data.draw(st.sampled_from([1, 4096 * 4, 1 << 30]))
    names = st.lists(st.text(st.characters(codec="utf-8"), min_size=1), unique=True, max_size=9)
    expected: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"num_tokens": num_tokens, "hidden": hidden, "fingerprint_encoder": "x"}
        path = Path(folder) / "s"
        TokenStore.create(path, segment_bytes=segment_bytes, **sizes).close()
        for step in range(data.draw(st.integers(1, 4))):
            ids = [name for name in data.draw(names) if name not in expected]
            tokens = random_tokens(len(ids), step, (num_tokens, hidden))
            with TokenStore.open(path, mode="a") as store:
                store.append(ids, tokens)
                expected |= dict(zip(ids, tokens, strict=True))
                assert np.array_equal(read_all(store, ids), tokens), (
                    "a writer reads what it has just appended"
                )
        with TokenStore.open(path) as store:
            assert store.ids() == list(expected)
            wanted = (
                data.draw(st.lists(st.sampled_from(sorted(expected)), max_size=12))
                if (expected)
                else []
            )
            got = read_all(store, wanted)
            largest = max(
                (file.stat().st_size for file in (path / "segments").iterdir()), default=0
            )
    assert all(np.array_equal(row, expected[name]) for row, name in zip(got, wanted, strict=True))
    stride = -(-num_tokens * hidden * 2 // 4096) * 4096
    assert largest <= max(segment_bytes, 4096 + stride)


def test_stat_counts_what_is_there(tmp_path: Path) -> None:
    with TokenStore.create(tmp_path / "s", segment_bytes=4096 * 4, **SIZES) as store:
        store.append(list("abcdefg"), random_tokens(7))
        stat = store.stat()
    assert (stat.num_records, stat.num_segments, stat.generation) == (7, 3, 1)
    assert stat.record_bytes == 64 * 32 * 2
    assert (stat.num_tokens, stat.hidden, stat.dtype) == (64, 32, "float16")
    assert stat.fingerprint_encoder == "sha256:tower"
    segments = sum(file.stat().st_size for file in (tmp_path / "s/segments").iterdir())
    assert segments == (7 + 3) * 4096
    assert stat.total_bytes > segments


def test_a_reader_keeps_its_snapshot_while_a_writer_appends(tmp_path: Path) -> None:
    with TokenStore.create(tmp_path / "s", **SIZES) as writer:
        writer.append(["a"], random_tokens(1))
        with TokenStore.open(tmp_path / "s") as reader:
            writer.append(["b"], random_tokens(1, seed=1))
            assert reader.ids() == ["a"]
            assert np.array_equal(read_all(reader, ["a"]), random_tokens(1))
        with TokenStore.open(tmp_path / "s") as reader:
            assert reader.ids() == ["a", "b"]


def test_threads_read_while_one_appends(tmp_path: Path) -> None:
    tokens = random_tokens(120)
    ids = [f"id-{number}" for number in range(120)]
    failures: list[str] = []
    with TokenStore.create(tmp_path / "s", segment_bytes=4096 * 9, **SIZES) as store:
        store.append(ids[:20], tokens[:20])

        def read(seed: int) -> None:
            pick = np.random.default_rng(seed)
            for _ in range(40):
                wanted = pick.integers(0, len(store), 15)
                if not np.array_equal(read_all(store, [ids[i] for i in wanted]), tokens[wanted]):
                    failures.append(f"thread {seed} read other tokens than were appended")

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for at in range(20, 120, 10):
            store.append(ids[at : at + 10], tokens[at : at + 10])
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


def test_all_faults_of_an_append_are_named_and_nothing_is_added(tmp_path: Path) -> None:
    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        store.append(["a", "b"], random_tokens(2))
        with pytest.raises(StoreError) as caught:
            store.append(["a", "c", "c"], random_tokens(2).astype(np.float32))
        assert store.ids() == ["a", "b"]
    message = str(caught.value)
    assert "got float32 [2, 64, 32], expected float16 [3, 64, 32]" in message
    assert "1 ids come twice: 'c'" in message
    assert "1 ids are in the store already: 'a'" in message


@pytest.mark.parametrize("bad", ["", 7, None, "\ud800"])
def test_ids_without_utf8_text_are_refused(tmp_path: Path, bad: object) -> None:
    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        with pytest.raises(StoreError, match="empty or no text"):
            store.append(["good", bad], random_tokens(2))  # type: ignore[list-item]
        assert len(store) == 0


def test_nothing_asked_nothing_read_nothing_added(tmp_path: Path) -> None:
    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        store.append([], random_tokens(0))
        assert store.stat().generation == 0
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


def test_a_second_writer_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        with pytest.raises(StoreError, match=f"writer already .process {os.getpid()} on"):
            TokenStore.open(tmp_path / "s", mode="a")
        code = "import sys, edje.runtime.store as s; s.TokenStore.open(sys.argv[1], mode='a')"
        command = [sys.executable, "-c", code, str(store.path)]
        other = subprocess.run(command, capture_output=True, text=True)
        assert f"writer already (process {os.getpid()}" in other.stderr
    TokenStore.open(tmp_path / "s", mode="a").close()


def test_a_reader_or_a_closed_store_does_not_append(tmp_path: Path) -> None:
    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        store.append(["a"], random_tokens(1))
        rows = store.rows(["a"])
    with TokenStore.open(tmp_path / "s") as reader, pytest.raises(StoreError, match='mode="a"'):
        reader.append(["b"], random_tokens(1))
    with pytest.raises(StoreError, match='mode="a"'):
        store.append(["b"], random_tokens(1))
    with pytest.raises(StoreError, match="closed"):
        store.read(rows, np.empty((1, 64, 32), np.float16))


def test_an_existing_folder_or_file_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
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


def test_a_failed_write_adds_nothing_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(6)
    with TokenStore.create(tmp_path / "s", segment_bytes=4096 * 3, **SIZES) as store:
        store.append(["a"], tokens[:1])
        calls = iter([None, OSError(28, "No space left on device")])

        def fail_second(descriptor: int) -> None:
            if error := next(calls):
                raise error

        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail_second)
            with pytest.raises(StoreError, match="nothing was added: No space left on device"):
                store.append(["b", "c", "d"], tokens[1:4])
        assert [file.stat().st_size for file in (store.path / "segments").iterdir()] == [2 * 4096]
        store.append(["c", "b", "d", "e"], tokens[2:6])
        assert np.array_equal(read_all(store, list("acbde")), tokens[[0, 2, 3, 4, 5]])
    with TokenStore.open(tmp_path / "s") as store:
        assert np.array_equal(read_all(store, list("acbde")), tokens[[0, 2, 3, 4, 5]])


def test_after_a_failed_commit_the_store_must_be_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        store.append(["a"], random_tokens(1))

        def fail(*_: object, **__: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(store_module.Catalog, "_transaction", fail)
        with pytest.raises(StoreError, match="disk is full"):
            store.append(["b"], random_tokens(1))
        monkeypatch.undo()
        assert store.ids() == ["a"]
        with pytest.raises(StoreError, match="again"):
            store.append(["b"], random_tokens(1))
        with TokenStore.open(tmp_path / "s", mode="a") as again:
            again.append(["b"], random_tokens(1, seed=2))
            assert np.array_equal(read_all(again, ["b"]), random_tokens(1, seed=2))


KILLED = """
import os, sys
import numpy as np
from edje.runtime.store import TokenStore
from edje.runtime.store.catalog import Catalog
store = TokenStore.open(sys.argv[1], mode="a")
Catalog.commit = lambda *_, **__: os.kill(os.getpid(), 9)
store.append(["torn"], np.ones((1, 64, 32), np.float16))
"""


def test_a_record_of_a_killed_append_never_existed(tmp_path: Path) -> None:
    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        store.append(["a"], random_tokens(1))
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "s")], check=False)
    segment = tmp_path / "s/segments/000000.tokens"
    assert segment.stat().st_size == 3 * 4096, "the torn tail is there"
    with TokenStore.open(tmp_path / "s", mode="a") as store:
        assert store.ids() == ["a"]
        store.append(["b"], random_tokens(1, seed=1))
        assert segment.stat().st_size == 3 * 4096, "the next append takes its place"
        assert np.array_equal(read_all(store, ["b"]), random_tokens(1, seed=1))


def test_a_deleted_record_is_gone_and_its_successor_counts(tmp_path: Path) -> None:
    with TokenStore.create(tmp_path / "s", **SIZES) as store:
        store.append(["a", "b"], random_tokens(2))
    # What the delete of a later version of this package does.
    with sqlite3.connect(tmp_path / "s/catalog.sqlite") as catalog:
        catalog.execute("INSERT INTO deletions VALUES (0, 2)")
    catalog.close()
    with TokenStore.open(tmp_path / "s", mode="a") as store:
        assert store.ids() == ["b"]
        store.append(["a"], random_tokens(1, seed=1))
    with TokenStore.open(tmp_path / "s") as store:
        assert sorted(store.ids()) == ["a", "b"]
        assert np.array_equal(read_all(store, ["a"]), random_tokens(1, seed=1))


@contextmanager
def without_rights(folder: Path) -> Iterator[None]:
    """Make a folder unwritable; root, whom no mode stops, becomes nobody for the moment."""
    user = os.geteuid()
    folder.chmod(0o555)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


def test_a_folder_that_cannot_be_written_is_read_but_not_appended() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folder is closed to nobody
        Path(folder).chmod(0o755)
        path = Path(folder) / "s"
        with TokenStore.create(path, **SIZES) as store:
            store.append(["a"], random_tokens(1))
        (path / "writer.lock").chmod(0o444)
        with without_rights(path):
            with TokenStore.open(path) as store:
                got = read_all(store, ["a"])
            with pytest.raises(StoreError, match="cannot write the store"):
                TokenStore.open(path, mode="a")
            with pytest.raises(StoreError, match="cannot write"):
                TokenStore.create(path / "t", **SIZES)
    assert np.array_equal(got, random_tokens(1))
