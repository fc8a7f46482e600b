"""Indexing by many processes: each seals segments of its own, one committer adds them.

A run owns a folder `run-…` in the store's `incoming/`, which all machines share:

- `plan.jsonl`: one image a line. A task is a range of its bytes, so it costs nothing to send.
- `task-NNNNNN-….tokens`: a sealed segment of one attempt at one task.
- `tries-NNNNNN`: one byte for every attempt at a task that has not come back yet.

Attempts may die, be repeated or run twice at once: whatever they seal, the store takes every id
once. Nothing but sealed segments outlives the process that leads the run.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ...arguments import StrPath
from ...engines.image import ImageEncoder
from ...errors import RequestError, StoreError
from ...files import Closing
from ..store import SegmentWriter, StoreLayout, TokenStore, incoming_name
from ..store.format import INCOMING
from .decoders import DecoderPool
from .flow import (
    DEFAULT_BATCH_SIZE,
    NUM_AHEAD,
    Group,
    decoded_batches,
    encode_batch,
    groups,
    read_ahead,
)
from .images import PillowSettings
from .sources import ImageFile, SkippedImage, name_of, place_of

PLAN = "plan.jsonl"
RUN_PREFIX = "run-"
SEGMENTS = "*.tokens"
UNSEALED = ".*.tokens.*.partial"
STALE_S = 86_400

# A task whose worker died so often is given up: an image that kills workers must not kill them all.
MAX_TRIES = 4


@dataclass(frozen=True, slots=True)
class IndexTask:
    """A part of a run's plan: the images in bytes `start` to `stop` of its file."""

    number: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What an attempt at a task sends back.

    Attributes:
        task: its number.
        segments: names of the sealed segments in the run's folder.
        encoder: the library that ran the image encoder; empty if none did.
    """

    task: int
    segments: tuple[str, ...]
    skipped: tuple[SkippedImage, ...]
    encoder: str

    def to_json(self) -> str:
        """Return the result as one line of JSON."""
        return json.dumps([self.task, self.segments, self.skipped, self.encoder])

    @classmethod
    def from_json(cls, line: str) -> TaskResult:
        """Return the result that `to_json` wrote."""
        task, segments, skipped, encoder = json.loads(line)
        skips = tuple(SkippedImage(*image) for image in skipped)
        return cls(task, tuple(segments), skips, encoder)


class SegmentEncoder(Closing):
    """Images -> sealed segments, with an image encoder and decoder processes that stay open.

    All that a process needs which has images but no access to the catalog: a Slurm task, a Spark
    partition, a Ray actor. Use it as a context manager.

    Attributes:
        encoder: makes the tokens.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        layout: StoreLayout,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        workers: int = 1,
        settings: PillowSettings | None = None,
    ):
        """Get ready to write segments.

        Args:
            encoder: of the store's fingerprint.
            layout: of the store (`StoreLayout.read`).
            batch_size: images a forward.
            workers: decoder processes.
            settings: of Pillow in them; default: those of this process.

        Raises:
            StoreError: the store was made by another encoder.
            RequestError: fewer than one worker or image a forward.
        """
        if layout.fingerprint_encoder != encoder.manifest.fingerprint_encoder:
            raise StoreError(
                "the segments would not fit the store: it was made by another image encoder",
                faults=[
                    f"store: {layout.fingerprint_encoder}",
                    f"this encoder: {encoder.manifest.fingerprint_encoder}",
                ],
                hint="index into a new store: tokens of two encoders do not compare",
            )
        if batch_size < 1:
            raise RequestError(f"batch_size is {batch_size}, expected at least 1")
        self.encoder = encoder
        self._layout = layout
        self._batch_size = batch_size
        self._pool = DecoderPool(encoder.image, workers, settings=settings)

    def write(
        self, entries: Iterable[ImageFile | SkippedImage], folder: StrPath, *, task: str
    ) -> tuple[list[Path], list[SkippedImage]]:
        """Index `entries` into segments in `folder`; return their paths, and what was skipped.

        Args:
            entries: as a source yields them, each id once.
            folder: `incoming/` of the store, or a folder of its file system.
            task: begins the names of the segments; no two attempts share a file.

        Raises:
            StoreError: a segment cannot be written; those sealed before stay.
            EngineError: the encoder does not give what its manifest says.
        """
        segments: list[Path] = []
        skipped: list[SkippedImage] = []
        size = min(self._batch_size, self._layout.max_rows)
        decoded = decoded_batches(self._pool, groups(entries, size))
        with closing(read_ahead(decoded, NUM_AHEAD)) as batches:
            num_batches = most = self._layout.max_rows // size
            while num_batches == most:
                num_batches = 0
                with SegmentWriter(Path(folder) / incoming_name(task), self._layout) as writer:
                    for batch in islice(batches, most):
                        num_batches += 1
                        ids, tokens, bad = encode_batch(self.encoder.encode_rgb, batch)
                        skipped += bad
                        if tokens is not None and ids:
                            writer.append(ids, tokens)
                    path = writer.close()
                segments += [path] if path else []
        return segments, skipped

    def close(self) -> None:
        """End the decoder processes."""
        self._pool.close()


