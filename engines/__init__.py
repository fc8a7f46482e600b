"""Engines: a model bundle made ready for one backend, behind one contract.

    >>> from edje.engines import EngineOptions, build_engine, open_engine
    >>> options = EngineOptions(max_pairs=64, text_buckets=[15, 31])
    >>> manifest = build_engine("bundle", "small", backend="openvino", options=options)
    >>> open_engine("small").close()

`contract.py` is the page that a backend author reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazily as _lazily

if TYPE_CHECKING:
    from .build_options import BuildOptions
    from .builder.build import build_engine
    from .builder.cache import cached_engine
    from .builder.options import EngineOptions
    from .fidelity import FidelityLimits
    from .image import ImageEncoder
    from .registry import open_engine
    from .verify import verify_engine

__all__ = [
    "BuildOptions",
    "EngineOptions",
    "FidelityLimits",
    "ImageEncoder",
    "build_engine",
    "cached_engine",
    "open_engine",
    "verify_engine",
]

if not TYPE_CHECKING:
    __getattr__ = _lazily(
        __name__,
        {
            "BuildOptions": ".build_options",
            "EngineOptions": ".builder.options",
            "FidelityLimits": ".fidelity",
            "ImageEncoder": ".image",
            "build_engine": ".builder.build",
            "cached_engine": ".builder.cache",
            "open_engine": ".registry",
            "verify_engine": ".verify",
        },
    )
