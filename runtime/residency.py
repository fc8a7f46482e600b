"""Which images a pool on the device is for, and how much memory it gets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ..arguments import Arguments, is_whole, plain, shown
from ..arrays import Int64
from ..errors import RequestError
from ..kernels.device.contract import Device
from .pool import TokenPool, record_bytes
from .results import Residency
from .store import TokenStore

Place = Literal["disk", "host", "device", "auto"]
Policy = Literal["all", "listed", "recent"]

# The rest is for what engines allocate when they first meet a text bucket.
SHARE_OF_FREE_BYTES = 0.8

_POLICIES = {
    "all": "every image",
    "listed": "the images of the given list",
    "recent": "the images asked for last, as many as fit",
}


@dataclass(frozen=True, slots=True)
class ResidencyOptions:
    """Where a caller wants tokens to be kept.

    Attributes:
        place: where tokens shall be read from; None: wherever the store was opened to read from.
        max_bytes: device memory that resident tokens may take; None: most of what is free.
        ids: the images to keep on the device (any iterable, taken once); None: all, or those
            asked for last.
    """

    place: Place | None = None
    max_bytes: int | None = None
    ids: Iterable[str] | None = None

    def __post_init__(self) -> None:
        if self.ids is None:
            return
        given = Arguments("ResidencyOptions")
        ids = plain(given.items("ids", self.ids, "a list of ids"))
        if not given.faults:  # else it stays as it is, for `faults` to name
            object.__setattr__(self, "ids", tuple(ids))

    def faults(self) -> list[str]:
        """Return one sentence for everything that cannot be meant."""
        given = Arguments("ResidencyOptions")
        places = get_args(Place)
        if self.place is not None and self.place not in places:
            given.faults.append(f"residency: got {shown(self.place)}, expected {', '.join(places)}")
        if self.max_bytes is not None and not is_whole(self.max_bytes):
            given.faults.append(f"max_bytes: got {shown(self.max_bytes)}, expected 1 or more")
        if self.ids is not None:
            given.strings("ids", self.ids)
        if self.place not in ("device", "auto"):
            values = {"max_bytes": self.max_bytes, "ids": self.ids}
            given.faults += [
                f'{name}: only where residency is "device" or "auto"'
                for name, value in values.items()
                if value is not None
            ]
        return given.faults

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            RequestError: all faults at once.
        """
        faults = self.faults()
        if faults:
            raise RequestError("tokens cannot be kept so", faults=faults)


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """What a pool is for.

    Attributes:
        policy: `all` or `listed` (loaded ahead, nothing else comes in), or `recent`.
        capacity: records there is room for.
        ahead: int64: rows to load before the first request.
        num_images: images of the store.
        shape, dtype: (m, H) of a record, as the engine reads it.
    """

    policy: Policy
    capacity: int
    ahead: Int64
    num_images: int
    shape: tuple[int, int]
    dtype: str

    def residency(self, reason: str) -> Residency:
        """Say it to the caller."""
        num_bytes = self.capacity * record_bytes(self.shape, self.dtype)
        says = f"{reason}; {_POLICIES[self.policy]}"
        return Residency("device", self.policy, self.capacity, num_bytes, says, {})


def plan_pool(
    store: TokenStore,
    wish: ResidencyOptions,
    device: Device,
    *,
    shape: tuple[int, int],
    dtype: str,
    spare: int,
) -> PoolPlan:
    """Decide what a pool on `device` holds of `store`.

    Args:
        shape: (m, H) of a record.
        dtype: of the tokens as the engine reads them.
        spare: bytes of the device that will be needed for something else.

    Raises:
        RequestError: no room for one record, or not for all that the caller listed; or ids that
            the store does not hold.
    """
    each = record_bytes(shape, dtype)
    limit = wish.max_bytes
    if limit is None:
        limit = int((device.free_bytes() - spare) * SHARE_OF_FREE_BYTES)
    most, rows = max(0, limit) // each, store.live_rows()
    listed = None if wish.ids is None else np.unique(store.rows(wish.ids))
    least = 1 if listed is None else len(listed)
    if most < least:
        raise RequestError(
            f"{least} images of {each:,} bytes need {least * each:,} bytes on {device.name}, "
            f"expected at most {limit:,}",
            hint="give more max_bytes, list fewer ids, or build the engine with "
            "--tokens int8 for half the bytes",
        )
    if listed is not None:
        return PoolPlan("listed", len(listed), listed, len(rows), shape, dtype)
    if len(rows) <= most:
        return PoolPlan("all", len(rows), rows, len(rows), shape, dtype)
    return PoolPlan("recent", most, rows[:0], len(rows), shape, dtype)


def make_pool(
    store: TokenStore, plan: PoolPlan, device: Device, *, checks_finite: bool
) -> TokenPool:
    """Allocate the pool of a plan; see `TokenPool`.

    Raises:
        EngineError: the device runs no kernels, or has not so much memory.
    """
    return TokenPool(
        device,
        store.live_rows(),
        plan.capacity,
        shape=plan.shape,
        dtype=plan.dtype,
        checks_finite=checks_finite,
    )
