"""Score image-text pairs with trained EDJE models, as fast as the hardware can.

From a checkpoint to a ranking, in five calls:

    >>> import edje
    >>> from edje.engines import ImageEncoder
    >>> manifest = edje.export_bundle("checkpoint_16.pth", "lm", "bundle", vision_model="siglip")
    >>> report = edje.index_images(ImageEncoder.open("bundle"), "photos", "photos.store")
    >>> with edje.StoreSamples.open("photos.store", "bundle", "queries.tsv") as pairs:
    ...     engine = edje.build_engine("bundle", "engine", calibration=pairs)
    ...     fidelity = edje.verify_engine("engine", "bundle", pairs)
    >>> with edje.Reranker.open("engine", store="photos.store") as reranker:
    ...     best = reranker.rank("a red kite", top_k=10)

The repository root is this package. Its public names are imported when they are first asked for,
so that `import edje` costs next to nothing; what else is public is in the `__all__` of
`edje.engines`, `edje.runtime.store` and `edje.runtime.indexing`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import lazily as _lazily
from .moved import keep_old_names as _keep_old_names
from .telemetry import switch_off as _switch_off_telemetry

if TYPE_CHECKING:
    from .engines.builder.build import build_engine
    from .engines.builder.options import EngineOptions
    from .engines.verify import verify_engine
    from .errors import (
        CheckpointError,
        EdjeError,
        EngineError,
        RequestError,
        StoppedError,
        StoreError,
    )
    from .export.export import export_bundle
    from .runtime.indexing.index import index_images
    from .runtime.queries import StoreSamples
    from .runtime.reranker import Reranker
    from .runtime.residency import ResidencyOptions
    from .runtime.results import Hit, RankResult
    from .runtime.store import TokenStore

__version__ = "0.1.0"

_switch_off_telemetry()
_keep_old_names(__name__)

_HOMES = {
    "export_bundle": ".export.export",
    "index_images": ".runtime.indexing.index",
    "build_engine": ".engines.builder.build",
    "verify_engine": ".engines.verify",
    "EngineOptions": ".engines.builder.options",
    "StoreSamples": ".runtime.queries",
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
    "EngineOptions",
    "Hit",
    "RankResult",
    "RequestError",
    "Reranker",
    "ResidencyOptions",
    "StoppedError",
    "StoreError",
    "StoreSamples",
    "TokenStore",
    "__version__",
    "build_engine",
    "export_bundle",
    "index_images",
    "verify_engine",
]

if not TYPE_CHECKING:
    __getattr__ = _lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
