"""Many writers, one committer: whatever dies or runs twice, every image becomes one record."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edje.engines.image import ImageEncoder
from edje.errors import RequestError, StoreError
from edje.runtime.indexing.cluster import (
    MAX_TRIES,
    SegmentEncoder,
    TaskResult,
    adopt_leftovers,
    commit_result,
    open_run,
    read_task,
    run_task,
    write_plan,
)
from edje.runtime.indexing.flow import Group
from edje.runtime.indexing.index import index_images
from edje.runtime.indexing.sources import ImageFile, SkippedImage, open_source
from edje.runtime.store import SegmentWriter, StoreLayout, TokenStore
from mean_bundle import HIDDEN, NUM_TOKENS, make_bundle, records

NUM_IMAGES = 24


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("cluster") / "bundle")


@pytest.fixture(scope="module")
def encoder(bundle: Path) -> ImageEncoder:
    return ImageEncoder.open(bundle)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of noise, and a file that is none."""
    folder = tmp_path_factory.mktemp("cluster") / "photos"
    folder.mkdir()
    rng = np.random.default_rng(7)
    for number in range(NUM_IMAGES):
        noise = rng.integers(0, 256, (12, 9, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number:03d}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def expected(
    encoder: ImageEncoder, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """Every record, as one process makes it."""
    store = tmp_path_factory.mktemp("cluster") / "alone"
    index_images(encoder, photos, store, workers=1)
    return records(store)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """An empty store."""
    make_store(tmp_path / "s").close()
    return tmp_path / "s"


def make_store(folder: Path, *, dtype: str = "float16", segment_bytes: int = 1 << 20) -> TokenStore:
    return TokenStore.create(
        folder,
        num_tokens=NUM_TOKENS,
        hidden=HIDDEN,
        fingerprint_encoder="tower-1",
        dtype=dtype,
        segment_bytes=segment_bytes,
    )


def int8_records(store: Path) -> dict[str, tuple[bytes, bytes]]:
    with TokenStore.open(store) as opened:
        (batch,) = opened.iterate()
        return {
            image_id: (tokens.tobytes(), scales.tobytes())
            for image_id, tokens, scales in zip(batch.ids, batch.tokens, batch.scales, strict=True)
        }


def parts_of(photos: Path, size: int) -> Iterable[Group[ImageFile]]:
    entries = open_source(photos).entries(lambda _: True)
    while files := [entry for entry in islice(entries, size) if isinstance(entry, ImageFile)]:
        yield Group(files, [])


def incoming(store: Path) -> list[str]:
    return sorted(path.name for path in (store / "incoming").rglob("*"))


def test_tasks_become_the_same_records_as_one_process_makes(
    store: Path, photos: Path, encoder: ImageEncoder, expected: dict[str, bytes]
) -> None:
    with TokenStore.open(store, mode="a") as target:
        with open_run(target) as run, SegmentEncoder(encoder, target.layout) as segments:
            tasks, skipped = write_plan(run, parts_of(photos, 10))
            assert (len(tasks), skipped) == (3, [])
            results = [run_task(segments, run, task) for task in reversed(tasks)]
            added = [commit_result(target, run, result) for result in results]
            assert incoming(store) == sorted([run.name, "plan.jsonl"])
        assert added == [4, 10, 10]
        (noted,) = [image for result in results for image in result.skipped]
        assert noted == SkippedImage(
            "notes.txt", "not an image of a known format", str(photos.resolve())
        )
        assert {result.encoder for result in results} == {encoder.name}
    assert records(store) == expected
    assert incoming(store) == []


def test_attempts_that_run_twice_add_every_image_once(
    store: Path, photos: Path, encoder: ImageEncoder, expected: dict[str, bytes]
) -> None:
    with TokenStore.open(store, mode="a") as target:
        with open_run(target) as run, SegmentEncoder(encoder, target.layout) as segments:
            tasks, _ = write_plan(run, parts_of(photos, 7))
            attempts = [run_task(segments, run, task) for task in [*tasks, *tasks]]
            assert len({name for result in attempts for name in result.segments}) == 8
            added = [commit_result(target, run, result) for result in attempts]
        assert added == [7, 7, 7, 3, 0, 0, 0, 0]
    assert records(store) == expected


def test_a_task_larger_than_a_segment_seals_several(
    tmp_path: Path, photos: Path, encoder: ImageEncoder, expected: dict[str, bytes]
) -> None:
    with make_store(tmp_path / "s", segment_bytes=4096 * 11) as target:
        assert target.layout.max_rows == 10
        with SegmentEncoder(encoder, target.layout, batch_size=4) as segments:
            entries = open_source(photos).entries(lambda _: True)
            paths, skipped = segments.write(entries, tmp_path / "s/incoming", task="all")
        assert len(paths) == 3  # of eight each: whole batches only
        assert [image.id for image in skipped] == ["notes.txt"]
        assert target.commit_segments(paths).num_added == NUM_IMAGES
    assert records(tmp_path / "s") == expected


def test_segments_of_an_int8_store_are_quantised(
    tmp_path: Path, photos: Path, encoder: ImageEncoder
) -> None:
    index_images(encoder, photos, tmp_path / "alone", workers=1, dtype="int8")
    with make_store(tmp_path / "s", dtype="int8") as target:
        with SegmentEncoder(encoder, target.layout) as segments:
            entries = open_source(photos).entries(lambda _: True)
            paths, _ = segments.write(entries, tmp_path / "s/incoming", task="all")
        assert target.commit_segments(paths).num_added == NUM_IMAGES
    assert int8_records(tmp_path / "s") == int8_records(tmp_path / "alone")


def test_a_run_that_fails_keeps_what_was_sealed(
    store: Path, photos: Path, encoder: ImageEncoder, expected: dict[str, bytes]
) -> None:
    with TokenStore.open(store, mode="a") as target:

        def fail_after_one_task() -> None:
            with open_run(target) as run, SegmentEncoder(encoder, target.layout) as segments:
                tasks, _ = write_plan(run, parts_of(photos, 10))
                run_task(segments, run, tasks[0])
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail_after_one_task()
        assert len(target) == 10
    assert records(store).items() <= expected.items()
    assert incoming(store) == []


def test_leftovers_of_a_dead_run_are_adopted(
    store: Path, photos: Path, encoder: ImageEncoder, expected: dict[str, bytes]
) -> None:
    layout, dead = StoreLayout.read(store), store / "incoming/run-dead"
    dead.mkdir()
    with SegmentEncoder(encoder, layout) as segments:
        tasks, _ = write_plan(dead, parts_of(photos, 6))
        sealed = [run_task(segments, dead, task).segments[0] for task in tasks[:3]]
    damaged = dead / sealed[1]
    content = bytearray(damaged.read_bytes())
    content[4100] ^= 1
    damaged.write_bytes(content)
    unsealed = SegmentWriter(dead / "task-000003.tokens", layout)
    unsealed.append(["half"], np.zeros((1, NUM_TOKENS, HIDDEN), np.float16))
    alive = SegmentWriter(store / "incoming/other.tokens", layout)
    stale = store / "incoming/.old.tokens.0123456789abcdef.partial"
    stale.touch()
    os.utime(stale, (0, 0))
    with TokenStore.open(store, mode="a") as target:
        assert adopt_leftovers(target) == 12
        assert adopt_leftovers(target) == 0
    assert not dead.exists()
    assert not stale.exists()
    unsealed.discard()
    alive.append(["other"], np.ones((1, NUM_TOKENS, HIDDEN), np.float16))
    assert alive.close() == store / "incoming/other.tokens"
    report = index_images(encoder, photos, store, workers=1)
    assert (report.already_present, report.indexed) == (12, 12)
    found = records(store)
    assert found.pop("other") == np.ones((NUM_TOKENS, HIDDEN), np.float16).tobytes()
    assert found == expected
    assert incoming(store) == []


def test_a_damaged_segment_of_somebody_else_is_named_and_stays(store: Path) -> None:
    (store / "incoming/theirs.tokens").write_bytes(b"nothing")
    with (
        TokenStore.open(store, mode="a") as target,
        pytest.raises(StoreError, match=r"theirs\.tokens"),
    ):
        adopt_leftovers(target)
    assert incoming(store) == ["theirs.tokens"]


def test_a_task_that_kills_its_workers_is_given_up(
    store: Path, photos: Path, encoder: ImageEncoder
) -> None:
    with TokenStore.open(store, mode="a") as target, open_run(target) as run:
        tasks, _ = write_plan(run, parts_of(photos, 20))
        (run / "tries-000001").write_bytes(b"." * MAX_TRIES)
        with SegmentEncoder(encoder, target.layout) as segments:
            fine, given_up = (run_task(segments, run, task) for task in tasks)
        assert fine.skipped == ()
        assert fine.segments
        assert given_up.segments == ()
        assert len(given_up.skipped) == NUM_IMAGES + 1 - 20
        assert {image.reason for image in given_up.skipped} == {
            "given up with its task: 4 workers died on it"
        }
        assert TaskResult.from_json(given_up.to_json()) == given_up
        commit_result(target, run, given_up)
        assert not (run / "tries-000001").exists()


NAMES = st.text(st.characters(codec=None), min_size=1).filter(lambda name: "\0" not in name)


@given(st.lists(st.tuples(NAMES, st.none() | st.integers(0, 1 << 50)), max_size=30), st.data())
def test_a_plan_brings_back_every_image(
    tmp_path_factory: pytest.TempPathFactory,
    images: list[tuple[str, int | None]],
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    files = [ImageFile(name, Path("/in") / "x.tar", "list", start, 7) for name, start in images]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(files)), max_size=4)))
    edges = [0, *cuts, len(files)]
    bad = SkippedImage("dir", "cannot be listed", "list")
    parts = [Group(files[start:stop], [bad]) for start, stop in pairwise(edges)]
    tasks, skipped = write_plan(folder, parts)
    assert skipped == [bad] * len(parts)
    assert [read_task(folder, task) for task in tasks] == [p.entries for p in parts if p.entries]
    assert [task.number for task in tasks] == list(range(len(tasks)))


