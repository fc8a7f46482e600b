"""What a service accepts, how much it has to do, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, get_args

from ...arguments import Arguments
from ...errors import EngineError, RequestError, counted
from .answers import Unknown


class OverloadedError(RequestError):
    """Too much waits already.

    Attributes:
        retry_after_s: seconds until what waits has shrunk to what may wait.
    """

    def __init__(self, message: str, retry_after_s: float):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class PassingError(EngineError):
    """The service cannot be trusted with a request now, and waiting helps: no reason to end."""


class UnknownIdsError(RequestError):
    """A request names ids that the store lacks.

    Attributes:
        missing: positions and ids.
    """

    def __init__(self, missing: list[tuple[int, str]]):
        names = [f"{name!r}" for _, name in missing[:20]]
        what = counted(len(missing), "id is", "ids are")
        super().__init__(f"{what} not in the store", faults=names)
        self.missing = missing


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """How a service behaves.

    Attributes:
        timeout_s: how long a request may take that names no time itself; inf: for ever.
        max_wait_s: a request is refused while what waits needs longer than this, at the rate
            measured so far; however long the request itself.
        unknown: what ids do that the store lacks: `error`, `lowest` (they rank last) or `skip`.
        max_batch_pairs: pairs in a batch; None: the engine's profile. Smaller ones answer small
            requests sooner and cost throughput.
    """

    timeout_s: float = 30.0
    max_wait_s: float = 10.0
    unknown: Unknown = "error"
    max_batch_pairs: int | None = None

    def check(self) -> None:
        """Refuse what cannot be meant, all of it.

        Raises:
            RequestError
        """
        given = Arguments("ServiceOptions")
        given.number("timeout_s", self.timeout_s, "more than 0 seconds", finite=False)
        given.number("max_wait_s", self.max_wait_s, "0 or more seconds", finite=False)
        given.choice("unknown", self.unknown, get_args(Unknown))
        if self.max_batch_pairs is not None:
            given.whole("max_batch_pairs", self.max_batch_pairs, "1 or more, or None")
        given.check()


class Load(NamedTuple):
    """What a service has to do.

    Attributes:
        num_requests: accepted and not yet answered.
        num_pairs: of these, pairs that no batch has taken yet.
        pairs_per_s: at which batches have been scored lately; 0: not known yet.
    """

    num_requests: int
    num_pairs: int
    pairs_per_s: float

    @property
    def wait_s(self) -> float:
        """Seconds that what waits will take."""
        return self.num_pairs / self.pairs_per_s if self.pairs_per_s else 0.0


def check_load(load: Load, options: ServiceOptions) -> None:
    """Refuse one more request where what waits takes longer than may be.

    Raises:
        OverloadedError
    """
    if load.wait_s > options.max_wait_s:
        raise OverloadedError(
            f"{load.num_pairs:,} pairs wait, which take {load.wait_s:.1f} s",
            load.wait_s - options.max_wait_s,
        )
