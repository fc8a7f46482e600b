"""Two workers that take turns: who is disturbed by others on the machine is so on both sides.

A launch is one pair of fresh processes on the same core. In every round each side runs a stage for
some 15 ms, now the base first, now the head: short enough that many turns are not interrupted at
all. Of a launch only the least times count.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import EdjeError
from .gate_statistics import least
from .gate_trees import Tree, Trees
from .gate_worker import Settings

TURN_NS = 15_000_000
TIMED_NS = 500_000  # what takes less is timed several times together
MIN_TIMED, MAX_TIMED = 3, 100  # in a turn
NUM_ROUNDS = 20
LOG_TAIL = 3000  # characters of a worker's log that an error shows
WORKER = "edje.perf.gate_worker"
SERVE = "serve"


@dataclass(frozen=True, slots=True)
class Launch:
    """What one pair of processes took for a run of a stage, in seconds.

    Attributes:
        base_s, head_s: least wall time.
        base_cpu_s, head_cpu_s: least CPU time, all processes of a side together.
        pairs: that a run handles.
    """

    base_s: float
    head_s: float
    base_cpu_s: float
    head_cpu_s: float
    pairs: int = 0

    @property
    def wall(self) -> float:
        """The head's wall time over the base's."""
        return self.head_s / self.base_s

    @property
    def cpu(self) -> float:
        """The head's CPU time over the base's."""
        return self.head_cpu_s / self.base_cpu_s


@dataclass(frozen=True, slots=True)
class Launched:
    """What one pair of processes took for all stages.

    Attributes:
        stages: those that both have.
        only_base, only_head: the others.
    """

    stages: Mapping[str, Launch]
    only_base: Sequence[str]
    only_head: Sequence[str]


class WorkerProcess:
    """A worker of one tree."""

    def __init__(self, tree: Tree, process: subprocess.Popen[str], log: Path):
        assert process.stdin is not None
        assert process.stdout is not None
        self._tree, self._process, self._log = tree, process, log
        self._tasks, self._answers = process.stdin, process.stdout
        self.stages: dict[str, int] = {}

    def wait_until_open(self) -> None:
        """Wait until the stages are open; `stages` says the pairs of each then."""
        self.stages = self._answer()

    def ask(self, task: str, stage: str, runs: int = 0, iterations: int = 1) -> Any:
        """Let it do a task, and return the answer."""
        words = {"task": task, "stage": stage, "runs": runs, "iterations": iterations}
        with suppress(OSError):  # it has ended: `_answer` says why
            self._tasks.write(json.dumps(words) + "\n")
            self._tasks.flush()
        return self._answer()

    def end(self) -> None:
        """End it; a worker that does not within two minutes is killed."""
        with suppress(OSError):
            self._tasks.close()
        try:
            self._process.wait(120)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()

    def _answer(self) -> Any:
        line = self._answers.readline()
        if not line:
            code = self._process.wait()
            said = self._log.read_text("utf-8", "replace")[-LOG_TAIL:].strip()
            raise EdjeError(
                f"the worker of {self._tree.name} ({self._tree.commit}) ended with {code}:\n{said}",
                hint="the base must run under the perf/ of the head: choose a later one"
                if self._tree.name == "base"
                else None,
            )
        return json.loads(line)


@contextmanager
def worker(tree: Tree, settings: Settings, scratch: Path) -> Iterator[WorkerProcess]:
    """Start a worker; end it with the block. `scratch` is a folder that it makes and removes."""
    place = Path(tempfile.mkdtemp(prefix=f"{tree.name}-", dir=scratch))
    log = scratch / f"{place.name}.log"
    words = replace(settings, scratch=str(place)).to_text()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", WORKER, words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            cwd=tree.folder,
            env=tree.environment(os.environ),
        )
    started = WorkerProcess(tree, process, log)
    try:
        yield started
    finally:
        started.end()
        shutil.rmtree(place, ignore_errors=True)


def launch(
    trees: Trees, settings: Settings, scratch: Path, *, number: int, rounds: int = NUM_ROUNDS
) -> Launched:
    """Start a pair of processes, let them take turns at every stage, check what they gave.

    Args:
        number: of the launch: the first process is the base's in even ones.

    Raises:
        EdjeError: a worker ended, or a stage gave something wrong.
    """
    order = (trees.base, trees.head) if number % 2 == 0 else (trees.head, trees.base)
    with ExitStack() as stack:
        sides = {}
        for tree in order:
            sides[tree.name] = stack.enter_context(worker(tree, settings, scratch))
            if number == 0:  # what is kept in .cache/ is made once
                sides[tree.name].wait_until_open()
        for side in sides.values() if number else ():
            side.wait_until_open()
        base, head = sides["base"], sides["head"]
        found = {}
        for stage in (one for one in base.stages if one in head.stages):
            found[stage] = _turns(base, head, stage, rounds)
            for side in (base, head):
                side.ask("check", stage)
        return Launched(
            found,
            [one for one in base.stages if one not in head.stages],
            [one for one in head.stages if one not in base.stages],
        )


def _turns(base: WorkerProcess, head: WorkerProcess, stage: str, rounds: int) -> Launch:
    """Let both take turns at one stage."""
    first = max(1.0, min(base.ask("time", stage, MIN_TIMED)[0]))
    iterations = math.ceil(TIMED_NS / first)
    runs = max(MIN_TIMED, min(MAX_TIMED, round(TURN_NS / first / iterations)))
    wall: dict[str, list[float]] = {"base": [], "head": []}
    cpu: dict[str, list[float]] = {"base": [], "head": []}
    for number in range(rounds):
        sides = [("base", base), ("head", head)]
        for name, side in sides if number % 2 == 0 else reversed(sides):
            wall_ns, cpu_ns = side.ask("time", stage, runs, iterations)
            wall[name] += wall_ns
            cpu[name] += cpu_ns
    return Launch(
        base_s=least(wall["base"]) / 1e9,
        head_s=least(wall["head"]) / 1e9,
        base_cpu_s=least(cpu["base"]) / 1e9,
        head_cpu_s=least(cpu["head"]) / 1e9,
        pairs=head.stages[stage],
    )


def count(
    tree: Tree, settings: Settings, scratch: Path, repeats: int
) -> dict[str, Mapping[str, Sequence[int]]]:
    """Return every stage's counters: [least, greatest] of the repeats.

    `serve` is counted by itself: a server that runs does something now and then.
    """
    found: dict[str, Mapping[str, Sequence[int]]] = {}
    alone = [one for one in settings.stages if one == SERVE]
    others = [one for one in settings.stages if one != SERVE]
    for stages in filter(None, (others, alone)):
        counting = replace(settings, stages=stages, counting=True)
        with worker(tree, counting, scratch) as started:
            started.wait_until_open()
            found |= {stage: started.ask("count", stage, repeats) for stage in started.stages}
    return found
