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

from edje.runtime.store.scattered import address
from edje.runtime.store.unlocked import LEAST_BYTES, is_built, read_hashed

pytestmark = pytest.mark.skipif(not is_built(), reason="the C extension was not built")
CONTENT = np.random.default_rng(0).integers(0, 256, 1 << 16, np.uint8).tobytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random bytes."""
    found = tmp_path_factory.mktemp("unlocked") / "file"
    found.write_bytes(CONTENT)
    return found


def read(path: Path, size: int, offsets: list[int], seeds: list[int] | None):
    """Return the bytes read and their hashes, None where not all came whole."""
    room = np.zeros((len(offsets), size), np.uint8)
    places = address(room) + np.arange(len(offsets)) * size
    sown = None if seeds is None else np.array(seeds, np.uint64)
    with path.open("rb") as file:
        sums = read_hashed(file.fileno(), places, size, np.array(offsets, np.int64), sown)
    return room, sums


@settings(max_examples=200, deadline=None)
@given(
    size=st.one_of(st.integers(LEAST_BYTES, 5000), st.sampled_from([1024, 2048, 24576, 49152])),
    places=st.lists(
        st.tuples(st.integers(0, 1 << 14), st.integers(0, (1 << 64) - 1)), min_size=1, max_size=4
    ),
)
def test_any_record_is_read_and_hashed_as_by_xxhash(path, size, places):
    offsets, seeds = [at for at, _ in places], [seed for _, seed in places]
    room, sums = read(path, size, offsets, seeds)
    for at, seed, record, found in zip(offsets, seeds, room, sums.tolist(), strict=True):
        assert record.tobytes() == CONTENT[at : at + size]
        assert found == xxhash.xxh3_64_intdigest(record, seed)


def test_without_seeds_records_are_read_only(path):
    room, sums = read(path, 500, [7, 9], None)
    assert sums is not None
    assert room[1].tobytes() == CONTENT[9:509]


@pytest.mark.parametrize("offset", [(1 << 16) - 100, 1 << 20])
def test_a_file_that_ends_early_gives_nothing(path, offset):
    assert read(path, 500, [0, offset], [1, 2])[1] is None


def test_a_closed_file_gives_nothing():
    room = np.zeros(500, np.uint8)
    places, offsets = np.array([address(room)]), np.zeros(1, np.int64)
    assert read_hashed(-1, places, 500, offsets, np.zeros(1, np.uint64)) is None


def test_records_too_short_for_this_hash_are_refused(path):
    with pytest.raises(ValueError, match="expected over 240"):
        read(path, LEAST_BYTES - 1, [0], [1])


def test_other_threads_go_on_while_it_reads(path):
    """With the GIL held, the other thread would note no time between the call's begin and end."""
    noted, ending = [], threading.Event()

    def note_times() -> None:
        while not ending.wait(1e-3):
            noted.append(perf_counter())

    offsets, room = np.zeros(100_000, np.int64), np.zeros(49_152, np.uint8)
    places, seeds = np.full(len(offsets), address(room)), np.zeros(len(offsets), np.uint64)
    noting = threading.Thread(target=note_times)
    noting.start()
    with path.open("rb") as file:
        began = perf_counter()
        read_hashed(file.fileno(), places, room.size, offsets, seeds)
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
