"""Reading records: every way to reach the system gives the same bytes, and the same faults."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edje.errors import StoreError
from edje.runtime.store import read as reading
from edje.runtime.store.memory import NOT_HELD, ResidentRecords
from edje.runtime.store.read import SegmentReader
from edje.runtime.store.unlocked import is_built
from record_files import ROWS, SEGMENTS, SHAPES, RecordFiles, write_files
from store_bytes import flip, open_files

COUNT = ROWS * SEGMENTS
PAGE = 4096


@pytest.fixture(scope="module")
def all_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RecordFiles]:
    """Files of every shape. Read-only."""
    root = tmp_path_factory.mktemp("records")
    return {shape: write_files(root / shape, shape) for shape in SHAPES}


@pytest.fixture(params=["float16", "int8"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> RecordFiles:
    """Files to damage."""
    return write_files(tmp_path / "store", request.param)


WAYS = ["one thread", "three threads", "one unlocked", "three unlocked"]


@pytest.fixture(params=WAYS, autouse=True)
def many_small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks for a handful of records, read by the caller alone or by others beside it."""
    num_threads = 1 if request.param.startswith("one") else 3
    unlocked = request.param.endswith("unlocked")
    if unlocked and not is_built():
        pytest.skip("the C extension was not built")
    monkeypatch.setattr(reading, "is_built", lambda: unlocked)
    monkeypatch.setattr(reading, "CHUNK_BYTES", 5 * PAGE)
    monkeypatch.setattr(reading, "DIRECT_CHUNK_BYTES", 7 * PAGE)
    for name in ("BYTES_A_THREAD", "BYTES_UNLOCKED", "DIRECT_BYTES_A_THREAD"):
        monkeypatch.setattr(reading, name, PAGE if num_threads > 1 else 1 << 40)
    for name in ("MOST_READING", "MOST_DIRECT"):
        monkeypatch.setattr(reading, name, num_threads)
    monkeypatch.setattr(reading, "copying_threads", lambda: num_threads)


def by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let readers made from now on read all in the calling thread."""
    for name in ("BYTES_A_THREAD", "BYTES_UNLOCKED"):
        monkeypatch.setattr(reading, name, 1 << 40)


def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let readers made from now on call `os.preadv`, whatever was built."""
    monkeypatch.setattr(reading, "is_built", lambda: False)


def memory(num_bytes: int, *, aligned: bool) -> np.ndarray:
    """Bytes that no record holds, from a page's start on or 16 bytes behind one."""
    shift = 0 if aligned else 16
    out = np.frombuffer(mmap.mmap(-1, num_bytes + PAGE), np.uint8)[shift : shift + num_bytes]
    out[:] = 255
    return out


