"""One request on a hot route, and what is told of it afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from time import perf_counter

from .answers import Answer, Stages
from .contract import Service
from .dialects import new_id
from .kserve import is_kserve
from .refusals import Refusal

LONGEST_S = 1e8  # three years: event loops take no larger number, nor infinity
TIMEOUT_HEADERS = (b"x-request-timeout-ms", b"x-envoy-expected-rq-timeout-ms")
_SAFE_ID = re.compile(r"[\w.:/=+-]{1,128}").fullmatch


class Exchange:
    """What is known of a request, and what its line in the log says.

    Attributes:
        began: when its head was read, as `perf_counter` counts.
        key: name of the key that it came with.
        service: that was asked: a reload may come between.
        write: makes the body of its answer, and headers that go with it; None: not begun.
    """

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
        "write",
    )

    def __init__(self, path: str, headers: Iterable[tuple[bytes, bytes]]):
        """`headers`: names in lower case."""
        self.began = perf_counter()
        self.path = path
        self.headers = dict(headers)
        given = self.headers.get(b"x-request-id")
        self.id = new_id() if given is None else _request_id(given)
        self.dialect = "kserve" if is_kserve(path) else "none"
        self.key: str | None = None
        self.num_pairs = 0
        self.query: str | None = None
        self.service: Service | None = None
        self.stages: Stages | None = None
        self.write: Callable[[Exchange, Answer], tuple[bytes, dict[str, str]]] | None = None

    @property
    def timeout_s(self) -> float | None:
        """How long the client waits, where a header says so.

        Raises:
            Refusal: the header says no time.
        """
        for name in TIMEOUT_HEADERS:
            value = self.headers.get(name)
            if value is not None:
                if not value.isdigit() or not value.strip(b"0"):
                    raise Refusal(400, f"{name.decode()} is no whole number of milliseconds")
                # Python refuses to read thousands of digits; nobody waits for years.
                return min(int(value[:20]) / 1e3, LONGEST_S)
        return None


def _request_id(given: bytes) -> str:
    """Return a client's name for its request, or one of ours where that could do harm."""
    text = given.decode("latin-1")
    return text if _SAFE_ID(text) else new_id()
