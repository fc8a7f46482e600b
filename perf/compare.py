"""Two result files of the same benchmarks: has anything become worse than its limit?

Reads pytest-benchmark's JSON, ours and its own. Refuses what would mislead: files of different
machines, the same name with other parameters, a field that a file lacks.

Exit codes: 0 no regression, 1 a limit is broken or a benchmark is missing, 2 cannot compare.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EdjeError, named
from . import report
from .verdicts import (
    ExitCode,
    Status,
    Verdict,
    exit_code,
    print_verdicts,
    write_error,
    write_reports,
)

COUNTERS = "counters"
THROUGHPUT = "throughput"
TIMES = ("min", "p50", "p90", "p99", "max", "mean", "median", "stddev", "iqr")
FIELDS = (THROUGHPUT, "ops", *TIMES, COUNTERS)
BIGGER_IS_BETTER = {THROUGHPUT, "ops"}
SHOWN = (THROUGHPUT, "min", "p50", "p99")  # where no limit is given
UNITS = {"%": 0.01, "": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
PERCENTILES = {"p50": 50, "p90": 90, "p99": 99}
# Of `machine_info`: what differs between two runs on the same kind of machine, or names no kind.
VOLATILE = {
    *("node", "release", "hz_actual", "hz_actual_friendly", "hz_advertised"),
    *("hz_advertised_friendly", "load_average", "time", "cpuinfo_version_string"),
}
_LIMIT = re.compile(r"(?P<field>[^:]+):(?P<number>[0-9]*\.?[0-9]+)(?P<unit>%|ms|us|s|)")


@dataclass(frozen=True, slots=True)
class Limit:
    """How much worse one field may be.

    Attributes:
        field: one of `FIELDS`, or `counters.NAME`.
        allowed: a share of the base where `is_share`, else seconds, pairs/s or a count.
        text: the amount as it was given.
    """

    field: str
    allowed: float
    is_share: bool
    text: str

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Read `FIELD:AMOUNT`: `throughput:5%`, `p99:2ms`, `counters:0`, `counters.calls:1%`.

        Raises:
            EdjeError: it is none.
        """
        found = _LIMIT.fullmatch(text.strip())
        field = found["field"] if found else ""
        is_time, unit = field in TIMES, found["unit"] if found else ""
        known = field in FIELDS or field.startswith(f"{COUNTERS}.")
        if not found or not known or (unit not in ("", "%") and not is_time):
            raise EdjeError(
                f"the limit is {text!r}, expected FIELD:AMOUNT such as throughput:5%, p99:2ms or "
                f"counters:0; fields are {', '.join(FIELDS)} and {COUNTERS}.NAME"
            )
        amount = float(found["number"]) * UNITS[unit]
        return cls(field, amount, unit == "%", found["number"] + unit)

    def status(self, base: float, head: float, *, bigger_is_better: bool) -> Status:
        """Return what the limit says to two values."""
        worse = base - head if bigger_is_better else head - base
        room = self.allowed * abs(base) if self.is_share else self.allowed
        slack = 1e-12 * max(abs(base), abs(head))  # 1.05 times as much is not beyond 5 %
        if worse > room + slack:
            return "worse"
        return "better" if worse < -room - slack else "ok"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark of a file.

    Attributes:
        name: its full name, unique in the file.
        params: what it was run with; compared as a whole.
        values: by field; times in seconds.
        counters: by name.
    """

    name: str
    params: Any
    values: Mapping[str, float]
    counters: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ResultFile:
    """A file of benchmarks.

    Attributes:
        path: where it lies.
        machine: what must agree before two files are compared.
        commit: whose figures these are; empty where it is unknown.
        benchmarks: by name, in their order.
    """

    path: Path
    machine: Mapping[str, Any]
    commit: str
    benchmarks: Mapping[str, Benchmark]

    @classmethod
    def read(cls, path: Path) -> ResultFile:
        """Read a file.

        Raises:
            EdjeError: it is missing or not pytest-benchmark's JSON (every fault is named).
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EdjeError(f"cannot read {path}: {error}") from error
        rows = values.get("benchmarks") if isinstance(values, dict) else None
        if not isinstance(rows, list) or not rows:
            raise EdjeError(
                f"{path} holds no benchmarks, expected pytest-benchmark's JSON",
                hint="write one with `edje bench run --out FOLDER` or `pytest --benchmark-json`",
            )
        faults: list[str] = []
        found: dict[str, Benchmark] = {}
        for number, row in enumerate(rows):
            try:
                benchmark = _benchmark(row)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                faults.append(f"benchmark {number}: {type(error).__name__}: {error}")
                continue
            if benchmark.name in found:
                faults.append(f"benchmark {number}: a second {benchmark.name!r}")
            found[benchmark.name] = benchmark
        if faults:
            raise EdjeError(f"{path} cannot be used", faults=faults)
        commit = (values.get("commit_info") or {}).get("id") or ""
        return cls(path, fingerprint(values.get("machine_info") or {}), str(commit), found)


