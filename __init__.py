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
`edje.engines`, `edje.runtime.store`, `edje.runtime.indexing` and `edje.runtime.server`.
"""

from __future__ import annotations

import os as _os
import sys as _sys
from typing import TYPE_CHECKING

from .lazy import keep_old_names as _keep_old_names
from .lazy import lazily as _lazily

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

_keep_old_names()

# ONNX Runtime (from 1.29) and OpenVINO report their use to their makers and leave an id of the
# machine in HOME, as soon as they are imported. This runs before any module of the package, in
# every process. EDJE_TELEMETRY=1 leaves them as their makers ship them; a user's own value of
# ORT_DISABLE_TELEMETRY stays.
if _os.environ.get("EDJE_TELEMETRY") != "1":
    _os.environ["ORT_DISABLE_TELEMETRY"] = _os.environ.get("ORT_DISABLE_TELEMETRY") or "1"
    # OpenVINO has no variable of its own. It reports through this package where it can import it;
    # None says that it cannot, and OpenVINO goes on without, as where it is not installed.
    _sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

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
