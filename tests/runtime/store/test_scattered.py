"""Reading many places in one call: all whole and in their place, or the caller is told to."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from edje.runtime.store.scattered import MOST_QUEUES, MOST_READS, is_offered, read_places

SIZE, FILE_BYTES = 1000, 1 << 20
offered = pytest.mark.skipif(not is_offered(), reason="this system reads one place after another")


@dataclass(frozen=True)
class Files:
    """Open files of random bytes: `content` uint8 [F, FILE_BYTES]."""

    descriptors: list[int]
    content: np.ndarray

    def read(self, count: int, seed: int = 0) -> bool | None:
        """Read random places; return what was answered, None if bytes are wrong in spite of it."""
        random = np.random.default_rng(seed)
        which = random.integers(0, len(self.content), count)
        offsets = random.integers(0, FILE_BYTES - SIZE, count)
        out = np.zeros((count, SIZE), np.uint8)
        order = random.permutation(count)
        addresses = out.__array_interface__["data"][0] + order * SIZE
        answer = read_places([self.descriptors[at] for at in which], addresses, SIZE, offsets)
        places = offsets[:, None] + np.arange(SIZE)
        are_right = np.array_equal(out[order], self.content[which[:, None], places])
        return answer if are_right or not answer else None


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    content = np.random.default_rng(0).integers(1, 255, (3, FILE_BYTES), np.uint8)
    descriptors = []
    for at, each in enumerate(content):
        (tmp_path / str(at)).write_bytes(each.tobytes())
        descriptors.append(os.open(tmp_path / str(at), os.O_RDONLY))
    yield Files(descriptors, content)
    for descriptor in descriptors:
        os.close(descriptor)


@offered
@pytest.mark.parametrize("count", [0, 1, 2, MOST_READS, MOST_READS + 1, 3 * MOST_READS + 5])
def test_places_of_several_files_come_to_their_addresses(files: Files, count: int) -> None:
    assert files.read(count) is True
    assert files.read(count, seed=1) is True


@pytest.mark.parametrize("count", [3, MOST_READS + 3])
@pytest.mark.parametrize("fault", ["end", "past the end", "no file", "no memory"])
def test_one_place_that_does_not_come_whole_is_told(files: Files, count: int, fault: str) -> None:
    descriptors, offsets = [files.descriptors[0]] * count, np.zeros(count, np.int64)
    out = np.zeros((count, SIZE), np.uint8)
    addresses = out.__array_interface__["data"][0] + np.arange(count) * SIZE
    if fault == "no file":
        descriptors[-2] = -1
    elif fault == "no memory":
        addresses[-2] = 0
    else:
        offsets[-2] = FILE_BYTES - SIZE + 1 if fault == "end" else 2 * FILE_BYTES
    assert not read_places(descriptors, addresses, SIZE, offsets)
    assert files.read(count) is is_offered(), "nothing is lost by it"


@offered
def test_more_threads_than_queues_read_right_or_are_told_to_read_otherwise(files: Files) -> None:
    answers: list[bool | None] = []

    def work(seed: int) -> None:
        answers.extend(files.read(MOST_READS + 9, seed + at) for at in range(20))

    threads = [threading.Thread(target=work, args=(20 * at,)) for at in range(MOST_QUEUES + 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 20 * len(threads)
    assert None not in answers
    assert answers.count(True) > len(answers) // 2
    assert files.read(9) is True


@offered
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_queues_of_its_own(files: Files) -> None:
    """Also those that the parent's threads are reading with at that moment."""
    is_over = threading.Event()

    def read_on() -> None:
        while not is_over.is_set():
            files.read(MOST_READS)

    threads = [threading.Thread(target=read_on) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for seed in range(5):
            child = os.fork()
            if child == 0:
                are_right = [files.read(99, seed + at) is True for at in range(MOST_QUEUES + 1)]
                os._exit(0 if all(are_right) else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert files.read(99, seed) is True
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


class Interrupted(Exception):
    """Raised by a signal, wherever the program is."""


@offered
def test_an_interrupt_at_any_time_loses_nothing(files: Files) -> None:
    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    num_interrupts = 0
    try:
        for seed in range(MOST_QUEUES // 2):
            try:
                signal.setitimer(signal.ITIMER_REAL, random.Random(seed).uniform(1e-4, 3e-3))
                while True:
                    assert files.read(MOST_READS, seed) is True
            except Interrupted:
                num_interrupts += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert num_interrupts == MOST_QUEUES // 2
    assert files.read(MOST_READS) is True


# What a process does before it reads: change nothing; know no calls here; call what this kernel
# does not have; want more than fs.aio-max-nr.
SYSTEMS = {
    "as it is": "",
    "no numbers": "scattered.NUMBERS.clear()",
    "no such call": "scattered.NUMBERS[os.uname().machine] = (9999,) * 4",
    "all taken": "scattered.MOST_READS = 1 << 20",
}
PROGRAM = """
import os, sys
from pathlib import Path
import numpy as np
from edje.runtime.store import read, scattered
sys.path.insert(0, {support!r})
from record_files import write_files
{setup}
read.is_built = lambda: False
read.BYTES_IN_TURNS = 20 << 10
read.copying_threads = lambda: 2
files = write_files(Path({folder!r}), {shape!r})
source, records = files.reader(), np.random.default_rng(0).permutation(200)
out = np.zeros((200, files.layout.record_bytes), np.uint8)
scales = np.zeros((200, files.layout.scale_bytes), np.uint8)
for _ in range(3):
    out[:] = 0
    room = scales.reshape(-1).data if scales.size else None
    assert source.gather(files.plan(records), out.reshape(-1).data, room) == {{}}
    assert np.array_equal(out, files.tokens[records])
    assert np.array_equal(scales, files.scales[records])
print(scattered.is_offered())
"""


@pytest.mark.parametrize("shape", ["float16", "int8"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_whatever_the_system_offers_the_reader_reads_the_same(
    tmp_path: Path, system: str, shape: str
) -> None:
    support = str(Path(__file__).parents[2] / "support")
    names = {"support": support, "folder": str(tmp_path / "store"), "shape": shape}
    program = PROGRAM.format(setup=SYSTEMS[system], **names)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(is_offered() and system == "as it is")
