"""The token store: one folder, one writer, many readers, every record verified on reading.

What only a writer needs is loaded when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .format import StoreLayout
from .records import BadRecord
from .store import TokenStore

if TYPE_CHECKING:
    from .disk import StoreStat
    from .incoming import CommitReport, SegmentWriter, incoming_name
    from .writer import CompactReport

_HOMES = {
    "CommitReport": ".incoming",
    "CompactReport": ".writer",
    "SegmentWriter": ".incoming",
    "StoreStat": ".disk",
    "incoming_name": ".incoming",
}

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


if not TYPE_CHECKING:  # a type checker that sees it takes every misspelt name for a public one

    def __getattr__(name: str) -> Any:
        """Import a public name on its first use."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name], __name__), name)
        globals()[name] = value
        return value
