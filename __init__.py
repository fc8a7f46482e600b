"""Score image-text pairs with trained EDJE models, as fast as the hardware can.

The repository root is this package. The public names are handed out lazily, so that
`import edje` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .telemetry import switch_off as _switch_off_telemetry

if TYPE_CHECKING:
    from .errors import (
        CheckpointError,
        EdjeError,
        EngineError,
        RequestError,
        StoppedError,
        StoreError,
    )
    from .runtime.reranker import Reranker
    from .runtime.residency import ResidencyOptions
    from .runtime.results import Hit, RankResult
    from .runtime.store import TokenStore

__version__ = "0.1.0"

_switch_off_telemetry()

_HOMES = {
    "Reranker": ".runtime.reranker",
    "ResidencyOptions": ".runtime.residency",
    "RankResult": ".runtime.results",
    "Hit": ".runtime.results",
    "TokenStore": ".runtime.store",
    "EdjeError": ".errors",
    "CheckpointError": ".errors",
    "EngineError": ".errors",
    "StoreError": ".errors",
    "RequestError": ".errors",
    "StoppedError": ".errors",
}

__all__ = [
    "CheckpointError",
    "EdjeError",
    "EngineError",
    "Hit",
    "RankResult",
    "RequestError",
    "Reranker",
    "ResidencyOptions",
    "StoppedError",
    "StoreError",
    "TokenStore",
    "__version__",
]


if not TYPE_CHECKING:  # a type checker that sees it takes every misspelt name for a public one

    def __getattr__(name: str) -> Any:
        """Import a public name on its first use."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name], __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
