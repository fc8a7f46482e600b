"""Decoder processes: results in order, a death costs one image, none outlives its parent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deadly_images import Crashing, Hanging, ShotOnce
from edje.bundle import ImageSpec
from edje.errors import RequestError
from edje.runtime.indexing import decoders
from edje.runtime.indexing.decoders import DecoderPool, default_workers
from edje.runtime.indexing.images import Unreadable, decode_entry
from edje.runtime.indexing.sources import ImageFile
from waiting import wait_until

SPEC = ImageSpec(8, 2, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def files(tmp_path: Path) -> list[ImageFile]:
    """Twelve images of different colours."""
    for number in range(12):
        Image.new("RGB", (9, 20), (20 * number,) * 3).save(tmp_path / f"{number:02}.png")
    return [ImageFile(path.name, path) for path in sorted(tmp_path.glob("*.png"))]


def test_results_come_in_order_and_equal_those_of_this_process(files: list[ImageFile]) -> None:
    with DecoderPool(SPEC, 2) as pool:
        futures = [pool.submit(files[at : at + 3]) for at in range(0, 12, 3)]
        decoded = [image for future in futures for image in future.result()]
    for image, file in zip(decoded, files, strict=True):
        np.testing.assert_array_equal(image, decode_entry(file, SPEC))
        assert image.shape == (8, 8, 3)


def test_a_crash_costs_the_image_that_it_came_from(files: list[ImageFile]) -> None:
    files[4] = Crashing("crash", files[4].path)
    files[5] = Crashing("again", files[5].path)
    with DecoderPool(SPEC, 1) as pool:
        decoded = pool.submit(files).result()
        after = pool.submit(files[:2]).result()
    dead = [number for number, image in enumerate(decoded) if isinstance(image, Unreadable)]
    assert dead == [4, 5]
    assert decoded[4] == Unreadable("its decoder process died (SIGSEGV)")
    np.testing.assert_array_equal(decoded[6], decode_entry(files[6], SPEC))
    np.testing.assert_array_equal(after[1], decode_entry(files[1], SPEC))


def test_a_process_that_another_killed_loses_no_image(files: list[ImageFile]) -> None:
    files[3] = ShotOnce("shot", files[3].path)
    with DecoderPool(SPEC, 1) as pool:
        decoded = pool.submit(files).result()
    assert files[3].path.with_suffix(".shot").exists()
    assert [isinstance(image, np.ndarray) for image in decoded] == [True] * 12


def test_a_decoder_that_hangs_is_ended(
    files: list[ImageFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "MAX_DECODE_S", 0.5)
    files[1] = Hanging("hang", files[1].path)
    with DecoderPool(SPEC, 1) as pool:
        decoded = pool.submit(files[:3]).result()
    assert isinstance(decoded[1], Unreadable)
    assert "took longer than" in decoded[1].reason
    assert isinstance(decoded[2], np.ndarray)


def test_closing_waits_for_nothing(files: list[ImageFile]) -> None:
    before = children_of(os.getpid())
    pool = DecoderPool(SPEC, 1)
    future = pool.submit([Hanging("hang", files[0].path)])
    wait_until(lambda: children_of(os.getpid()) != before)
    pool.close()
    assert future.result(0) == []  # after MAX_DECODE_S it would say that it took too long


def test_a_process_that_cannot_start_is_an_error(
    files: list[ImageFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    with (
        DecoderPool(SPEC, 1) as pool,
        pytest.raises(RequestError, match="cannot be started: it ended with exit code 1"),
    ):
        pool.submit(files).result()


def test_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, 1), (2, 1), (16, 15)):
        monkeypatch.setattr(decoders, "usable_cores", lambda cores=cores: cores)
        assert default_workers() == expected
    with pytest.raises(RequestError, match="workers is 0"):
        DecoderPool(SPEC, 0)


# No guard for `__main__`: the decoders are no copies of the caller.
PARENT = """
from pathlib import Path
import deadly_images
from edje.bundle import ImageSpec
from edje.runtime.indexing import decoders
from edje.runtime.indexing.sources import ImageFile
decoders.MAX_DECODE_S = 2
pool = decoders.DecoderPool(ImageSpec(8, 2, 1 / 255, (0.5,) * 3, (0.5,) * 3), 2)
pool.submit([deadly_images.Hanging("hang", Path(deadly_images.__file__))])
pool.submit([ImageFile("quick", Path("none"))]).result()
print("decoded", flush=True)
input()
"""


def test_decoders_idle_or_hanging_end_with_their_parent() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "support")}
    program = [sys.executable, "-c", PARENT]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(program, env=environment, **pipes) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"decoded\n"
        wait_until(lambda: len(children_of(parent.pid)) == 2, "both decoders")
        pids = children_of(parent.pid)
        parent.kill()
    wait_until(lambda: not any(map(is_running, pids)), "the decoders to end with their parent")


def children_of(pid: int) -> set[int]:
    """The processes that `pid` has started and that still run."""
    found = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return {each for each in found if (state := state_of(each)) and int(state[1]) == pid}


def is_running(pid: int) -> bool:
    state = state_of(pid)
    return state is not None and state[0] != "Z"


def state_of(pid: int) -> list[str] | None:
    """What Linux says of a process: its state, its parent and more; None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
