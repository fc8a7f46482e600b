"""Killed again and again at random, then finished: as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edje.runtime.indexing.flow import read_skipped
from image_files import encoded, write_tar
from mean_bundle import make_bundle, records
from waiting import wait_until

NUM_IMAGES = 2000
NO_IMAGES = range(50, NUM_IMAGES, 100)

INDEX = """
import sys
from edje.engines.image import ImageEncoder
from edje.runtime.indexing.index import index_images
model, images, store = sys.argv[1:]
encoder = ImageEncoder.open(model)

def progress(done, total):
    print(done, flush=True)

index_images(encoder, images, store, batch_size=32, workers=1, progress=progress)
"""


def members() -> Iterator[tuple[str, bytes]]:
    """Small images that all differ; one in a hundred is none."""
    noise = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 6, 6, 3), dtype=np.uint8)
    for number in range(NUM_IMAGES):
        content = b"no image" if number in NO_IMAGES else encoded(Image.fromarray(noise[number]))
        yield f"{number:04}.png", content


def write_folder(path: Path, contents: Iterable[tuple[str, bytes]]) -> Path:
    path.mkdir()
    for name, content in contents:
        (path / name).write_bytes(content)
    return path


def start(*arguments: Path) -> subprocess.Popen[str]:
    """Start an index run in a process group of its own; it prints a line a batch."""
    command = [sys.executable, "-c", INDEX, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def finish(*arguments: Path) -> int:
    """Let a run come to its end; return how many images it found done when it began."""
    with start(*arguments) as process:
        assert process.stdout is not None
        lines = process.stdout.read().split()
    assert process.returncode == 0
    return int(lines[0])


def kill(process: subprocess.Popen[str], num_batches: int, delay_s: float, whole: bool) -> None:
    """Kill a run so much after it began, and wait until all of its processes are gone."""
    with process:
        assert process.stdout is not None
        for _ in range(num_batches):
            process.stdout.readline()
        time.sleep(delay_s)
        (os.killpg if whole else os.kill)(process.pid, signal.SIGKILL)
    wait_until(lambda: group_is_gone(process.pid), "the decoders to end with their parent")


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "name", "num_kills"), [(write_folder, "images", 20), (write_tar, "images.tar.gz", 5)]
)
def test_killed_at_random_then_finished_is_exact(
    tmp_path: Path, write: Callable[..., Path], name: str, num_kills: int
) -> None:
    bundle, images = make_bundle(tmp_path / "bundle"), write(tmp_path / name, members())
    assert finish(bundle, images, tmp_path / "whole") == 0
    draw = random.Random(4)
    for number in range(num_kills):
        process = start(bundle, images, tmp_path / "killed")
        # Every third time the parent alone: its decoders must notice.
        kill(process, draw.randrange(90 // num_kills), draw.uniform(0, 0.05), number % 3 < 2)
    done = finish(bundle, images, tmp_path / "killed")
    if write is write_folder:
        assert NUM_IMAGES / 4 < done < NUM_IMAGES, "they were killed in the midst of it"
    whole, killed = records(tmp_path / "whole"), records(tmp_path / "killed")
    assert list(killed) == [f"{n:04}.png" for n in range(NUM_IMAGES) if n not in NO_IMAGES]
    assert killed == whole
    skipped = [entry.id for entry in read_skipped(tmp_path / "killed")]
    assert skipped == [f"{number:04}.png" for number in NO_IMAGES]
