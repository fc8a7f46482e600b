"""Run a step in its own process with a time limit: a crash or a hang is a result, not an end.

The step reports into a file, whole after every change, so that what it had measured before it
died still counts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

OK, FAILED, TIMED_OUT, SKIPPED = "ok", "failed", "timed out", "skipped"
_LINES_OF_REASON = 3
_REASON_LENGTH = 400
OUTPUT_BYTES = 16_384  # of a step that failed, kept in the JSON


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a step.

    Attributes:
        name: of the step.
        status: `ok`, `failed`, `timed out` or `skipped`.
        seconds: wall time, start of the process included.
        reason: why it is not `ok`, in one line; None where it is.
        values: what it reported, also before it failed.
        output: the end of what it printed; empty where it is `ok`.
    """

    name: str
    status: str
    seconds: float
    reason: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    output: str = ""


class Report:
    """The step's side: values that reach the file at once.

    Attributes:
        values: reported so far; plain JSON values.
        deadline: `time.monotonic()` seconds after which the step shall start nothing new.
    """

    def __init__(self, path: Path, limit_s: float):
        self._path = path
        self.values: dict[str, Any] = {}
        self.deadline = monotonic() + limit_s

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.deadline - monotonic()

    def add(self, name: str, row: Mapping[str, Any]) -> None:
        """Append a row to the list `name` and write everything."""
        self.put(**{name: [*self.values.get(name, []), dict(row)]})

    def put(self, **values: Any) -> None:
        """Set values by name and write all of them."""
        self.values.update(values)
        whole = self._path.with_suffix(".part")
        whole.write_text(json.dumps(self.values), encoding="utf-8")
        os.replace(whole, self._path)


def run_step(
    name: str,
    command: Sequence[str],
    report: Path,
    limit_s: float,
    env: Mapping[str, str] | None = None,
) -> StepResult:
    """Run `command` until it ends or `limit_s` is over; return what it left in `report`.

    Its output goes to a file beside `report`; the end of it is kept where the step fails, and the
    last lines are the reason. All processes that it started are killed with it.
    """
    log = report.with_suffix(".log")
    began = monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=None if env is None else {**os.environ, **env},
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill_group(process)
    seconds = round(monotonic() - began, 1)
    values, unreadable = _read(report)
    if code == 0 and unreadable is None:
        return StepResult(name, OK, seconds, None, values)
    printed = log.read_bytes()[-OUTPUT_BYTES:].decode("utf-8", "replace")
    if code is None:
        return StepResult(name, TIMED_OUT, seconds, f"over its {limit_s:.0f} s", values, printed)
    reason = unreadable if code == 0 else f"{_how_it_ended(code)}: {_last_lines(printed)}"
    return StepResult(name, FAILED, seconds, reason, values, printed)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the step: children outlive a leader that crashed."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(report: Path) -> tuple[dict[str, Any], str | None]:
    """Return the reported values, and why there are none."""
    try:
        values = json.loads(report.read_text(encoding="utf-8"))
    except OSError:
        return {}, "it reported nothing"
    except ValueError as error:
        return {}, f"its report cannot be read: {error}"
    if not isinstance(values, dict):
        return {}, f"its report holds a {type(values).__name__}, expected an object"
    return values, None


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"killed by {names.get(-code, f'signal {-code}')}"


def _last_lines(output: str) -> str:
    """Return the last lines of the output as one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return " | ".join(lines[-_LINES_OF_REASON:])[-_REASON_LENGTH:] or "no output"
