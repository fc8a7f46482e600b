"""What a router knows of its shards at one time: which ids lie where, and by whom they score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....arrays import UInt64
from ....errors import EngineError
from ...results import EngineLabel
from ..limits import PassingError
from .contract import Held, Shard
from .table import Table

_NO_ENGINE = EngineLabel("none", "none", "shards")


@dataclass(frozen=True, slots=True)
class Knowledge:
    """One state; replaced as a whole when a shard changes.

    Attributes:
        tags: of the servers, shard by shard: what the table was made of.
        table: ids -> shards.
        scorer: fingerprint of the model that all shards use; None: not known yet.
        silent: names of the shards that never told their ids; empty: all did.
        engine: what scores, as the first shard says.
    """

    tags: tuple[tuple[str, ...], ...]
    table: Table
    scorer: str | None
    silent: str
    engine: EngineLabel

    @classmethod
    def nothing(cls, shards: Sequence[Shard]) -> Knowledge:
        """Return what is known before any shard was asked."""
        silent = ", ".join(shard.name for shard in shards)
        return cls((), Table([None] * len(shards)), None, silent, _NO_ENGINE)

    def check_ready(self, shards: Sequence[Shard], *, partial: bool) -> None:
        """Raise PassingError where a request could not be served."""
        faults = [f"{shard.name}: {shard.fault}" for shard in shards if shard.fault is not None]
        if faults and not (partial and len(faults) < len(shards)):
            raise PassingError("; ".join(faults))

    def facts(self, shards: Sequence[Shard]) -> dict[str, Any]:
        """Return what `/info` says."""
        each = [held[0].facts for held in (shard.held() for shard in shards) if held]
        first = each[0] if each else {}
        engines: list[Any] = []
        for facts in each:
            engines += [one for one in facts.get("engines", []) if one not in engines]
        return {
            "engines": engines,
            "device": "shards",
            "num_images": self.table.num_ids,
            "max_input_length": min((f.get("max_input_length", 0) for f in each), default=0),
            "max_batch_pairs": first.get("max_batch_pairs"),
            "fingerprint_scorer": self.scorer,
            "fingerprint_encoder": first.get("fingerprint_encoder"),
            "num_shards": len(shards),
            "num_doubles": self.table.num_doubles,
        }


def learn(shards: Sequence[Shard], known: Knowledge, *, strict: bool = False) -> Knowledge:
    """Take over what the shards hold now, and let none be asked whose scores do not compare.

    The scorer stays the one that was first; where all servers have changed to another one, it is
    that.

    Args:
        strict: several scorers are an error; otherwise those of another one are not asked.

    Raises:
        EngineError: (`strict`) the shards have several scorers.
    """
    held = [shard.held() for shard in shards]
    scorers = list(dict.fromkeys(each.scorer for some in held for each in some))
    if strict and len(scorers) > 1:
        raise EngineError(
            "the shards have several scorers, whose scores do not compare",
            faults=[
                f"{shard.name}: {', '.join(sorted({each.scorer[:12] for each in some}))}"
                for shard, some in zip(shards, held, strict=True)
            ],
            hint="let every shard serve an engine of one bundle",
        )
    scorer = known.scorer
    if scorer not in scorers and scorers:
        scorer = scorers[0]
    for shard in shards:
        shard.use(scorer)
    tags = tuple(tuple(each.tag for each in some) for some in held)
    if tags == known.tags:
        return known
    silent = [shard.name for shard, some in zip(shards, held, strict=True) if not some]
    return Knowledge(
        tags, Table([_joined(some) for some in held]), scorer, ", ".join(silent), _label(held)
    )


def _joined(held: Sequence[Held]) -> UInt64 | None:
    """Return the digests that any server of a shard holds: some may be further than others."""
    parts = {each.tag: each.digests for each in held}
    if not parts:
        return None
    first, *others = parts.values()
    return np.unique(np.concatenate([first, *others])) if others else first


def _label(held: Sequence[Sequence[Held]]) -> EngineLabel:
    for some in held:
        for each in some:
            for engine in each.facts.get("engines", []):
                return EngineLabel(engine["backend"], engine["precision"], "shards")
    return _NO_ENGINE
