"""The token store: one folder, one writer, many readers, every record verified on reading."""

from .reader import BadRecord
from .store import StoreStat, TokenStore

__all__ = ["BadRecord", "StoreStat", "TokenStore"]
