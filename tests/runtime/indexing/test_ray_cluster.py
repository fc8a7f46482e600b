"""`edje index --ray`: a real local Ray with two workers, one of them killed midway."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import toy_format
from edje.engines.image import ImageEncoder
from edje.errors import EngineError, RequestError
from edje.runtime.cli.app import main
from edje.runtime.indexing.flow import read_skipped
from edje.runtime.indexing.index import IndexOptions, index_images
from edje.runtime.indexing.ray import RayOptions, WorkerPool, index_on_ray, size_pool
from mean_bundle import make_bundle, records

NUM_IMAGES = 160
NO_OPTIONS = IndexOptions(None, None, None, None)
OBJECT_STORE_BYTES = 80 << 20  # the least that Ray takes is 75 MiB


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("ray") / "bundle")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 images of noise, and two files that are none."""
    folder = tmp_path_factory.mktemp("ray") / "photos"
    folder.mkdir()
    rng = np.random.default_rng(8)
    for number in range(NUM_IMAGES):
        noise = rng.integers(0, 256, (12, 9, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number:03d}.png")
    (folder / "cut.png").write_bytes((folder / "000.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A local Ray: two CPUs, little memory, no dashboard, nothing sent home."""
    ray = pytest.importorskip(
        "ray", reason="Ray is not installed: pip install 'edje-runtime[cluster]'"
    )
    pytest.importorskip("ray.data", reason="Ray Data is not installed: pip install 'ray[data]'")
    # pytest's own folders have names too long for Ray's sockets.
    with tempfile.TemporaryDirectory(prefix="ray") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", str(Path(toy_format.__file__).parent))  # a plugin's place
        ray.init(
            "local",
            num_cpus=2,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
        )
        try:
            yield ray
        finally:
            ray.shutdown()


def ray_workers() -> list[int]:
    """Process numbers of our actors: below this process, so nobody else's."""
    parents, actors = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rsplit(")")[-1].split()[1]
            )
            if b"IndexWorker" in (folder / "cmdline").read_bytes():
                actors.append(int(folder.name))
        except OSError:  # it has just ended
            continue
    return [pid for pid in actors if os.getpid() in ancestors(pid, parents)]


def kill_if_writing(pid: int) -> bool:
    """Kill a worker if it is in the middle of a segment."""
    os.kill(pid, signal.SIGSTOP)
    files = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    midway = any(file.endswith(".partial") for file in files)
    os.kill(pid, signal.SIGKILL if midway else signal.SIGCONT)
    return midway


def ancestors(pid: int, parents: dict[int, int]) -> Iterator[int]:
    while pid in parents:
        pid = parents[pid]
        yield pid


@pytest.mark.slow
def test_two_workers_one_killed_midway(
    ray: Any, bundle: Path, photos: Path, tmp_path: Path
) -> None:
    killed: list[int] = []
    calls: list[tuple[int, int]] = []

    def kill_one(done: int, total: int) -> None:
        calls.append((done, total))
        if done and not killed:
            killed.extend(islice(filter(kill_if_writing, ray_workers()), 1))

    options = RayOptions(num_workers=2, images_per_task=8, batch_size=1, device="cpu")
    report = index_on_ray(
        bundle, [str(photos)], tmp_path / "s", options, IndexOptions(None, None, kill_one, None)
    )
    assert len(killed) == 1
    assert (report.indexed, report.already_present, report.num_skipped) == (NUM_IMAGES, 0, 2)
    assert report.encoder == ImageEncoder.open(bundle).name
    assert calls[0] == (0, NUM_IMAGES + 2)
    assert calls[-1] == (NUM_IMAGES + 2, NUM_IMAGES + 2)
    index_images(ImageEncoder.open(bundle), photos, tmp_path / "alone", workers=1)
    assert records(tmp_path / "s") == records(tmp_path / "alone")
    skips = read_skipped(tmp_path / "s")
    assert sorted(skips) == sorted(read_skipped(tmp_path / "alone"))
    assert {image.id for image in skips} == {"cut.png", "notes.txt"}
    assert list((tmp_path / "s/incoming").iterdir()) == []


@pytest.mark.slow
def test_running_again_continues_and_needs_no_worker(
    ray: Any, bundle: Path, photos: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first.tsv"
    first.write_text("".join(f"{n:03d}.png\t{photos}/{n:03d}.png\n" for n in range(NUM_IMAGES)))
    index_images(ImageEncoder.open(bundle), first, tmp_path / "s", workers=1)
    options = RayOptions(num_workers=1, device="cpu")
    report = index_on_ray(bundle, photos, tmp_path / "s", options, NO_OPTIONS)
    assert (report.indexed, report.already_present, report.num_skipped) == (0, NUM_IMAGES, 2)
    report = index_on_ray(bundle, first, tmp_path / "s", options, NO_OPTIONS)
    assert (report.indexed, report.already_present, report.encoder) == (0, NUM_IMAGES, "")


@pytest.mark.slow
def test_a_worker_that_cannot_work_says_why_and_where(
    ray: Any, photos: Path, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "b")
    (bundle / "image_encoder.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=rf"{os.uname().nodename}: cannot open .*onnx"):
        index_on_ray(
            bundle,
            photos,
            tmp_path / "s",
            RayOptions(num_workers=2, device="cpu"),
            NO_OPTIONS,
        )
    assert list((tmp_path / "s/incoming").iterdir()) == []


@pytest.mark.slow
def test_what_the_caller_set_in_pillow_holds_in_rays_decoders(
    ray: Any, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    with (tmp_path / "photos/grey.toy").open("wb") as file:
        toy_format.write_toy(file, 77)
    Image.new("RGB", (12, 10)).save(tmp_path / "photos/large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    toy_format.register()
    try:
        options = RayOptions(num_workers=1, device="cpu")
        report = index_on_ray(bundle, tmp_path / "photos", tmp_path / "s", options, NO_OPTIONS)
    finally:
        toy_format.unregister()
    assert list(records(tmp_path / "s")) == ["grey.toy"]
    assert [(entry.id, "limit of 100" in entry.reason) for entry in report.skipped] == [
        ("large.png", True)
    ]


BIG, SMALL = {"CPU": 32.0, "memory": 1e9}, {"CPU": 8.0}


@pytest.mark.parametrize(
    ("nodes", "num_workers", "gpu", "expected"),
    [
        ([SMALL], None, False, WorkerPool(1, 8, 0)),
        ([BIG, SMALL, {"memory": 1.0}], None, False, WorkerPool(5, 8, 0)),
        ([{"CPU": 2.0}], 2, False, WorkerPool(2, 1, 0)),
        ([BIG, SMALL], 2, False, WorkerPool(2, 16, 0)),
        ([{"CPU": 2.0}], 5, False, WorkerPool(5, 2, 0)),
        ([{"CPU": 64.0, "GPU": 8.0}, SMALL], None, True, WorkerPool(8, 8, 1)),
        ([{"CPU": 4.0, "GPU": 8.0}], 3, True, WorkerPool(3, 1, 1)),
    ],
)
def test_workers_share_what_the_machines_have(
    nodes: list[dict[str, float]], num_workers: int | None, gpu: bool, expected: WorkerPool
) -> None:
    assert size_pool(nodes, num_workers, gpu=gpu) == expected


def test_a_cluster_that_can_run_no_worker_is_refused() -> None:
    with pytest.raises(EngineError, match="offers a GPU"):
        size_pool([SMALL], None, gpu=True)
    with pytest.raises(EngineError, match="offers a CPU"):
        size_pool([], None, gpu=False)


def test_all_options_that_cannot_be_are_named() -> None:
    options = RayOptions(num_workers=0, images_per_task=0, decoders=0, batch_size=0, device="tpu")
    with pytest.raises(RequestError) as caught:
        options.check()
    assert len(caught.value.faults) == 5
    assert "num_workers is 0, expected at least 1" in caught.value.faults
    RayOptions().check()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--ray"], RayOptions()),
        (["--ray="], RayOptions()),
        (["--ray", "--num-workers", "3"], RayOptions(num_workers=3)),
        (["--ray", "head:6379"], RayOptions("head:6379")),
        (["--ray", "[::1]:6379"], RayOptions("[::1]:6379")),
        (["--ray=local", "--images-per-task", "9"], RayOptions("local", images_per_task=9)),
        (["--ray", "auto", "--device", "cuda"], RayOptions("auto", device="cuda")),
        (["--workers", "2", "--batch-size", "4", "--ray"], RayOptions(decoders=2, batch_size=4)),
    ],
)
@pytest.mark.parametrize("ray_first", [True, False])
def test_the_address_may_be_left_out(
    given: list[str], expected: RayOptions, ray_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def note(*args: Any) -> None:
        calls.append(args)
        raise RequestError("enough")

    monkeypatch.setattr("edje.runtime.indexing.ray.index_on_ray", note)
    rest = ["bundle", "photos", "--store", "s"]
    assert main(["index", *given, *rest] if ray_first else ["index", *rest, *given]) == 2
    ((model, images, store, options, run),) = calls
    assert (model, images, store) == (Path("bundle"), ["photos"], Path("s"))
    assert options == expected
    assert (run.dtype, run.only) == (None, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["photos", "--num-workers", "2"], "--num-workers: it goes with --ray"),
        (["photos", "--images-per-task", "2"], "--images-per-task: it goes with --ray"),
        (["--features", "f.npy", "--ray"], "--ray spreads images, not --features"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", "bundle", "--store", "s", *given]) == 2
    assert message in capsys.readouterr().err
