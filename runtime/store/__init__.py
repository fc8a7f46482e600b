"""The token store: one folder, one writer, many readers, every record verified on reading."""

from .compact import CompactReport
from .folder import StoreStat
from .format import StoreLayout
from .incoming import CommitReport, SegmentWriter, incoming_name
from .read import BadRecord
from .store import TokenStore

__all__ = [
    "BadRecord",
    "CommitReport",
    "CompactReport",
    "SegmentWriter",
    "StoreLayout",
    "StoreStat",
    "TokenStore",
    "incoming_name",
]
