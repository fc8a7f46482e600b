"""One request on a hot route, and what is told of it afterwards."""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from time import perf_counter
from typing import Any

from .answers import Stages
from .contract import Service
from .dialects import new_id
from .kserve import is_kserve
from .refusals import Refusal

LONGEST_S = 1e8  # three years: event loops take no larger number, nor infinity
TIMEOUT_HEADERS = (b"x-request-timeout-ms", b"x-envoy-expected-rq-timeout-ms")
_SAFE_ID = re.compile(r"[\w.:/=+-]{1,128}").fullmatch


class Exchange:
    """What is known of a request, and what its line in the log says."""

    __slots__ = (
        "began",
        "dialect",
        "headers",
        "id",
        "key",
        "num_pairs",
        "path",
        "query",
        "service",
        "stages",
    )

    def __init__(self, scope: MutableMapping[str, Any]):
        self.began = perf_counter()
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self.headers.get(b"x-request-id", b"").decode("latin-1")
        self.id = given if _SAFE_ID(given) else new_id()
        self.dialect = "kserve" if is_kserve(self.path) else "none"
        self.key: str | None = None
        self.num_pairs = 0
        self.query: str | None = None
        self.service: Service | None = None  # that was asked: a reload may come between
        self.stages: Stages | None = None

    def timeout_s(self) -> float | None:
        """Return how long the client waits, where a header says so."""
        for name in TIMEOUT_HEADERS:
            value = self.headers.get(name)
            if value is not None:
                if not value.isdigit() or not value.strip(b"0"):
                    raise Refusal(400, f"{name.decode()} is no whole number of milliseconds")
                # Python refuses to read thousands of digits; nobody waits for years.
                return min(int(value[:20]) / 1e3, LONGEST_S)
        return None
