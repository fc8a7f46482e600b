"""`edje index --ray`: Ray Data spreads the tasks of a run over workers; this process commits."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...engines.image import DEVICES, ImageEncoder, read_manifest
from ...errors import EdjeError, EngineError, RequestError
from ..store import StoreLayout
from .cluster import (
    IndexTask,
    SegmentEncoder,
    TaskResult,
    commit_result,
    open_run,
    run_task,
    write_plan,
)
from .flow import DEFAULT_BATCH_SIZE, Run, groups
from .images import PillowSettings, import_pillow
from .index import IndexOptions, IndexReport, run_index
from .ray_connect import connect
from .sources import Paths, open_source

# Large enough that one fsync and one commit cost nothing, small enough to be lost and done again.
DEFAULT_IMAGES_PER_TASK = 2048
TASKS_IN_FLIGHT = 2  # one waits at its worker while another runs there, which then starts at once
MAX_INIT_DEATHS = 3  # in a row: a machine that is shut down may take a starting worker with it


@dataclass(frozen=True, slots=True)
class RayOptions:
    """Where and how the workers of a run work.

    Attributes:
        address: of the cluster: see `connect`.
        num_workers: workers at once; default: one a GPU if they use GPUs, else one a machine.
        images_per_task: images of a task, which is done again if its worker dies.
        device: `cpu`, `cuda`, or `auto`: CUDA where ONNX Runtime runs on it. Each worker takes a
            GPU, unless it is `cpu` or the cluster has none.
        decoders: decoder processes of each worker; default: its cores but one.
        batch_size: images a forward.
    """

    address: str | None = None
    num_workers: int | None = None
    images_per_task: int = DEFAULT_IMAGES_PER_TASK
    device: str = "auto"
    decoders: int | None = None
    batch_size: int = DEFAULT_BATCH_SIZE

    def check(self) -> None:
        """Refuse values that cannot be.

        Raises:
            RequestError: all of them named.
        """
        faults = [
            f"{name} is {number}, expected at least 1"
            for name, number in asdict(self).items()
            if isinstance(number, int) and number < 1
        ]
        if self.device not in DEVICES:
            faults.append(f"device is {self.device!r}, expected one of {', '.join(DEVICES)}")
        if faults:
            raise RequestError("these options cannot be", faults=faults)


@dataclass(frozen=True, slots=True)
class WorkerPool:
    """How many workers index at once, and what each of them takes of its machine."""

    num_workers: int
    num_cpus: int
    num_gpus: int


@dataclass(frozen=True, slots=True)
class WorkerJob:
    """All that a worker needs to know: folders that every machine sees, and options.

    Attributes:
        folder: of the run.
        decoders: decoder processes of a worker.
        settings: of Pillow in them: those of the process that leads the run.
    """

    model: Path
    folder: Path
    layout: StoreLayout
    device: str
    batch_size: int
    decoders: int
    settings: PillowSettings


class IndexWorker:
    """One Ray actor: opens the image encoder once, then turns tasks into segments."""

    def __init__(self, job: WorkerJob):
        self._job = job
        self._segments: SegmentEncoder | None = None

    def __call__(self, batch: Mapping[str, Sequence[int]]) -> dict[str, list[str]]:
        """Run the tasks of a batch, one a row; return a line of JSON and an error each."""
        columns = (batch["number"], batch["start"], batch["stop"])
        rows = [self._run(IndexTask(*map(int, row))) for row in zip(*columns, strict=True)]
        return {"result": [result for result, _ in rows], "error": [error for _, error in rows]}

    def _run(self, task: IndexTask) -> tuple[str, str]:
        """Return the result, or an error in its own words: Ray would wrap it in a stack."""
        try:
            if self._segments is None:
                job = self._job
                self._segments = SegmentEncoder(
                    ImageEncoder.open(job.model, device=job.device),
                    job.layout,
                    batch_size=job.batch_size,
                    workers=job.decoders,
                    settings=job.settings,
                )
            return run_task(self._segments, self._job.folder, task).to_json(), ""
        except EdjeError as error:
            return "", f"{socket.gethostname()}: {error}"


def index_on_ray(
    model: str | os.PathLike[str],
    images: Paths,
    store: str | os.PathLike[str],
    ray_options: RayOptions,
    options: IndexOptions,
) -> IndexReport:
    """Index images on the workers of a Ray cluster; else as `index_images`.

    Every worker seals segments in the store's `incoming/`; this process commits them as they come
    back, and needs no encoder. A worker that dies is replaced and its task done again. All
    machines must see `model`, `images` and `store` under the same paths, and have this package.

    Args:
        model: bundle or engine folder with an image encoder.
        images: as for `index_images`, but no compressed tars.
        store: folder of the store.
        ray_options: about the workers.
        options: about the run; `progress` is called after every task.

    Raises:
        RequestError: as `index_images`; options that cannot be, no Ray, a compressed tar.
        EngineError: no cluster at that address; a worker that cannot work, in its own words.
        StoreError: as `index_images`.
    """
    ray_options.check()
    import_pillow()
    settings = PillowSettings.of_this_process()
    source = open_source(images, leave_out=Path(store), follow_links=options.follow_links)
    manifest = read_manifest(Path(model))

    def work(run: Run) -> str:
        size = min(ray_options.images_per_task, run.store.layout.max_rows)
        with open_run(run.store) as folder:
            tasks, skipped = write_plan(folder, groups(source.entries(run.wants), size))
            run.add(0, skipped)
            names = set()
            job = WorkerJob(
                model=Path(model).resolve(),
                folder=folder.resolve(),
                layout=run.store.layout,
                device=ray_options.device,
                batch_size=ray_options.batch_size,
                decoders=ray_options.decoders or max(1, pool.num_cpus - 1),
                settings=settings,
            )
            for result in run_on_ray(ray, job, tasks, pool):
                run.add(commit_result(run.store, folder, result), result.skipped)
                names.add(result.encoder)
        return ", ".join(sorted(names - {""}))

    with connect(ray_options.address) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpu = ray_options.device != "cpu" and any(node.get("GPU") for node in nodes)
        pool = size_pool(nodes, ray_options.num_workers, gpu=gpu)
        return run_index(manifest, source, Path(store), options, work)


def run_on_ray(
    ray: Any, job: WorkerJob, tasks: Sequence[IndexTask], pool: WorkerPool
) -> Iterator[TaskResult]:
    """Yield the result of every task as it comes back; a worker that dies is replaced.

    Raises:
        EngineError: a worker cannot run a task, in its own words, or Ray itself failed.
    """
    if not tasks:
        return
    data = _quiet_ray_data()
    rows = data.from_items([asdict(task) for task in tasks], override_num_blocks=len(tasks))
    results = rows.map_batches(
        IndexWorker,
        fn_constructor_args=(job,),
        batch_size=1,
        batch_format="numpy",
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus or None,
        compute=data.ActorPoolStrategy(
            min_size=1,
            max_size=pool.num_workers,
            initial_size=pool.num_workers,
            max_tasks_in_flight_per_actor=TASKS_IN_FLIGHT,
        ),
    )
    try:
        for row in results.iter_rows():
            if row["error"]:
                raise EngineError(f"a worker gave up. {row['error']}")
            yield TaskResult.from_json(row["result"])
    except ray.exceptions.RayError as error:
        raise EngineError(
            f"indexing on Ray failed: {str(error).strip().splitlines()[-1]}",
            hint="what is committed stays: the same command continues",
        ) from error


def size_pool(
    nodes: Sequence[Mapping[str, float]], num_workers: int | None, *, gpu: bool
) -> WorkerPool:
    """Return the workers for a cluster: one a GPU, or one a machine, with all cores it can have.

    Args:
        nodes: what each machine of the cluster has: `CPU`, `GPU`.
        num_workers: share the cores among so many instead; more than fit wait for new machines.
        gpu: whether every worker needs a GPU.

    Raises:
        EngineError: no machine can run a worker.
    """
    unit = "GPU" if gpu else "CPU"
    usable = [node for node in nodes if node.get(unit, 0) >= 1 and node.get("CPU", 0) >= 1]
    if not usable:
        raise EngineError(
            f"no machine of the Ray cluster offers a {unit}", hint="`ray status` shows what it has"
        )
    if gpu:
        cpus = min(int(node["CPU"] // node["GPU"]) for node in usable)
        fits = sum(int(node["GPU"]) for node in usable)
        return WorkerPool(num_workers or fits, max(1, cpus), 1)
    cores = [int(node["CPU"]) for node in usable]
    if num_workers is None:
        return WorkerPool(sum(cpus // min(cores) for cpus in cores), min(cores), 0)
    shares = (n for n in range(max(cores), 0, -1) if sum(c // n for c in cores) >= num_workers)
    return WorkerPool(num_workers, next(shares, min(cores)), 0)


def _quiet_ray_data() -> Any:
    """Return the module `ray.data`, without its own progress bars and notes."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if hasattr(context, "max_consecutive_actor_init_deaths"):  # Ray 2.5x and newer
        context.max_consecutive_actor_init_deaths = MAX_INIT_DEATHS
    return ray.data