def read(
    files: RecordFiles,
    source: SegmentReader | ResidentRecords,
    records: np.ndarray | list[int],
    *,
    aligned: bool = False,
    verify: bool = True,
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Gather; return tokens and scales as bytes, and record number -> reason."""
    plan, layout = files.plan(np.asarray(records)), files.layout
    tokens = memory(len(records) * layout.record_bytes, aligned=aligned)
    scales = np.full(len(records) * layout.scale_bytes, 255, np.uint8)
    bad = source.gather(
        plan, tokens.data, scales.data if layout.scale_bytes else None, verify=verify
    )
    locations = plan.locations.tolist()
    numbers = [(at >> 32) * ROWS + (at & 0xFFFFFFFF) for at in locations]
    named = {numbers[place]: reason for place, reason in bad.items()}
    shape = (len(records), -1) if len(records) else (0, 0)
    return tokens.reshape(shape), scales.reshape(shape), named


def check_others(files: RecordFiles, source: SegmentReader, bad: dict[int, str]) -> None:
    """Every record but the bad ones is served whole; these leave zeros."""
    records = np.arange(COUNT)
    tokens, scales, found = read(files, source, records)
    assert found == bad
    good = ~np.isin(records, list(bad))
    assert np.array_equal(tokens[good], files.tokens[good])
    assert not tokens[~good].any(), "nothing damaged leaves the reader"
    if files.layout.scale_bytes:
        assert np.array_equal(scales[good], files.scales[good])
        assert not scales[~good].any()


def direct_reader(files: RecordFiles) -> SegmentReader:
    source = files.reader("direct")
    try:
        read(files, source, [0])
    except StoreError as error:
        pytest.skip(f"no O_DIRECT here: {error}")
    return source


RECORDS = st.lists(
    st.one_of(
        st.integers(0, COUNT - 1).map(lambda at: [at]),
        st.tuples(st.integers(0, COUNT - 2), st.integers(2, 40)).map(
            lambda run: list(range(run[0], min(run[0] + run[1], COUNT)))
        ),
    ),
    max_size=8,
).map(lambda parts: [record for part in parts for record in part])


@pytest.fixture(params=["cached", "direct", "resident"])
def opened(
    request: pytest.FixtureRequest, all_files: dict[str, RecordFiles]
) -> Iterator[dict[str, SegmentReader | ResidentRecords]]:
    """Records of every shape, served in one way."""
    readers = {
        shape: direct_reader(files) if request.param == "direct" else files.reader()
        for shape, files in all_files.items()
    }
    served: dict[str, SegmentReader | ResidentRecords] = dict(readers)
    if request.param == "resident":
        for shape, files in all_files.items():
            plan = files.plan(np.arange(COUNT))
            served[shape] = ResidentRecords.load(readers[shape], plan, files.layout)
    yield served
    for source in readers.values():
        source.close()


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.sampled_from(list(SHAPES)),
    records=RECORDS,
    shuffle=st.randoms(use_true_random=False),
    aligned=st.booleans(),
    verify=st.booleans(),
)
def test_any_records_in_any_order_come_to_their_places(
    all_files: dict[str, RecordFiles], opened, shape: str, records, shuffle, aligned, verify
) -> None:
    files = all_files[shape]
    if shuffle.random() < 0.5:
        shuffle.shuffle(records)
    tokens, scales, bad = read(files, opened[shape], records, aligned=aligned, verify=verify)
    assert bad == {}
    if records:
        assert np.array_equal(tokens, files.tokens[records])
        assert np.array_equal(scales, files.scales[records])


@pytest.mark.parametrize("access", ["cached", "direct"])
def test_a_file_that_shrinks_while_open_gives_reasons(files: RecordFiles, access: str) -> None:
    source = files.reader() if access == "cached" else direct_reader(files)
    layout, whole = files.layout, files.path(1).stat().st_size
    cut = layout.offset(60) + 100
    os.truncate(files.path(1), cut)
    missing = dict.fromkeys(range(ROWS + 61, 2 * ROWS), layout.record_bytes)
    missing[ROWS + 60] = layout.record_bytes - 100
    reasons = {at: f"its segment file ends {size} bytes early" for at, size in missing.items()}
    if layout.scale_bytes:  # row 64 begins a group whose scales are gone as well
        assert whole > layout.offset(64) > cut
    check_others(files, source, reasons)
    tokens, _, bad = read(files, source, np.arange(COUNT), verify=False)
    assert bad == reasons
    assert not tokens[ROWS + 60].any()
    os.truncate(files.path(1), 0)
    assert set(read(files, source, [ROWS, 0])[2]) == {ROWS}
    source.close()


def test_reads_that_fail_are_tried_again_one_by_one(
    files: RecordFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_python(monkeypatch)
    source, preadv = files.reader(), os.preadv

    def broken(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset == files.layout.offset(3):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, [buffers[0][:1000]], offset)  # short reads are no fault

    check_others(files, source, {})
    monkeypatch.setattr(os, "preadv", broken)
    reason = "cannot be read (Input/output error)"
    check_others(files, source, dict.fromkeys((3, ROWS + 3, 2 * ROWS + 3), reason))
    source.close()


def test_records_that_follow_one_another_are_one_read_wherever_they_go(
    files: RecordFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_one_thread(monkeypatch)
    in_python(monkeypatch)
    source, preadv, seen = files.reader(), os.preadv, []

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        seen.append((offset, len(buffers)))
        return preadv(descriptor, buffers, offset)

    check_others(files, source, {})
    monkeypatch.setattr(os, "preadv", counted)
    tokens, _, bad = read(files, source, [34, 31, 32, 33])
    assert bad == {}
    assert np.array_equal(tokens, files.tokens[[34, 31, 32, 33]])
    layout = files.layout
    runs = [(31, 4)] if not layout.scale_bytes else [(31, 1), (32, 3)]  # a new group at row 32
    expected = [(layout.offset(row), count) for row, count in runs]
    if layout.scale_bytes:
        expected += [(layout.scales_offset(row), count) for row, count in runs]
    assert sorted(seen) == sorted(expected)
    source.close()


def test_an_interrupt_comes_out_and_the_reader_goes_on(
    files: RecordFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    in_python(monkeypatch)
    source = files.reader()
    check_others(files, source, {})
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", interrupt)
        with pytest.raises(KeyboardInterrupt):
            read(files, source, np.arange(COUNT))
    check_others(files, source, {})
    source.close()


def test_no_more_files_stay_open_than_allowed_and_none_after_close(
    files: RecordFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4, 4))
    source = files.reader()
    for _ in range(3):
        check_others(files, source, {})
        assert len(open_files(files.folder)) <= 2
    source.close()
    source.close()
    assert open_files(files.folder) == []
    with pytest.raises(StoreError, match="is closed"):
        read(files, source, [0])


@pytest.fixture
def few_descriptors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], None]:
    """Let no more than so many files below a folder be open."""
    real = os.open

    def limit(most: int, folder: str) -> None:
        def limited(path: object, flags: int, *more: int) -> int:
            if str(path).startswith(folder) and len(open_files(Path(folder))) >= most:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return real(path, flags, *more)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "open", limited)

    return limit


def test_too_many_open_files_close_idle_ones_first(
    files: RecordFiles,
    few_descriptors: Callable[[int, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_one_thread(monkeypatch)  # both files at once
    source = files.reader()
    few_descriptors(1, str(files.folder))
    for segment in (0, 1, 2, 0):
        assert read(files, source, [segment * ROWS])[2] == {}
    with pytest.raises(StoreError, match="Too many open files") as caught:
        read(files, source, [0, ROWS])
    assert "ulimit -n" in str(caught.value.hint)
    assert read(files, source, [ROWS])[2] == {}, "nothing is lost by it"
    source.close()


def test_a_file_system_without_o_direct_is_named(
    files: RecordFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: object, flags: int, *more: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    source = files.reader("direct")
    with pytest.raises(StoreError, match="its file system has none") as caught:
        read(files, source, [0])
    assert caught.value.hint == 'open the store with access="cached"'
    source.close()


@pytest.mark.parametrize("max_open", [1, 100])
def test_threads_read_side_by_side(
    files: RecordFiles, max_open: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2 * max_open, 2 * max_open))
    source, wrong = files.reader(), []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(20):
            records = random.integers(0, COUNT, random.integers(1, 60))
            tokens, _, bad = read(files, source, records)
            if bad or not np.array_equal(tokens, files.tokens[records]):
                wrong.append((seed, bad))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    source.close()


def test_a_reader_closed_while_others_read_gives_whole_records_or_says_so(
    files: RecordFiles,
) -> None:
    wrong: list[object] = []

    def work(source: SegmentReader, seed: int) -> None:
        records = np.random.default_rng(seed).integers(0, COUNT, 60)
        try:
            while True:
                tokens, _, bad = read(files, source, records)
                if bad or not np.array_equal(tokens, files.tokens[records]):
                    wrong.append((seed, bad))
        except StoreError as error:
            if "is closed" not in str(error):
                wrong.append(error)

    for seed in range(5):
        source = files.reader()
        threads = [threading.Thread(target=work, args=(source, seed + at)) for at in range(3)]
        for thread in threads:
            thread.start()
        read(files, source, np.arange(COUNT))
        source.close()
        for thread in threads:
            thread.join()
        assert open_files(files.folder) == []
    assert wrong == []


@pytest.mark.parametrize("access", ["cached", "direct"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_reads_with_files_and_threads_of_its_own(
    files: RecordFiles, access: str
) -> None:
    source = files.reader() if access == "cached" else direct_reader(files)
    check_others(files, source, {})
    child = os.fork()
    if child == 0:
        try:
            check_others(files, source, {})
            source.close()
            os._exit(0 if open_files(files.folder) == [] else 2)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    check_others(files, source, {})
    source.close()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_prefetch_advises_runs_once(files: RecordFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, size, how: seen.append((at, size)))
    layout, source = files.layout, files.reader()
    plan = files.plan(np.array([9, 8, 7, ROWS + 2, 20]))

    def not_cached(descriptor: int, buffers: list[bytearray], offset: int, flags: int) -> int:
        raise BlockingIOError

    check_others(files, source, {})
    source.prefetch(plan.locations[::-1])
    assert seen == [], "nothing is asked for that is in the page cache"
    monkeypatch.setattr(os, "preadv", not_cached)
    source.prefetch(plan.locations[::-1])
    tokens = [(layout.offset(7), 3), (layout.offset(20), 1), (layout.offset(2), 1)]
    wanted = [(offset, count * layout.stride) for offset, count in tokens]
    if layout.scale_bytes:
        scales = [(layout.scales_offset(row), count) for row, count in ((7, 3), (20, 1), (2, 1))]
        wanted += [(offset, count * layout.scale_bytes) for offset, count in scales]
    assert seen == wanted
    seen.clear()
    source.prefetch(np.array([], np.int64))
    source.prefetch(np.array([99 << 32]))
    assert seen == [], "an unknown segment is named when it is read"
    files.reader("direct").prefetch(plan.locations)
    assert seen == []
    source.close()


def test_without_verifying_the_bytes_are_trusted(files: RecordFiles) -> None:
    source = files.reader()
    flip(files.path(1), files.layout.offset(40) + 17)
    check_others(files, source, {ROWS + 40: "its bytes do not fit its checksum"})
    assert read(files, source, np.arange(COUNT), verify=False)[2] == {}
    source.close()


def test_resident_records_remember_what_was_damaged(files: RecordFiles) -> None:
    flip(files.path(0), files.layout.offset(5))
    os.truncate(files.path(2), files.layout.offset(69))
    with_damage, held_only = files.reader(), np.arange(4, COUNT)
    held = ResidentRecords.load(with_damage, files.plan(held_only), files.layout)
    with_damage.close()
    for segment in range(SEGMENTS):
        files.path(segment).unlink()
    tokens, scales, bad = read(files, held, [7, 5, COUNT - 1, 5, 3, 150])
    early = f"its segment file ends {files.layout.record_bytes} bytes early"
    assert bad == {5: "its bytes do not fit its checksum", COUNT - 1: early, 3: NOT_HELD}
    assert np.array_equal(tokens[[0, 5]], files.tokens[[7, 150]])
    assert not tokens[1:5].any()
    if files.layout.scale_bytes:
        assert np.array_equal(scales[[0, 5]], files.scales[[7, 150]])
    held.close()


def test_resident_records_too_large_for_the_memory_are_named(
    files: RecordFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*args: object, **options: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(mmap, "mmap", none_left)
    with pytest.raises(StoreError, match="the memory does not suffice") as caught:
        ResidentRecords(files.layout, np.arange(10))
    assert caught.value.hint == 'open the store with access="cached"'
