"""What a native engine makes for a stream: all of it or nothing, and graphs where it can."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edje.bundle import BundleManifest
from edje.engines.contract import Batch
from edje.errors import EngineError
from native_engine import HostScorer, native_engine, random_batch
from recording_device import RecordingDevice


@pytest.fixture
def device(interpreted: Any) -> Iterator[RecordingDevice]:
    device = RecordingDevice(None, kernels=interpreted)
    with device.current():
        yield device


@pytest.fixture
def batch(tiny_bundle: Path) -> Batch:
    return random_batch(BundleManifest.read(tiny_bundle), 15, 2, 0)


def scorer_on(device: RecordingDevice, folder: Path) -> HostScorer:
    return HostScorer(native_engine(folder, device, max_pairs=2, text_buckets=(15,)), device)


def memory_taken(score: HostScorer, batch: Batch) -> int:
    """Return the device memory that a first batch takes, without the batch's own arrays."""
    before = score.device.usage().device_bytes
    try:
        score(batch)
    finally:
        arrays = (batch.text_ids, batch.text_length, batch.query_of_pair, batch.visual_tokens)
        own = sum(array.nbytes for array in arrays) + 4 * len(batch)
        taken = score.device.usage().device_bytes - before - own
    return taken


def test_it_says_what_memory_a_stream_will_take(
    native_folder: Any, device: RecordingDevice, batch: Batch
) -> None:
    score = scorer_on(device, native_folder())
    taken = memory_taken(score, batch)
    assert 0.95 * taken < score.engine.bytes_a_stream <= taken


def test_a_set_up_that_fails_leaves_nothing_and_the_next_one_works(
    native_folder: Any, device: RecordingDevice, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = scorer_on(device, native_folder())(batch)
    score, before = scorer_on(device, native_folder()), device.usage().device_bytes
    failing = score.engine.bytes_a_stream

    def no_stream() -> None:
        raise EngineError("no stream is left")

    monkeypatch.setattr(device, "stream", no_stream)  # asked for after the activations are there
    for _ in range(2):
        with pytest.raises(EngineError, match="no stream is left"):
            score(batch)
    assert device.usage().device_bytes - before < failing
    monkeypatch.undo()
    assert score(batch).tobytes() == expected.tobytes()


def test_what_cannot_be_captured_runs_without_a_graph_and_it_is_said(
    native_folder: Any, device: RecordingDevice, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = scorer_on(device, native_folder())(batch)
    assert device.num_graph_launches == 1

    def broken(work: object, stream: object) -> None:
        raise EngineError("somebody waited for the whole device")

    monkeypatch.setattr(device, "capture", broken)
    score = scorer_on(device, native_folder())
    assert score(batch).tobytes() == expected.tobytes()
    assert device.num_graph_launches == 1
    told = str(score.engine.why_not_capture(score.stream, 15))
    assert told.endswith("but 2 sizes could not be captured and run without")
