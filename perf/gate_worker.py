"""One side of the gate: a process that opens stages of its own tree and runs them when told to.

    python -m edje.perf.gate_worker SETTINGS       SETTINGS: `Settings` as JSON

It answers lines of JSON on stdin with lines of JSON on stdout, and ends with its input. Both sides
run this file as the head has it, over the product code of their own tree.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from ..errors import EdjeError
from . import stages as stages_module
from .counters import Counters, Profile, open_shared
from .stage import Stage
from .stages import open_stages

ENDED_WELL = 0


@dataclass(frozen=True, slots=True)
class Settings:
    """What a worker is to open.

    Attributes:
        stages: their names; none: all that there are.
        candidates, batch, images, wordpieces: as `open_stages` takes them.
        scratch: an empty folder.
        engine: folder of an engine; None: one that takes no time.
        cores: to run on; none: all.
        counting: whether it counts; its times mean nothing then.
    """

    stages: Sequence[str]
    candidates: int
    batch: int
    images: int
    wordpieces: int
    scratch: str
    engine: str | None
    cores: Sequence[int]
    counting: bool

    def to_text(self) -> str:
        """Return it as one word of a command line."""
        return json.dumps(asdict(self))


def serve(settings: Settings, asked: TextIO, answers: TextIO) -> None:
    """Open the stages, say so, and do what is asked until there is nothing more."""
    scratch = Path(settings.scratch)
    if settings.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, settings.cores)
    profile, shared = None, scratch / "counts"
    if settings.counting:
        _count_servers(shared)
        profile = Profile(open_shared(None))
        profile.install()
    engine = None if settings.engine is None else Path(settings.engine)
    opened = open_stages(
        engine,
        candidates=settings.candidates,
        batch=settings.batch,
        images=settings.images,
        wordpieces=settings.wordpieces,
        scratch=scratch,
        only=settings.stages,
        free=engine is None,
    )
    with opened as stages:
        pids = [os.getpid(), *descendants(os.getpid())]
        counters = None
        if profile is not None:
            others = [Profile(open_shared(shared))] if shared.exists() else []
            counters = Counters(profile, others, pids)
        cpu = cpu_clock(pids)
        gc.collect()
        gc.freeze()  # what was opened is not searched again and again while times are taken
        _say(answers, {name: stage.pairs for name, stage in stages.items()})
        for line in asked:
            _say(answers, _do(json.loads(line), stages, cpu, counters))


def _do(
    task: Mapping[str, Any],
    stages: Mapping[str, Stage],
    cpu: Callable[[], int],
    counters: Counters | None,
) -> Any:
    """Do one task: `time`, `check` or `count` a stage."""
    stage, kind = stages[task["stage"]], task["task"]
    if kind == "time":
        return timed(stage.run, task["runs"], task["iterations"], cpu)
    if kind == "check":
        stage.check()
        return True
    if counters is None:
        raise EdjeError("this worker does not count")
    return counters.of(stage.run, task["runs"])


def timed(
    run: Callable[[], object], num_runs: int, iterations: int, cpu: Callable[[], int]
) -> tuple[list[float], list[float]]:
    """Return wall and CPU nanoseconds of runs, after one that brings the caches back.

    `iterations` of them are timed together: what one takes is their mean.
    """
    run()
    wall_ns, cpu_ns, repeated = [], [], range(iterations)
    for _ in range(num_runs):
        cpu_began, began = cpu(), time.perf_counter_ns()
        for _ in repeated:
            run()
        wall_ns.append((time.perf_counter_ns() - began) / iterations)
        cpu_ns.append((cpu() - cpu_began) / iterations)
    return wall_ns, cpu_ns


def cpu_clock(pids: Sequence[int]) -> Callable[[], int]:
    """Return a clock of the CPU nanoseconds of these processes together, the first one this one."""
    if len(pids) == 1 or not sys.platform.startswith("linux"):
        return time.process_time_ns
    # The kernel's number of another process's clock: clock_getcpuclockid(3).
    clocks = [~pid << 3 | 2 for pid in pids[1:]]

    def now() -> int:
        return time.process_time_ns() + sum(map(time.clock_gettime_ns, clocks))

    return now


def descendants(pid: int) -> list[int]:
    """Return the processes that this one started, and those that they did."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = entry.read_text("utf-8", "replace").rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        parents.setdefault(int(words[1]), []).append(int(entry.parent.name))
    found, left = [], [pid]
    while left:
        children = parents.get(left.pop(), [])
        found += children
        left += children
    return sorted(found)


def _count_servers(shared: Path) -> None:
    """Let a server that `serve` starts count into a file."""
    for name in ("EDJE", "SERVE_FREE"):
        command = getattr(stages_module, name)
        counted = (*command[:2], f"{__package__}.counters", str(shared), *command[2:])
        setattr(stages_module, name, counted)


def _say(answers: TextIO, values: Any) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()


def main(words: Sequence[str]) -> int:
    """Run a worker; what libraries print goes to stderr, so that stdout holds answers only."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        serve(Settings(**json.loads(words[0])), sys.stdin, answers)
    return ENDED_WELL


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
