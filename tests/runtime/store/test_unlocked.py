"""Reading and hashing without the GIL: the same bytes and hashes as Python's, on every CPU."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.runtime.store.unlocked import LEAST_BYTES, is_built, read_and_hash

pytestmark = pytest.mark.skipif(not is_built(), reason="the C extension was not built")
CONTENT = np.random.default_rng(0).integers(0, 256, 1 << 16, np.uint8).tobytes()


def address(array: np.ndarray) -> int:
    """Where an array begins in memory."""
    return array.__array_interface__["data"][0]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random bytes."""
    found = tmp_path_factory.mktemp("unlocked") / "file"
    found.write_bytes(CONTENT)
    return found


def read(file: int, room: np.ndarray, offsets: list[int], seeds: list[int] | None):
    """Read a record from each offset to each row of `room`; return how many came, and hashes."""
    table = np.zeros((5, len(offsets)), np.int64)
    table[0], table[1] = file, offsets
    table[2] = address(room) + np.arange(len(offsets)) * room.strides[0]
    if seeds is not None:
        table.view(np.uint64)[3] = seeds
    num_read = read_and_hash(address(table), len(offsets), room.shape[-1], seeds is not None)
    return num_read, table[4].view(np.uint64).tolist()


@pytest.fixture
def file(path: Path):
    """Its descriptor."""
    with path.open("rb") as opened:
        yield opened.fileno()


@settings(max_examples=200, deadline=None)
@given(
    size=st.one_of(st.integers(LEAST_BYTES, 5000), st.sampled_from([1024, 2048, 24576, 49152])),
    places=st.lists(
        st.tuples(st.integers(0, 1 << 14), st.integers(0, (1 << 64) - 1)), min_size=1, max_size=4
    ),
)
def test_any_record_is_read_and_hashed_as_by_xxhash(path, size, places):
    offsets, seeds = [at for at, _ in places], [seed for _, seed in places]
    room = np.zeros((len(places), size), np.uint8)
    with path.open("rb") as opened:
        num_read, sums = read(opened.fileno(), room, offsets, seeds)
    assert num_read == len(places)
    for at, seed, record, found in zip(offsets, seeds, room, sums, strict=True):
        assert record.tobytes() == CONTENT[at : at + size]
        assert found == xxhash.xxh3_64_intdigest(record, seed)


def test_without_seeds_records_are_read_only(file):
    room = np.zeros((2, 500), np.uint8)
    assert read(file, room, [7, 9], None) == (2, [0, 0])
    assert room[1].tobytes() == CONTENT[9:509]


@pytest.mark.parametrize("offset", [(1 << 16) - 100, 1 << 20])
def test_a_file_that_ends_early_gives_only_what_comes_before(file, offset):
    room = np.zeros((3, 500), np.uint8)
    assert read(file, room, [0, offset, 0], [1, 2, 3])[0] == 1
    assert not room[2].any()


def test_a_closed_file_gives_nothing():
    assert read(-1, np.zeros((1, 500), np.uint8), [0], [1])[0] == 0


def test_records_too_short_for_this_hash_are_refused(file):
    with pytest.raises(ValueError, match="expected over 240"):
        read(file, np.zeros((1, LEAST_BYTES - 1), np.uint8), [0], [1])


def test_other_threads_go_on_while_it_reads(file):
    """With the GIL held, the other thread would note no time between the call's begin and end."""
    noted, ending = [], threading.Event()

    def note_times() -> None:
        while not ending.wait(1e-3):
            noted.append(perf_counter())

    table, room = np.zeros((5, 100_000), np.int64), np.zeros(49_152, np.uint8)
    table[2] = address(room)
    noting = threading.Thread(target=note_times)
    noting.start()
    table[0], began = file, perf_counter()
    read_and_hash(address(table), 100_000, room.size, True)
    took = perf_counter() - began
    ending.set()
    noting.join()
    assert any(0.2 < (at - began) / took < 0.8 for at in noted)


def test_it_can_be_switched_off():
    program = "from edje.runtime.store.unlocked import is_built; print(is_built())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"EDJE_UNLOCKED_READ": "0", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "False", done.stderr
