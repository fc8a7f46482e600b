"""The pipelines of one or two engines over one store and one lane, and what they read from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..engines.contract import Engine
from .device.protocol import Device
from .lane import Lane
from .pipeline import Pipeline, hides_nan
from .residency.decide import decide
from .residency.plan import Wish, make_pool
from .results import Residency
from .store import TokenStore
from .text import QueryTokenizer
from .token_source import tokens_for


class OpenedPipelines(NamedTuple):
    """One pipeline an engine, and what they read from: `store` may be another than was given."""

    store: TokenStore
    pipelines: list[Pipeline]
    residency: Residency


def open_pipelines(
    engines: Sequence[Engine],
    store: TokenStore,
    device: Device,
    lane: Lane,
    tokenizer: QueryTokenizer,
    wish: Wish,
    reopen: Callable[[], TokenStore] | None,
) -> OpenedPipelines:
    """Decide where tokens are read from, load what is to be held, make the pipelines.

    Args:
        engines: of one model, all reading tokens of one dtype.
        reopen: opens the store again with its records in memory; None: it must stay as it is.

    Raises:
        RequestError: a wish that cannot be granted.
        EngineError: not enough memory, or the device failed.
        StoreError: the store cannot be read.
    """
    wish.check()
    residency, plan = decide(
        wish,
        engines[0],
        store,
        device,
        lane,
        queries=tokenizer(["a photo"]),
        num_pipelines=len(engines),
        may_load=reopen is not None,
    )
    if residency.place == "host" and store.access != "resident" and reopen is not None:
        store.close()
        store = reopen()
    pool = None
    if plan is not None:
        checks_finite = any(hides_nan(engine.manifest) for engine in engines)
        pool = make_pool(store, plan, device, checks_finite=checks_finite)
    pipelines = [
        Pipeline(engine, tokens_for(engine, store), device, lane=lane, pool=pool)
        for engine in engines
    ]
    if plan is not None and pool is not None:
        pipelines[0].load(plan.ahead)
        if plan.policy != "recent":
            pool.map.freeze()
    return OpenedPipelines(store, pipelines, residency)
