"""Reading records: every way to reach the system gives the same bytes, and the same faults."""

from __future__ import annotations

import errno
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edje.errors import StoreError
from edje.runtime.store import descriptors, gather, kernel_aio, threads
from edje.runtime.store import memory as resident
from edje.runtime.store.memory import NOT_HELD, ResidentRecords
from edje.runtime.store.reader import SegmentReader
from record_files import ROWS, SEGMENTS, SHAPES, RecordFiles, key_of, layout_of, write_files

WAYS = ["kernel AIO", "pread"]
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


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let readers reach the system in one way."""
    use(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture(autouse=True)
def many_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads and several chunks for a handful of records."""
    monkeypatch.setattr(gather, "CACHED_CHUNK_BYTES", 5 * PAGE)
    monkeypatch.setattr(gather, "DIRECT_CHUNK_BYTES", 7 * PAGE)
    monkeypatch.setattr(gather, "FEW_READS", 0)
    monkeypatch.setattr(threads, "BYTES_A_THREAD", PAGE)
    monkeypatch.setattr(threads, "usable_cores", lambda: 3)


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_aio, "_idle_queues", kernel_aio._IdleQueues())
    if name == "pread":
        monkeypatch.setattr(kernel_aio, "SYSTEM_CALLS", {})
    elif kernel_aio.open_queue().way != name:
        pytest.skip("this system offers no kernel AIO")


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
    bad = source.gather(plan, tokens.data, scales.data, verify=verify)
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


def flip(path: Path, at: int) -> None:
    """Flip one bit of byte `at`."""
    with path.open("r+b") as file:
        file.seek(at)
        value = file.read(1)[0]
        file.seek(at)
        file.write(bytes([value ^ 4]))


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
    request: pytest.FixtureRequest, all_files: dict[str, RecordFiles], way: str
) -> Iterator[dict[str, SegmentReader | ResidentRecords]]:
    """Records of every shape, served in one way."""
    readers = {
        shape: direct_reader(files) if request.param == "direct" else files.reader()
        for shape, files in all_files.items()
    }
    assert {source.way for source in readers.values()} == {way}
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


def test_int8_records_are_verified_without_a_buffer_for_scales(
    all_files: dict[str, RecordFiles],
) -> None:
    files = all_files["int8"]
    source, out = files.reader(), np.zeros((3, files.layout.record_bytes), np.uint8)
    assert source.gather(files.plan(np.array([5, 140, 6])), out.reshape(-1).data) == {}
    assert np.array_equal(out, files.tokens[[5, 140, 6]])
    source.close()


def test_runs_end_where_records_do_not_follow_one_another() -> None:
    rows = np.array([0, 1, 2, 4, 5, 5, 31, 32, 33, 1 << 32, (1 << 32) + 1])
    float16, int8 = layout_of("float16"), layout_of("int8")
    assert gather.run_starts(rows, None, float16, 100).tolist() == [0, 3, 5, 6, 9]
    scattered = np.array([0, 1, 5, 2, 3, 4, 6, 7, 8, 10, 9])
    assert gather.run_starts(rows, scattered, float16, 100).tolist() == [0, 2, 3, 5, 6, 9, 10]
    assert gather.run_starts(rows, None, int8, 100).tolist() == [0, 3, 5, 6, 7, 9], (
        "row 32 begins a group of int8 records"
    )
    assert gather.run_starts(rows, None, float16, 2).tolist() == [0, 2, 3, 4, 5, 6, 8, 9, 10]
    assert gather.run_starts(rows, None, float16, 5, 2).tolist() == [0, 2, 3, 5, 6, 7, 9]


