"""What the demo measured: recall before and after reranking, speed, sizes and time of each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

CUTOFFS = (1, 5, 10)


@dataclass(frozen=True, slots=True)
class QueryResult:
    """One query: its right image, the first stage's candidates and their order after reranking."""

    caption: str
    target: str
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepTime:
    """Wall seconds of one step, and what it made."""

    name: str
    seconds: float
    detail: str


@dataclass(slots=True)
class DemoResult:
    """Everything the table, the page and `demo.json` show."""

    queries: list[QueryResult] = field(default_factory=list)
    steps: list[StepTime] = field(default_factory=list)
    num_candidates: int = 0
    num_images: int = 0
    pairs_per_s: float = 0.0
    bytes_per_image: int = 0
    engine: str = ""
    trials: list[dict[str, Any]] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """Time a step; what the block appends to the list becomes its detail."""
        detail: list[str] = []
        began = perf_counter()
        yield detail
        self.steps.append(StepTime(name, perf_counter() - began, ", ".join(detail)))

    def recalls(self) -> dict[str, dict[str, float]]:
        """Recall in percent by stage and cutoff, and the share of targets among the candidates."""
        return {
            "first stage": recall([q.before for q in self.queries], self.targets()),
            "reranked": recall([q.after for q in self.queries], self.targets()),
        }

    def targets(self) -> list[str]:
        return [query.target for query in self.queries]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `demo.json`; single queries are left out."""
        values = asdict(self)
        del values["queries"]
        steps = [
            {"name": s.name, "seconds": round(s.seconds, 2), "detail": s.detail} for s in self.steps
        ]
        return {
            **values,
            "steps": steps,
            "num_queries": len(self.queries),
            "recall": self.recalls(),
        }


def recall(orders: Sequence[Sequence[str]], targets: Sequence[str]) -> dict[str, float]:
    """Percent of targets among the first 1, 5, 10 and all of their order."""
    found = {
        f"R@{k}": sum(target in order[:k] for order, target in zip(orders, targets, strict=True))
        for k in (*CUTOFFS, max((len(order) for order in orders), default=0))
    }
    return {name: 100 * count / max(1, len(targets)) for name, count in found.items()}


def spread(queries: Sequence[QueryResult], count: int) -> list[QueryResult]:
    """Pick `count` queries at even distances: shown as they come, not the prettiest."""
    count = min(count, len(queries))
    return [queries[(2 * i + 1) * len(queries) // (2 * count)] for i in range(count)]