@contextmanager
def open_run(store: TokenStore) -> Iterator[Path]:
    """Yield the folder of a new run of `store`, which is open for appending; remove it at the end.

    However the block ends, what its workers sealed is committed before the folder goes.
    """
    folder = store.path / INCOMING / f"{RUN_PREFIX}{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        adopt_leftovers(store)


def adopt_leftovers(store: TokenStore) -> int:
    """Commit the segments that wait in `incoming/`, remove what dead runs left; count the records.

    A store has one writer, and the caller is it: a run folder found here has lost its leader, so
    an attempt that is still being written there leads nowhere. An unsealed file outside run folders
    may belong to a process that is alive: it goes when nothing was written to it for a day.

    Raises:
        StoreError: a segment outside run folders cannot be committed (the file stays).
    """
    incoming = store.path / INCOMING
    added = 0
    for folder in sorted(incoming.glob(f"{RUN_PREFIX}*/")):
        for segment in sorted(folder.glob(SEGMENTS)):
            with suppress(StoreError):  # its images are not in the store, so they come again
                added += store.commit_segments([segment]).num_added
        shutil.rmtree(folder, ignore_errors=True)  # a worker that is alive may still write there
    for unsealed in incoming.glob(UNSEALED):
        with suppress(FileNotFoundError):  # it may be sealed at this moment
            if time.time() - unsealed.stat().st_mtime > STALE_S:
                unsealed.unlink()
    waiting = sorted(incoming.glob(SEGMENTS))
    return added + store.commit_segments(waiting).num_added if waiting else added


def write_plan(
    folder: Path, parts: Iterable[Group[ImageFile]]
) -> tuple[list[IndexTask], list[SkippedImage]]:
    """Write the plan of a run into its folder; return a task for every part, and what is none.

    Raises:
        RequestError: members of a compressed tar.
    """
    tasks: list[IndexTask] = []
    skipped: list[SkippedImage] = []
    with (folder / PLAN).open("wb") as plan:
        for part in parts:
            skipped += part.skipped
            start = plan.tell()
            plan.writelines(_line(image) for image in part.entries)
            if part.entries:
                tasks.append(IndexTask(len(tasks), start, plan.tell()))
        plan.flush()
        os.fsync(plan.fileno())
    return tasks, skipped


def read_task(folder: Path, task: IndexTask) -> list[ImageFile]:
    """Return the images of a task, on any machine that sees the run's folder.

    Raises:
        StoreError: the folder, or all of the task's plan, is not to be seen from here.
    """
    try:
        with (folder / PLAN).open("rb") as plan:
            plan.seek(task.start)
            content = plan.read(task.stop - task.start)
    except OSError as error:
        raise _not_shared(folder, error.strerror or str(error)) from error
    if len(content) < task.stop - task.start:
        raise _not_shared(folder, f"{PLAN} ends early")
    lines = map(json.loads, content.splitlines())
    return [ImageFile(name, Path(name_of(path)), *rest) for name, path, *rest in lines]


def run_task(segments: SegmentEncoder, folder: Path, task: IndexTask) -> TaskResult:
    """Index the images of a task into sealed segments of its own in the run's folder.

    Raises:
        StoreError: the run's folder is not shared with this machine, or cannot be written.
        EngineError: the encoder does not give what its manifest says.
    """
    images = read_task(folder, task)
    tries = _note_try(folder, task.number)
    if tries > MAX_TRIES:
        reason = f"given up with its task: {tries - 1} workers died on it"
        given_up = tuple(SkippedImage(image.id, reason, image.source) for image in images)
        return TaskResult(task.number, (), given_up, "")
    paths, skipped = segments.write(images, folder, task=f"task-{task.number:06d}")
    names = tuple(path.name for path in paths)
    return TaskResult(task.number, names, tuple(skipped), segments.encoder.name)


def commit_result(store: TokenStore, folder: Path, result: TaskResult) -> int:
    """Add what a task that came back has sealed; return how many records are new.

    Raises:
        StoreError: a segment is damaged or of another layout.
    """
    _tries(folder, result.task).unlink(missing_ok=True)
    return store.commit_segments([folder / name for name in result.segments]).num_added


def _note_try(folder: Path, number: int) -> int:
    """Count this attempt at a task; return how many there were, it included."""
    try:
        with _tries(folder, number).open("ab") as file:
            file.write(b".")
            return file.tell()
    except OSError as error:
        raise _not_shared(folder, error.strerror or str(error)) from error


def _tries(folder: Path, number: int) -> Path:
    return folder / f"tries-{number:06d}"


def _line(image: ImageFile) -> bytes:
    if image.content is not None:
        raise RequestError(
            f"{image.path} is a compressed tar, which only its reader can go through",
            hint="unpack it to a plain .tar: workers read its members by their place",
        )
    path = place_of(image.path)  # the worker's locale may be another
    # JSON's \u escapes carry names that are no UTF-8 as well.
    return json.dumps([image.id, path, image.source, image.start, image.num_bytes]).encode() + b"\n"


def _not_shared(folder: Path, why: str) -> StoreError:
    return StoreError(
        f"{socket.gethostname()} cannot use the run's folder {folder}: {why}",
        hint="all machines must share the store's folder, under one path, and may write it",
    )
