"""The token store: one folder, one writer, many readers, every record verified on reading."""

from .compaction import CompactReport
from .folder import StoreStat
from .incoming import CommitReport
from .layout import StoreLayout
from .read.reader import BadRecord
from .reading import TokenBatch
from .segment import SegmentWriter, incoming_name
from .store import TokenStore

__all__ = [
    "BadRecord",
    "CommitReport",
    "CompactReport",
    "SegmentWriter",
    "StoreLayout",
    "StoreStat",
    "TokenBatch",
    "TokenStore",
    "incoming_name",
]