@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize("direct", [False, True])
def test_all_threads_get_equally_many_chunks(num_threads: int, direct: bool) -> None:
    for shape in SHAPES:
        layout = layout_of(shape)
        reads = 2 if layout.scale_bytes else 1
        for count in range(1, 700, 23):
            size = gather.records_a_chunk(layout, count, num_threads, direct=direct)
            assert 1 <= size * reads <= kernel_aio.QUEUE_DEPTH
            chunks = -(-count // size)
            most = gather.records_a_chunk(layout, 10_000, 1, direct=direct)
            assert chunks <= -(-count // (most * num_threads)) * num_threads


def test_reads_are_the_kernels_iocbs() -> None:
    batch = kernel_aio.ReadBatch(2)
    batch.reads[1, kernel_aio.FILE] = -1 << kernel_aio.FILE_BITS
    batch.reads[1, kernel_aio.ADDRESS] = 0x7F00_1234_5678
    batch.reads[1, [kernel_aio.WANTED, kernel_aio.NUM_BYTES]] = 49152
    batch.reads[1, kernel_aio.OFFSET] = 1 << 40
    # aio_data; aio_key, aio_rw_flags; aio_lio_opcode, aio_reqprio, aio_fildes; aio_buf,
    # aio_nbytes, aio_offset; aio_reserved2; aio_flags, aio_resfd
    iocb = (49152, 0, 0, 0, 0, -1, 0x7F00_1234_5678, 49152, 1 << 40, 0, 0, 0)
    assert batch.reads[1].tobytes() == struct.pack("<QIIHhiQQqQII", *iocb)


def test_a_flipped_bit_is_found_and_only_that_record_is_bad(files: RecordFiles, way: str) -> None:
    source, misfit = files.reader(), "its bytes do not fit its checksum"
    flip(files.path(1), files.layout.offset(40) + 17)
    check_others(files, source, {ROWS + 40: misfit})
    if files.layout.scale_bytes:
        flip(files.path(2), files.layout.scales_offset(3) + 1)
        check_others(files, source, {ROWS + 40: misfit, 2 * ROWS + 3: misfit})
    _, _, bad = read(files, source, np.arange(COUNT), verify=False)
    assert bad == {}, "trusted: verify=False compares nothing"
    source.close()


@pytest.mark.parametrize("access", ["cached", "direct"])
def test_a_file_that_shrinks_while_open_gives_reasons(
    files: RecordFiles, way: str, access: str
) -> None:
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


def test_files_that_cannot_be_used_spare_the_others(files: RecordFiles, way: str) -> None:
    source = files.reader()
    os.rename(files.path(0), files.path(1))
    name = "its file 000001.tokens cannot be used: it is another segment's file"
    _, _, bad = read(files, source, [0, ROWS, 2 * ROWS])
    assert bad[0] == "its file 000000.tokens cannot be opened (No such file or directory)"
    assert bad[ROWS].startswith(name)
    assert set(bad) == {0, ROWS}
    files.path(1).write_bytes(b"short")
    _, _, bad = read(files, source, [ROWS])
    assert bad[ROWS].endswith("its header page ends after 5 of 4096 bytes")
    source.close()


def test_a_segment_that_the_catalog_does_not_know_is_not_opened(files: RecordFiles) -> None:
    source = SegmentReader(files.folder, files.layout, key_of=lambda _: None)
    assert read(files, source, [0])[2] == {0: "the catalog knows no segment 0"}
    source.close()


class RefusingQueue:
    """A queue that carries out nothing."""

    way = "refusing"

    def read(self, batch: kernel_aio.ReadBatch, start: int, stop: int) -> list[int]:
        return list(range(start, stop))

    def close(self) -> None:
        pass

    give_back = close


def test_reads_that_fail_together_are_tried_one_by_one(
    files: RecordFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "open_queue", RefusingQueue)
    source, preadv = files.reader(), os.preadv
    check_others(files, source, {})

    def broken(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset == files.layout.offset(3):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, [buffers[0][:1000]], offset)  # short reads are no fault

    monkeypatch.setattr(os, "preadv", broken)
    reason = "cannot be read (Input/output error)"
    check_others(files, source, dict.fromkeys((3, ROWS + 3, 2 * ROWS + 3), reason))
    source.close()


def test_an_interrupt_gives_the_queue_back_before_the_buffers(
    all_files: dict[str, RecordFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    use("kernel AIO", monkeypatch)
    files, closed = all_files["float16"], []
    close = kernel_aio.KernelQueue.close

    def interrupt(self: kernel_aio.KernelQueue, batch: object, num_events: int) -> list[int]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kernel_aio.KernelQueue, "_failed", interrupt)
        patch.setattr(
            kernel_aio.KernelQueue, "close", lambda self: (closed.append(self), close(self))
        )
        source = files.reader()
        with pytest.raises(KeyboardInterrupt):
            read(files, source, [1, 2])
    assert closed
    check_others(files, source, {})
    source.close()


def test_queues_of_closed_readers_serve_the_next_but_never_a_forked_child(
    all_files: dict[str, RecordFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    use("kernel AIO", monkeypatch)
    made, init = [], kernel_aio.KernelQueue.__init__

    def counted(self: kernel_aio.KernelQueue) -> None:
        made.append(self)
        init(self)

    monkeypatch.setattr(kernel_aio.KernelQueue, "__init__", counted)
    for _ in range(5):
        source = all_files["float16"].reader()
        assert source.way == "kernel AIO"
        check_others(all_files["float16"], source, {})
        source.close()
    num_made = len(made)
    assert 1 <= num_made <= threads.MOST_READING
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as a forked child would see it
    kernel_aio.open_queue().close()
    assert len(made) == num_made + 1


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.EAGAIN])
def test_without_kernel_aio_pread_is_used_and_named(
    all_files: dict[str, RecordFiles], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(self: kernel_aio.KernelQueue, depth: int = 1) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(kernel_aio, "_idle_queues", kernel_aio._IdleQueues())
    monkeypatch.setattr(kernel_aio.KernelQueue, "__init__", refused)
    source = all_files["float16"].reader()
    assert source.way == "pread"
    check_others(all_files["float16"], source, {})
    source.close()


def test_a_little_is_read_without_a_queue_of_the_kernel(
    all_files: dict[str, RecordFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "FEW_READS", 4)
    monkeypatch.setattr(gather, "CACHED_CHUNK_BYTES", 100 * PAGE)
    monkeypatch.setattr(threads, "BYTES_A_THREAD", 100 * PAGE)
    monkeypatch.setattr(gather, "open_queue", RefusingQueue)
    files, source, tried = all_files["float16"], all_files["float16"].reader(), []
    monkeypatch.setattr(RefusingQueue, "read", lambda self, batch, *span: tried.append(span) or [])
    tokens, _, bad = read(files, source, [1, 3, 5, 7])
    assert (bad, tried) == ({}, [])
    assert np.array_equal(tokens, files.tokens[[1, 3, 5, 7]])
    read(files, source, [1, 3, 5, 7, 9])
    assert tried == [(0, 5)]
    source.close()


def open_segments(files: RecordFiles) -> list[str]:
    """Paths of the segment files that this process holds open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(link)
        except FileNotFoundError:  # the descriptor of this very listing
            continue
        if target.startswith(str(files.folder)):
            found.append(target)
    return found


def test_no_more_files_stay_open_than_allowed_and_none_after_close(files: RecordFiles) -> None:
    source = files.reader()
    source._process().files.cached.max_open = 2
    for _ in range(3):
        check_others(files, source, {})
        assert len(open_segments(files)) <= 2
    source.close()
    source.close()
    assert open_segments(files) == []
    with pytest.raises(StoreError, match="is closed"):
        read(files, source, [0])


@pytest.fixture
def few_descriptors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], None]:
    """Let no more than so many files below a folder be open."""
    real = os.open

    def limit(most: int, folder: str) -> None:
        def limited(path: object, flags: int, *more: int) -> int:
            held = [os.readlink(f"/proc/self/fd/{fd}") for fd in descriptors_of_process()]
            if str(path).startswith(folder) and sum(h.startswith(folder) for h in held) >= most:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return real(path, flags, *more)  # type: ignore[arg-type]

        monkeypatch.setattr(descriptors.os, "open", limited)

    return limit


def descriptors_of_process() -> Iterator[int]:
    for name in os.listdir("/proc/self/fd"):
        if os.path.islink(f"/proc/self/fd/{name}"):
            yield int(name)


def test_too_many_open_files_close_idle_ones_first(
    files: RecordFiles, few_descriptors: Callable[[int, str], None]
) -> None:
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
def test_threads_read_side_by_side(files: RecordFiles, way: str, max_open: int) -> None:
    source, wrong = files.reader(), []
    source._process().files.cached.max_open = max_open

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


@pytest.mark.parametrize("access", ["cached", "direct"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_reads_with_files_and_threads_of_its_own(
    files: RecordFiles, way: str, access: str
) -> None:
    source = files.reader() if access == "cached" else direct_reader(files)
    check_others(files, source, {})
    child = os.fork()
    if child == 0:
        try:
            check_others(files, source, {})
            source.close()
            os._exit(0 if open_segments(files) == [] else 2)
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
    assert held.num_bytes == len(held_only) * (files.layout.record_bytes + files.layout.scale_bytes)
    assert 0 <= held.huge_page_bytes <= held.num_bytes
    held.close()


def test_resident_records_of_an_empty_store(files: RecordFiles) -> None:
    source = files.reader()
    held = ResidentRecords.load(source, files.plan(np.array([], np.int64)), files.layout)
    assert held.num_bytes == 0
    assert read(files, held, [1])[2] == {1: NOT_HELD}
    source.close()


def test_resident_records_too_large_for_the_memory_are_named(
    files: RecordFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*args: object, **options: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(mmap, "mmap", none_left)
    with pytest.raises(StoreError, match="the memory does not suffice") as caught:
        ResidentRecords(files.layout, np.arange(10))
    assert caught.value.hint == 'open the store with access="cached"'


def test_no_more_is_held_than_the_container_may_take(
    files: RecordFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system would promise the memory, and end the process when it is filled."""
    need = 10 * (files.layout.record_bytes + files.layout.scale_bytes)
    monkeypatch.setattr(resident, "available_memory_bytes", lambda: need - 1)
    with pytest.raises(StoreError, match=f"{need:,} bytes .* has {need - 1:,} bytes left"):
        ResidentRecords(files.layout, np.arange(10))
    monkeypatch.setattr(resident, "available_memory_bytes", lambda: need)
    ResidentRecords(files.layout, np.arange(10)).close()


def test_an_unknown_key_function_is_asked_once_a_file(files: RecordFiles) -> None:
    asked: list[int] = []

    def asking(segment: int) -> int | None:
        asked.append(segment)
        return key_of(segment)

    source = SegmentReader(files.folder, files.layout, key_of=asking)
    for _ in range(3):
        check_others(files, source, {})
    assert asked == [0, 1, 2]
    source.close()
