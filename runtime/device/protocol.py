"""The dozen calls that the pipeline makes of a device. `host` implements them on CPU threads.

Order is explicit: work on one stream runs in the order it was submitted, an event marks a place
in that order, and nothing else orders anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class PinnedBuffer(Protocol):
    """Host memory that the device can reach without a further copy; owned by its device."""

    def view(self, shape: tuple[int, ...]) -> Array:
        """Return the first elements as a C-contiguous host array of `shape`; no copy."""
        ...


class DeviceBuffer(Protocol):
    """Memory where engines run; owned by its device."""

    def view(self, shape: tuple[int, ...]) -> Array:
        """Return the first elements as an array of `shape` that engines of this device take."""
        ...


class Event(Protocol):
    """A place in a stream's order. It may be recorded again once it was waited for."""

    def synchronize(self) -> None:
        """Block until the stream has passed the place.

        Raises:
            Exception: what work before it on its stream raised since the last recorded event.
        """
        ...

    def elapsed_ms(self, since: Event) -> float:
        """Return the milliseconds from `since` to this event, both passed."""
        ...


class Stream(Protocol):
    """Work in order. A superset of what `engines.contract.Stream` asks for."""

    @property
    def handle(self) -> int: ...

    def submit(self, work: Callable[[], None]) -> None:
        """Run host `work` in the stream's order; returns at once."""
        ...

    def upload(self, target: DeviceBuffer, source: PinnedBuffer, num_elements: int) -> None:
        """Copy the first elements of `source` to the device, in the stream's order."""
        ...

    def download(self, target: PinnedBuffer, source: DeviceBuffer, num_elements: int) -> None:
        """Copy the first elements of `source` to the host, in the stream's order."""
        ...

    def record(self, event: Event) -> None:
        """Mark this place of the stream with `event`."""
        ...

    def wait(self, event: Event) -> None:
        """Let later work wait for `event`, and fail if it failed; returns at once."""
        ...


class Graph(Protocol):
    """Captured work, ready to run again on the same buffers."""

    def launch(self, stream: Stream) -> None:
        """Run the captured work in the order of `stream`; returns at once."""
        ...


class Device(Protocol):
    """Where engines run. Allocation happens at set-up only, never while requests run."""

    @property
    def name(self) -> str: ...

    def pinned(self, num_elements: int, dtype: np.dtype[Any]) -> PinnedBuffer: ...

    def mirror(self, pinned: PinnedBuffer) -> DeviceBuffer:
        """Return device memory of the same size; the same memory where host and device share."""
        ...

    def stream(self) -> Stream: ...

    def event(self) -> Event: ...

    def capture(self, work: Callable[[Stream], None]) -> Graph:
        """Record what `work` submits to the stream it is given, without running it."""
        ...

    def close(self) -> None:
        """Finish the streams and free the memory. Calling it twice is allowed."""
        ...
