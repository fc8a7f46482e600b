"""Kill a store's writer at many moments and look what is left. A script with one JSON line out.

    python store_killer.py random FOLDER DTYPE SEED KILLS
    python store_killer.py everywhere FOLDER DTYPE SEED
    python store_killer.py beside FOLDER DTYPE SEED OPENINGS

The writer is a fork of this warm process (an import would cost more than everything else). It
says what it begins and what the store has acknowledged through a pipe, which outlives it.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, product
from pathlib import Path
from statistics import median
from typing import Any

from disk_changes import CHANGES, write_half
from edje.runtime.store import TokenStore, disk
from edje.runtime.store.catalog import Catalog
from store_history import (
    KINDS,
    Model,
    Operation,
    Sizes,
    Witness,
    differences,
    draw_operation,
    expected_bytes,
    random_operation,
    served_bytes,
)

# A writer that is to be killed announces what it does so long before it begins: time for whoever
# kills it to wake up, or the first moments of an operation would never be hit.
HEAD_START_S = 0.001
# A sleep ends late; what is left of a wait after it is spent awake.
AWAKE_S = 0.0002
# Operations that pass until whoever waits for the right one kills any.
MAX_PATIENCE = 30


@dataclass
class Outcome:
    """What the kills hit and what was wrong afterwards."""

    hit: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps({"hit": self.hit, "faults": self.faults})


class Writer:
    """A forked process that writes until it dies; the lines it said can be read afterwards."""

    def __init__(self, work: Callable[[Callable[[str], None]], None]):
        self._lines, sink = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._lines)
            try:
                work(lambda line: void(os.write(sink, line.encode() + b"\n")))
            except BaseException:
                os.write(sink, b"failed " + json.dumps(traceback.format_exc()).encode() + b"\n")
            os._exit(0)
        os.close(sink)
        self._rest = b""
        self._unread: deque[str] = deque()

    def lines(self) -> Iterator[str]:
        """Yield what it says, until it is dead and all is read."""
        while chunk := os.read(self._lines, 1 << 16):
            yield from self._whole(chunk)

    def lines_so_far(self) -> Iterator[str]:
        """Yield what it has said by now."""
        yield from self._whole(b"")
        while select.select([self._lines], [], [], 0)[0]:
            chunk = os.read(self._lines, 1 << 16)
            if not chunk:
                return
            yield from self._whole(chunk)

    def _whole(self, chunk: bytes) -> Iterator[str]:
        """Yield the lines that are whole with `chunk`, each to one caller only."""
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        self._unread.extend(line.decode() for line in whole)
        while self._unread:
            yield self._unread.popleft()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def reap(self) -> None:
        os.waitpid(self.pid, 0)
        os.close(self._lines)


def void(_: object) -> None:
    """Take a value and give none."""


def write_on(
    path: Path, model: Model, seed: int, say: Callable[[str], None], head_start: float = 0.0
) -> None:
    """Write to the store for ever, saying each operation before and after, and when that was."""
    pick = random.Random(seed)

    def begin(operation: Operation) -> None:
        if head_start:
            start = time.monotonic() + head_start
            say(f"soon {start} {operation.to_json()}")
            wait_until(start)
        say(f"begin {time.monotonic()} {operation.to_json()}")

    begin(Operation("open"))
    with TokenStore.open(path, mode="a") as store:
        say(f"done {time.monotonic()}")
        while True:
            operation = random_operation(pick, model)
            begin(operation)
            operation.apply(store)
            say(f"done {time.monotonic()}")
            model = operation.after(model)


def wait_until(moment: float) -> None:
    """Return at `moment` (monotonic), to some microseconds if the machine is idle."""
    time.sleep(max(0.0, moment - AWAKE_S - time.monotonic()))
    while time.monotonic() < moment:
        pass


class Aim:
    """Draws what to kill and when, so that every kind is hit, however long or short it is.

    A machine that is busy lets many kills come late, and the more the shorter an operation is. So
    the kind that was hit least comes next, until it has been hit as well.
    """

    def __init__(self, pick: random.Random, hit: Counter[str]):
        self._pick, self._hit = pick, hit
        self._times = {kind: deque([0.003], 32) for kind in ("open", *KINDS)}

    def kind(self) -> str:
        """Return one of those that were hit least."""
        least = min(self._hit[kind] for kind in self._times)
        return self._pick.choice([kind for kind in self._times if self._hit[kind] == least])

    def delay(self, kind: str) -> float:
        """Return how long after its beginning to kill an operation; a sixth of all is too long."""
        return self._pick.uniform(0, 1.2 * median(self._times[kind]))

    def learn(self, kind: str, seconds: float) -> None:
        """Take in how long an operation took."""
        self._times[kind].append(seconds)


class Progress:
    """What a writer announces, does and has done, by its lines."""

    def __init__(self, witness: Witness, outcome: Outcome, aim: Aim):
        self._witness, self._outcome, self._aim = witness, outcome, aim
        self._since = 0.0
        self.begun: Operation | None = None

    def take(self, line: str) -> tuple[str, float] | None:
        """Take in a line; return the kind of operation that it announces, and when it begins."""
        word, _, rest = line.partition(" ")
        moment, _, operation = rest.partition(" ")
        if word == "soon":
            return Operation.from_json(operation).kind, float(moment)
        if word == "begin":
            self.begun, self._since = Operation.from_json(operation), float(moment)
        elif word == "done" and self.begun is not None:
            self._aim.learn(self.begun.kind, float(moment) - self._since)
            self._witness.model = self.begun.after(self._witness.model)
            self.begun = None
        else:
            self._outcome.faults.append(line)
        return None

    def kind(self) -> str:
        """Return what it is doing."""
        return self.begun.kind if self.begun else "between"


def kill_once(witness: Witness, outcome: Outcome, pick: random.Random, aim: Aim) -> None:
    """Let a writer run, kill it while it does something of a kind drawn beforehand, check."""
    seed, path, model = pick.getrandbits(32), witness.path, witness.model
    target, progress = aim.kind(), Progress(witness, outcome, aim)
    patience = pick.randint(0, 4) if target != "open" else 0
    writer = Writer(lambda say: write_on(path, model, seed, say, HEAD_START_S))
    for line in writer.lines():
        announced = progress.take(line)
        if announced is None:
            continue
        kind, start = announced
        if kind == target and patience <= 0:
            wait_until(start + aim.delay(target))
            for late in writer.lines_so_far():
                progress.take(late)
            # Too early or too late, the next will do; but a writer opens the store only once.
            if progress.kind() == target or target == "open" or patience < -MAX_PATIENCE:
                writer.kill()
                patience = 10**9
        patience -= 1
    writer.reap()
    outcome.hit[progress.kind()] += 1
    outcome.faults += witness.check(progress.begun)


def kill_at_random(path: Path, sizes: Sizes, seed: int, kills: int) -> Outcome:
    """Kill `kills` writers of one store one after the other: what they leave piles up."""
    sizes.create(path).close()
    pick, outcome, witness = random.Random(seed), Outcome(), Witness(path)
    aim = Aim(pick, outcome.hit)
    for number in range(kills):
        kill_once(witness, outcome, pick, aim)
        if number % 20 == 19:
            outcome.faults += witness.verify()
        if outcome.faults:
            break
    return outcome


MOMENTS = ("before", "half", "after")


class Death:
    """Makes this process kill itself at the n-th change that the store makes on disk."""

    def __init__(self, countdown: int, moment: str):
        self._countdown = countdown
        self._moment = moment
        for name in CHANGES:
            setattr(disk, name, self._deadly(getattr(disk, name)))
        for name in ("commit", "forget_retired"):
            setattr(Catalog, name, self._deadly(getattr(Catalog, name)))

    def _deadly(self, call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: Any) -> object:
            self._countdown -= 1
            if self._countdown != 0:
                return call(*arguments)
            if self._moment == "half" and call.__name__ == "write":
                write_half(*arguments)
            elif self._moment == "after":
                call(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
            return None

        return wrapped


def die_at(path: Path, operation: Operation, countdown: int, moment: str) -> str | None:
    """Do the operation in a fork that dies at its n-th change; return what it said, if it lived."""

    def work(say: Callable[[str], None]) -> None:
        Death(countdown, moment)
        with TokenStore.open(path, mode="a") as store:
            operation.apply(store)
        say("done")

    writer = Writer(work)
    said = list(writer.lines())
    writer.reap()
    return said[0] if said else None


def die_everywhere(path: Path, sizes: Sizes, seed: int) -> Outcome:
    """Do each kind of operation again and again, dead at its 1st, 2nd ... change on disk."""
    sizes.create(path).close()
    pick, outcome, witness = random.Random(seed), Outcome(), Witness(path)
    for kind, moment in product(KINDS, MOMENTS):
        for countdown in count(1):
            witness.fill(pick, 30)
            operation = draw_operation(pick, witness.model, kind)
            said = die_at(path, operation, countdown, moment)
            if said == "done":
                witness.model = operation.after(witness.model)
            elif said is not None:
                outcome.faults.append(said)
            outcome.faults += witness.check(operation if said is None else None)
            if outcome.faults:
                return outcome
            if said is not None:
                break
            outcome.hit[kind] += 1
    outcome.faults += witness.verify()
    return outcome


class Ledger:
    """The models that a store went through while its writer wrote: the last ones known."""

    def __init__(self, writer: Writer):
        self._writer = writer
        self._begun: Operation | None = None
        self.models: list[Model] = [{}]
        self.faults: list[str] = []

    def read(self) -> None:
        """Take in what the writer has said since."""
        for line in self._writer.lines_so_far():
            word, _, rest = line.partition(" ")
            if word == "begin":
                self._begun = Operation.from_json(rest.partition(" ")[2])
            elif word == "done" and self._begun:
                self.models.append(self._begun.after(self.models[-1]))
                self._begun = None
            else:
                self.faults.append(line)

    def forget(self) -> None:
        """Keep the newest model only."""
        self.models = self.models[-1:]

    def possible(self) -> list[Model]:
        """Return every model that may have been read since `forget`."""
        return self.models + ([self._begun.after(self.models[-1])] if self._begun else [])


def read_beside(path: Path, sizes: Sizes, seed: int, openings: int) -> Outcome:
    """Open, read and keep readers while another process writes: each sees one state, for good."""
    sizes.create(path).close()
    outcome, pick = Outcome(), random.Random(seed)
    writer = Writer(lambda say: write_on(path, {}, seed, say))
    ledger, kept = Ledger(writer), deque[tuple[TokenStore, dict[str, bytes]]]()
    while outcome.hit["opened"] < openings and not outcome.faults:
        ledger.read()
        ledger.forget()
        store = TokenStore.open(path, access=pick.choice(("cached", "resident")))
        kept.append((store, served_bytes(store)))
        ledger.read()
        outcome.faults += ledger.faults
        possible = ledger.possible()
        wrong = [differences(kept[-1][1], expected_bytes(m, store.layout)) for m in possible]
        outcome.faults += [] if "" in wrong else [f"{len(wrong)} states, none was read: {wrong}"]
        outcome.hit["opened"] += 1
        outcome.hit["states"] += len(ledger.models) - 1
        if len(kept) > 4:
            store, before = kept.popleft()
            outcome.faults += filter(None, [differences(served_bytes(store), before)])
            store.close()
    writer.kill()
    writer.reap()
    for store, before in kept:
        outcome.faults += filter(None, [differences(served_bytes(store), before)])
        store.close()
    return outcome


def main(way: str, folder: str, dtype: str, seed: str, *rest: str) -> None:
    """Run one of the ways and print what came of it."""
    sizes = Sizes(dtype=dtype)
    path = Path(folder)
    if way == "random":
        outcome = kill_at_random(path, sizes, int(seed), int(rest[0]))
    elif way == "beside":
        outcome = read_beside(path, sizes, int(seed), int(rest[0]))
    else:
        outcome = die_everywhere(path, sizes, int(seed))
    print(outcome.to_json())


if __name__ == "__main__":
    main(*sys.argv[1:])
