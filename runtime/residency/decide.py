"""From what a caller wishes to where tokens are read from."""

from __future__ import annotations

from typing import NamedTuple

from ...engines.contract import Engine
from ...errors import EngineError, RequestError
from ..device.protocol import Device
from ..lane import Lane
from ..pipeline import NUM_SLOTS
from ..results import Residency
from ..store import TokenStore
from ..text import TokenizedQueries
from .measure import Trial, place_of
from .plan import PoolPlan, ResidencyOptions, plan_pool
from .token_pool import pool_capability, record_bytes


class Decision(NamedTuple):
    """Where tokens are read from; `plan` says what is held where that is the device."""

    residency: Residency
    plan: PoolPlan | None = None


def decide(
    wish: ResidencyOptions,
    engine: Engine,
    store: TokenStore,
    device: Device,
    lane: Lane,
    *,
    queries: TokenizedQueries,
    num_pipelines: int,
    may_load: bool,
) -> Decision:
    """Decide where the tokens of `store` are read from; `auto` measures.

    Args:
        queries: one query to measure with.
        num_pipelines: how many will share the device.
        may_load: whether the store may be opened again with its records in memory: the decision
            is then `host` although this store is not.

    Raises:
        RequestError: a wish that cannot be granted.
        EngineError, StoreError: measuring failed.
    """
    here = "host" if store.access == "resident" else "disk"
    if wish.place is None or wish.place == here:
        why = "the store was opened so" if wish.place is None else "as asked"
        return Decision(place_of(store, here, why, {}))
    if wish.place == "host" and may_load:
        return Decision(place_of(store, "host", "as asked", {}))
    if wish.place in ("disk", "host"):
        access = "resident" if wish.place == "host" else "cached"
        raise RequestError(
            f'residency is "{wish.place}", but the open store reads from {here}',
            hint=f'open it with TokenStore.open(path, access="{access}"), or give its path',
        )
    plan, no_pool = None, ""
    try:
        plan = _plan(wish, engine, store, device, num_pipelines)
    except EngineError as error:  # no memory of its own
        if wish.place == "device":
            raise
        no_pool = error.message
    if plan is not None and wish.place == "device":
        return Decision(plan.residency("as asked"), plan)
    residency = Trial(engine, store, device, lane, queries, plan, no_pool, may_load).run()
    return Decision(residency, plan if residency.place == "device" else None)


def _plan(
    wish: ResidencyOptions, engine: Engine, store: TokenStore, device: Device, num_pipelines: int
) -> PoolPlan:
    """Plan the pool beside what the slots will take: fresh records, and the engine's input."""
    pool_capability(device)
    manifest = engine.manifest
    sizes = manifest.bundle.sizes
    shape, dtype = (sizes.num_tokens, sizes.hidden), manifest.token_dtype
    of_a_slot = 2 * manifest.profile.max_pairs * record_bytes(shape, dtype)
    spare = num_pipelines * NUM_SLOTS * of_a_slot
    return plan_pool(store, wish, device, shape=shape, dtype=dtype, spare=spare)
