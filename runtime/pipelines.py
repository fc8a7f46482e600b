"""The pipelines of one or two engines over one store and one lane, and what they read from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..engines.contract import Engine
from .device.protocol import Device
from .lane import Lane
from .pipeline import Pipeline, hides_nan
from .residency.decide import decide
from .residency.plan import ResidencyOptions, make_pool
from .results import Residency
from .store import TokenStore
from .text import QueryTokenizer
from .token_source import tokens_for


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Where and how the engines of a reranker run.

    Attributes:
        device: the caller's; None is the host, made by the reranker.
        stream: the caller's own to compute on (see `Device.borrow`); None makes one.
        residency: where tokens shall be read from.
        graphs: let a GPU run batches of sizes that come again as CUDA graphs.
        reopen: opens the store again with its records in memory, should that be decided; the
            reranker then closes both. None: it must stay as it is.
    """

    device: Device | None = None
    stream: object | None = None
    residency: ResidencyOptions = field(default_factory=ResidencyOptions)
    graphs: bool = True
    reopen: Callable[[], TokenStore] | None = None


ON_HOST = RunOptions()


class OpenedPipelines(NamedTuple):
    """One pipeline an engine, and what they read from: `store` may be another than was given."""

    store: TokenStore
    pipelines: list[Pipeline]
    residency: Residency


def open_pipelines(
    engines: Sequence[Engine],
    store: TokenStore,
    device: Device,
    tokenizer: QueryTokenizer,
    runs: RunOptions,
) -> OpenedPipelines:
    """Decide where tokens are read from, load what is to be held, make the pipelines.

    Args:
        engines: of one model, all reading tokens of one dtype.

    Raises:
        RequestError: a wish that cannot be granted.
        EngineError: not enough memory, or the device failed.
        StoreError: the store cannot be read.
    """
    runs.residency.check()
    lane = Lane(device, borrowed=runs.stream)
    residency, plan = decide(
        runs.residency,
        engines[0],
        store,
        device,
        lane,
        queries=tokenizer(["a photo"]),
        num_pipelines=len(engines),
        may_load=runs.reopen is not None,
    )
    if residency.place == "host" and store.access != "resident" and runs.reopen is not None:
        store.close()
        store = runs.reopen()
    pool = None
    if plan is not None:
        checks_finite = any(hides_nan(engine.manifest) for engine in engines)
        pool = make_pool(store, plan, device, checks_finite=checks_finite)
    pipelines = [
        Pipeline(
            engine, tokens_for(engine, store), device, lane=lane, pool=pool, graphs=runs.graphs
        )
        for engine in engines
    ]
    if plan is not None and pool is not None:
        pipelines[0].load(plan.ahead)
        if plan.policy != "recent":
            pool.map.freeze()
    return OpenedPipelines(store, pipelines, residency)
