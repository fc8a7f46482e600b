"""Images -> image encoder -> token store: sources, decoders, the flow between, many machines.

>>> from edje.engines import ImageEncoder
>>> from edje.runtime.indexing import index_images, read_skipped
>>> report = index_images(ImageEncoder.open("bundle"), "photos", "photos.store")
>>> faulty = [(entry.id, entry.reason) for entry in read_skipped("photos.store")]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import lazily as _lazily

if TYPE_CHECKING:
    from .cluster import SegmentEncoder
    from .features import FeatureSource
    from .flow import read_skipped
    from .index import IndexReport, index_features, index_images
    from .sources import SkippedImage, open_source

__all__ = [
    "FeatureSource",
    "IndexReport",
    "SegmentEncoder",
    "SkippedImage",
    "index_features",
    "index_images",
    "open_source",
    "read_skipped",
]

if not TYPE_CHECKING:
    __getattr__ = _lazily(
        __name__,
        {
            "FeatureSource": ".features",
            "IndexReport": ".index",
            "SegmentEncoder": ".cluster",
            "SkippedImage": ".sources",
            "index_features": ".index",
            "index_images": ".index",
            "open_source": ".sources",
            "read_skipped": ".flow",
        },
    )