def compare_files(
    base: Path,
    head: Path,
    limits: Sequence[str],
    *,
    across_machines: bool = False,
    allow_missing: bool = False,
    markdown_file: Path | None = None,
    junit_file: Path | None = None,
) -> ExitCode:
    """Compare two files, print what was found and write what is asked for; return how it ends.

    `limits`: as `Limit.parse` reads them; the rest as in `compare`.
    """
    title, files = "edje bench compare", {"markdown_file": markdown_file, "junit_file": junit_file}
    try:
        asked = [Limit.parse(text) for text in limits]
        one, other = ResultFile.read(base), ResultFile.read(head)
        verdicts = compare(
            one, other, asked, across_machines=across_machines, allow_missing=allow_missing
        )
    except EdjeError as error:
        write_error(title, str(error), **files)
        print(f"edje: {error}", file=sys.stderr)
        return ExitCode.CANNOT_COMPARE
    about = {
        "base": f"{base} {one.commit}".strip(),
        "head": f"{head} {other.commit}".strip(),
        "machine": ", ".join(f"{name} {value}" for name, value in other.machine.items()),
    }
    write_reports(title, verdicts, about, **files)
    print_verdicts(f"{base} against {head}", verdicts)
    return exit_code(verdicts)


def compare(
    base: ResultFile,
    head: ResultFile,
    limits: Sequence[Limit],
    *,
    across_machines: bool = False,
    allow_missing: bool = False,
) -> list[Verdict]:
    """Compare what both files hold, in the base's order; then what only one of them holds.

    Args:
        limits: none: `SHOWN` is shown, and only a missing benchmark fails.
        across_machines: compare files of different machines, too.
        allow_missing: benchmarks that the head lacks do not fail.

    Raises:
        EdjeError: they cannot be compared (all reasons are named).
    """
    faults = [] if across_machines else differences(base.machine, head.machine)
    hint = "measure both on one machine, or say --across-machines" if faults else None
    both = [name for name in base.benchmarks if name in head.benchmarks]
    for name in both:
        one, other = base.benchmarks[name], head.benchmarks[name]
        if one.params != other.params:
            faults.append(f"{name}: ran with {one.params} and with {other.params}")
        for file, found in ((base, one), (head, other)):
            faults += [
                f"{name}: {file.path} has no {limit.field}"
                for limit in limits
                if not _has(found, limit.field)
            ]
    if not both:
        faults.append("no benchmark is in both")
    if faults:
        raise EdjeError(f"cannot compare {base.path} with {head.path}", faults=faults, hint=hint)
    verdicts = [
        verdict
        for name in both
        for verdict in _verdicts(base.benchmarks[name], head.benchmarks[name], limits)
    ]
    missing: Status = "shown" if allow_missing else "missing"
    note = "the head lacks it" if allow_missing else ""
    verdicts += [
        Verdict(name, "benchmark", 1, None, "", "", missing, note)
        for name in base.benchmarks
        if name not in head.benchmarks
    ]
    verdicts += [
        Verdict(name, "benchmark", None, 1, "", "", "new")
        for name in head.benchmarks
        if name not in base.benchmarks
    ]
    return verdicts


