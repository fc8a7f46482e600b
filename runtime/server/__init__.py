"""Serving: `ScoringService` shares batches among callers; `edje serve` speaks HTTP for it.

The service needs no HTTP library; the rest of this folder needs the extra `serve`.
"""

from .answers import Answer, Stages
from .limits import Load, OverloadedError, ServiceOptions, UnknownIdsError
from .service import ScoringService

__all__ = [
    "Answer",
    "Load",
    "OverloadedError",
    "ScoringService",
    "ServiceOptions",
    "Stages",
    "UnknownIdsError",
]
