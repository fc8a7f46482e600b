"""Where tokens are read from: what a caller wants, and what is decided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from ..arguments import Arguments, is_whole, shown
from ..engines.contract import Engine
from ..errors import EngineError, RequestError
from ..kernels.device.contract import Device
from .results import Residency
from .source import record_bytes
from .store import TokenStore
from .streams import Streams
from .text import TokenizedQueries

if TYPE_CHECKING:
    from .pool import PoolPlan

Place = Literal["disk", "host", "device", "auto"]


@dataclass(frozen=True, slots=True)
class ResidencyOptions:
    """Where a caller wants tokens to be kept.

    Attributes:
        place: where tokens shall be read from; None: as the store reads now.
        max_bytes: device memory that resident tokens may take; None: most of what is free.
        ids: the images to keep on the device (any iterable, taken once); None: all, or those
            asked for last.

    Raises:
        RequestError: what cannot be meant, all of it, when they are made.
    """

    place: Place | None = None
    max_bytes: int | None = None
    ids: Iterable[str] | None = None

    def __post_init__(self) -> None:
        """Take `ids`, and refuse what cannot be meant.

        Raises:
            RequestError: all faults at once.
        """
        given = Arguments("ResidencyOptions")
        places = get_args(Place)
        if self.place is not None and self.place not in places:
            given.faults.append(f"residency: got {shown(self.place)}, expected {', '.join(places)}")
        if self.max_bytes is not None and not is_whole(self.max_bytes):
            given.faults.append(f"max_bytes: got {shown(self.max_bytes)}, expected 1 or more")
        if self.place not in ("device", "auto"):
            values = {"max_bytes": self.max_bytes, "ids": self.ids}
            given.faults += [
                f'{name}: only where residency is "device" or "auto"'
                for name, value in values.items()
                if value is not None
            ]
        if self.ids is not None:
            object.__setattr__(self, "ids", tuple(given.strings("ids", self.ids)))
        if given.faults:
            raise RequestError("tokens cannot be kept so", faults=given.faults)


class Decision(NamedTuple):
    """Where tokens are read from; `plan` says what is held where that is the device."""

    residency: Residency
    plan: PoolPlan | None = None


def decide(
    options: ResidencyOptions,
    engine: Engine,
    store: TokenStore,
    device: Device,
    streams: Streams,
    *,
    queries: TokenizedQueries,
    num_slots: int,
) -> Decision:
    """Decide where the tokens of `store` are read from; `auto` measures. Changes nothing.

    Args:
        queries: one query to measure with.
        num_slots: slots of all pipelines that will share the device.

    Raises:
        RequestError: options that cannot be granted.
        EngineError, StoreError: measuring failed.
    """
    here = place_now(store)
    if options.place is None:
        return Decision(residency_of(store, here, "as the open store reads"))
    if options.place == "disk" and here == "host":
        raise RequestError(
            'residency is "disk", but the open store is held in memory',
            hint='open it with TokenStore.open(path, access="cached"), or give its path',
        )
    if options.place in ("disk", "host"):
        return Decision(residency_of(store, options.place, "as asked"))
    from .pool import plan_pool

    plan, no_pool = None, ""
    try:
        plan = plan_pool(
            engine,
            store,
            device,
            max_bytes=options.max_bytes,
            ids=options.ids,
            num_slots=num_slots,
        )
    except EngineError as error:  # no memory of its own
        if options.place == "device":
            raise
        no_pool = error.message
    if plan is not None and options.place == "device":
        return Decision(plan.residency("as asked"), plan)
    from .measure import Trial

    residency = Trial(engine, store, device, streams, queries, plan, no_pool).run()
    return Decision(residency, plan if residency.place == "device" else None)


def place_now(store: TokenStore) -> Literal["disk", "host"]:
    """Return where an open store reads from."""
    return "host" if store.access == "resident" else "disk"


def residency_of(
    store: TokenStore, place: str, reason: str, pairs_per_s: Mapping[str, float] | None = None
) -> Residency:
    """Return the residency of a store that is read from disk, or held in this machine's memory."""
    num_images = len(store) if place == "host" else 0
    num_bytes = num_images * record_bytes(store.record_shape, store.layout.dtype)
    return Residency(place, "all", num_images, num_bytes, reason, pairs_per_s or {})
