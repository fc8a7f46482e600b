"""The streams that batches go through, each batch's work kept together, and whether they still run.

On a GPU three streams overlap: batch n+1 is copied in while batch n computes and the scores of
n-1 are copied back. Where host and device share memory, one stream does it all.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from ..errors import EdjeError, EngineError
from ..kernels.device.contract import Device, Stream
from ..kernels.device.host import HostStream
from .slot import Slot

_FAILED = {
    "gather": "a batch could not be gathered",
    "copy": "a batch could not be copied to the device",
    "compute": "the engine failed on a batch",
    "collect": "a batch's scores could not be copied back",
}


class Streams:
    """Take the batches of any number of threads, one batch's work at a time.

    Attributes:
        exclusive: whether nobody else submits to the stream that computes.
    """

    def __init__(self, device: Device, *, borrowed: object | None = None, exclusive: bool = False):
        """Make the streams; the device stays the caller's.

        Args:
            borrowed: the caller's own stream to compute on (see `Device.borrow`).
            exclusive: nobody else submits to that stream while a request runs, so that graphs may
                be captured on it as well.
        """
        self._device = device
        self._process = os.getpid()
        self._lost: str | None = None
        self._turn = threading.Lock()  # keeps one batch's work together in the streams
        self._overlapped = not device.shares_memory
        self.exclusive = exclusive or borrowed is None
        with device.current():
            self._compute = device.stream() if borrowed is None else device.borrow(borrowed)
            self._copy: Stream = device.stream() if self._overlapped else self._compute
            self._result: Stream = device.stream() if self._overlapped else self._compute

    def check(self) -> None:
        """Refuse work that can no longer run.

        Raises:
            EngineError: the device is lost, or this is a forked child of the process that opened
                it.
        """
        if self._lost is not None:
            raise self._lost_error(self._lost)
        if os.getpid() != self._process:
            raise EngineError(
                f"opened in process {self._process}, this is its forked child {os.getpid()}",
                hint="open it again in this one, or start processes with `spawn`",
            )

    def enqueue(self, slot: Slot, forward: Callable[..., None], *, alone: bool = False) -> None:
        """Enqueue one filled slot's way through the device; returns at once.

        The slot may be touched again once `slot.finished` was passed, after an error as well.

        Args:
            forward: `Engine.enqueue`, or what stands in for it.
            alone: the caller has no other batch on its way and would wait for this one: on a CPU it
                runs on the calling thread then, which spares two changes of thread.

        Raises:
            EngineError: the engine refuses the batch, or the device is lost.
        """
        if self._overlapped:
            self._enqueue_with_copies(slot, forward)
            return
        if alone and isinstance(self._compute, HostStream):
            self._compute.run_here(lambda stream: _forward(slot, forward, stream))
            return
        with self._turn:
            _forward(slot, forward, self._compute)

    def load(self, slot: Slot) -> None:
        """Bring the records that a pooled slot read into the pool, and score nothing.

        Else as `enqueue`.
        """
        with self._taking_turn(slot):
            slot.stage = "copy"
            self._copy.record(slot.started)
            slot.upload_tokens(self._copy)
            self._copy.record(slot.uploaded)
            self._compute.wait(slot.uploaded)
            slot.assemble(self._compute)
            self._compute.record(slot.computed)
            self._result.wait(slot.computed)
            self._result.record(slot.finished)

    def fail(self, error: Exception, slot: Slot) -> NoReturn:
        """Raise `error` as callers get it, with the stage that `slot` was in; notice a loss.

        Raises:
            EngineError: what failed, or that the device is lost.
            EdjeError: `error` itself where it is one.
        """
        lost = self._device.fault()
        if lost is not None:
            self._lost = self._lost or lost
            raise self._lost_error(lost) from error
        if isinstance(error, EdjeError):
            error.stage = slot.stage
            raise error
        failure = EngineError(f"{_FAILED[slot.stage]}: {error}")
        failure.stage = slot.stage
        raise failure from error

    def collect(self, slot: Slot) -> None:
        """Wait until the slot's scores lie on the host; any thread may call.

        Raises:
            Exception: what failed on the way; `slot.stage` then says where.
        """
        if self._overlapped:
            slot.stage = "copy"
            slot.uploaded.synchronize()
            slot.stage = "compute"
            slot.computed.synchronize()
            slot.stage = "collect"
        slot.finished.synchronize()

    def _enqueue_with_copies(self, slot: Slot, forward: Callable[..., None]) -> None:
        """As `enqueue` where the device has memory of its own: three streams, tied by events."""
        with self._taking_turn(slot):
            slot.stage = "copy"
            self._copy.record(slot.started)
            slot.upload(self._copy)
            self._copy.record(slot.uploaded)
            self._compute.wait(slot.uploaded)
            self._compute.record(slot.began)
            slot.stage = "compute"
            slot.assemble(self._compute)
            forward(slot.batch, slot.batch_scores, stream=self._compute)
            self._compute.record(slot.computed)
            slot.stage = "collect"
            self._result.wait(slot.computed)
            slot.download(self._result)
            self._result.record(slot.finished)

    @contextmanager
    def _taking_turn(self, slot: Slot) -> Iterator[None]:
        """Keep a slot's work together; whatever fails, `finished` follows all of it."""
        with self._turn:
            try:
                yield
            except BaseException:
                with suppress(Exception):
                    self._record_ends(slot)
                raise

    def _record_ends(self, slot: Slot) -> None:
        """Let `finished` follow whatever of the slot's work is in any stream."""
        self._copy.record(slot.uploaded)
        self._result.wait(slot.uploaded)
        self._compute.record(slot.computed)
        self._result.wait(slot.computed)
        self._result.record(slot.finished)

    def _lost_error(self, reason: str) -> EngineError:
        return EngineError(
            f"{self._device.name} is lost, it takes no more work: {reason}",
            hint="restart the process: nothing in it can use this device again",
        )


def _forward(slot: Slot, forward: Callable[..., None], stream: Stream) -> None:
    """Run one batch where nothing is copied; `finished` follows it, whatever fails."""
    try:
        slot.stage = "compute"
        stream.record(slot.began)
        forward(slot.batch, slot.batch_scores, stream=stream)
    finally:
        stream.record(slot.finished)