def test_relative_paths_are_sent_whole(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    (task,), _ = write_plan(tmp_path, [Group([ImageFile("a", Path("000.png"))], [])])
    assert read_task(tmp_path, task) == [ImageFile("a", photos / "000.png")]


def test_members_of_a_compressed_tar_cannot_be_sent(tmp_path: Path) -> None:
    member = ImageFile("a.png", Path("x.tar.gz"), content=b"bytes")
    with pytest.raises(RequestError, match=r"x\.tar\.gz is a compressed tar[\s\S]*plain \.tar"):
        write_plan(tmp_path, [Group([member], [])])


def test_a_folder_that_is_not_shared_is_named_with_the_machine(
    tmp_path: Path, store: Path, photos: Path, encoder: ImageEncoder
) -> None:
    tasks, _ = write_plan(tmp_path, parts_of(photos, 20))
    with SegmentEncoder(encoder, StoreLayout.read(store)) as segments:
        with pytest.raises(StoreError, match=rf"{os.uname().nodename} cannot use .*No such file"):
            run_task(segments, tmp_path / "elsewhere", tasks[0])
        (tmp_path / "plan.jsonl").write_bytes(b"[")
        with pytest.raises(StoreError, match="ends early"):
            run_task(segments, tmp_path, tasks[0])


def test_another_encoder_is_refused_before_any_work(tmp_path: Path, store: Path) -> None:
    other = ImageEncoder.open(make_bundle(tmp_path / "b", fingerprint="tower-2"))
    with pytest.raises(StoreError, match=r"another image encoder[\s\S]*tower-1[\s\S]*tower-2"):
        SegmentEncoder(other, StoreLayout.read(store))


# What the documentation gives for Slurm, Spark and the like, but it waits for the test midway.
PROCESS = """
import sys
from itertools import islice
from pathlib import Path

from edje.runtime.indexing.cluster import SegmentEncoder
from edje.engines.image import ImageEncoder
from edje.runtime.indexing.sources import open_source
from edje.runtime.store import StoreLayout

def paused(entries):
    yield from islice(entries, 5)
    print("midway", flush=True)
    sys.stdin.readline()
    yield from entries

bundle, photos, store = map(Path, sys.argv[1:4])
part, num_parts = map(int, sys.argv[4:6])
mine = islice(open_source(photos).entries(lambda image_id: True), part, None, num_parts)
with SegmentEncoder(ImageEncoder.open(bundle), StoreLayout.read(store), batch_size=2) as segments:
    segments.write(paused(mine), store / "incoming", task=f"part-{part}")
"""


def test_plain_processes_one_killed_one_run_twice(
    store: Path, bundle: Path, photos: Path, encoder: ImageEncoder, expected: dict[str, bytes]
) -> None:
    def start(part: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", PROCESS, bundle, photos, store, str(part), "3"]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    workers = [start(part) for part in (0, 1, 2, 1)]
    assert [next(iter(worker.stdout or [])) for worker in workers] == [b"midway\n"] * 4
    assert len(incoming(store)) == 4
    workers[2].send_signal(signal.SIGKILL)
    for worker in workers:
        worker.communicate(b"go on\n")
    assert [worker.returncode for worker in workers] == [0, 0, -signal.SIGKILL, 0]
    (killed,) = (store / "incoming").glob(".part-2-*.partial")
    os.utime(killed, (0, 0))
    report = index_images(encoder, photos, store, workers=1)
    assert (report.already_present, report.indexed) == (16, 8)
    assert [image.id for image in report.skipped] == ["notes.txt"]
    assert records(store) == expected
    assert incoming(store) == []