def counter_verdicts(
    name: str, base: Mapping[str, float], head: Mapping[str, float], limit: Limit
) -> Iterator[Verdict]:
    """Compare counters one by one; one that the head no longer has is missing."""
    for counter, value in base.items():
        field = f"{COUNTERS}.{counter}"
        if counter not in head:
            yield Verdict(name, field, value, None, "", limit.text, "missing")
            continue
        status = limit.status(value, head[counter], bigger_is_better=False)
        yield Verdict(name, field, value, head[counter], "", limit.text, status)
    for counter in head.keys() - base.keys():
        yield Verdict(name, f"{COUNTERS}.{counter}", None, head[counter], "", "", "new")


def fingerprint(machine: Mapping[str, Any]) -> dict[str, Any]:
    """Return what names the kind of machine in `machine_info`: ours, or any pytest-benchmark's."""
    try:
        return report.fingerprint(machine)
    except (KeyError, TypeError):
        return _lasting(machine)


def _lasting(machine: Mapping[str, Any]) -> dict[str, Any]:
    """Return all but what differs from run to run, nested names dotted."""
    found: dict[str, Any] = {}
    for name, value in machine.items():
        if name in VOLATILE:
            continue
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": each for inner, each in _lasting(value).items()}
        else:
            found[name] = value
    return found


def differences(base: Mapping[str, Any], head: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each part of two fingerprints that differs."""
    if not base or not head:
        return [] if base == head else ["machine_info: only one of them has any"]
    return [
        f"machine: {name} is {base.get(name)!r} and {head.get(name)!r}"
        for name in sorted({*base, *head})
        if base.get(name) != head.get(name)
    ]


def _benchmark(row: Mapping[str, Any]) -> Benchmark:
    """Read one entry of a file.

    Raises:
        ValueError: a figure is not positive and finite; others where parts are missing.
    """
    stats, extra = row["stats"], row.get("extra_info") or {}
    values = {name: float(stats[name]) for name in ("ops", *TIMES) if stats.get(name) is not None}
    for name, percent in PERCENTILES.items():
        if extra.get(f"{name}_ms") is not None:
            values[name] = float(extra[f"{name}_ms"]) / 1e3
        elif stats.get("data"):
            values[name] = _percentile(stats["data"], percent)
    if "p50" not in values and "median" in values:
        values["p50"] = values["median"]
    speed = extra.get("pairs_per_s") or stats.get("ops")
    if speed is None and values["min"] > 0:
        speed = 1 / values["min"]
    if speed is not None:
        values[THROUGHPUT] = float(speed)
    least = {name: value for name, value in values.items() if name not in ("stddev", "iqr")}
    bad = [name for name, value in least.items() if not 0 < value < math.inf]
    if bad:
        raise ValueError(f"{named(bad)} of {row.get('fullname')!r} not positive and finite")
    counters = {str(name): float(value) for name, value in (extra.get(COUNTERS) or {}).items()}
    return Benchmark(str(row.get("fullname") or row["name"]), row.get("params"), values, counters)


def _percentile(times: Sequence[float], percent: int) -> float:
    """Return the least time that so many per cent of all do not exceed."""
    ordered = sorted(map(float, times))
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _has(benchmark: Benchmark, field: str) -> bool:
    if field == COUNTERS:
        return bool(benchmark.counters)
    name = field.removeprefix(f"{COUNTERS}.")
    return name in benchmark.counters if name != field else field in benchmark.values


def _verdicts(base: Benchmark, head: Benchmark, limits: Sequence[Limit]) -> Iterator[Verdict]:
    """Compare the fields that have a limit; those of `SHOWN` where none is given."""
    for limit in limits:
        name = limit.field.removeprefix(f"{COUNTERS}.")
        if limit.field == COUNTERS:
            yield from counter_verdicts(base.name, base.counters, head.counters, limit)
        elif name != limit.field:
            one, other = base.counters[name], head.counters[name]
            yield from counter_verdicts(base.name, {name: one}, {name: other}, limit)
        else:
            one, other = base.values[name], head.values[name]
            status = limit.status(one, other, bigger_is_better=name in BIGGER_IS_BETTER)
            yield Verdict(base.name, name, one, other, _unit(name), limit.text, status)
    for name in () if limits else SHOWN:
        if name in base.values and name in head.values:
            values = base.values[name], head.values[name]
            yield Verdict(base.name, name, *values, _unit(name), "", "shown")


def _unit(field: str) -> str:
    if field in TIMES:
        return "s"
    return "pairs/s" if field == THROUGHPUT else ""
