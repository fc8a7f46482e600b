"""What a comparison found, and how it is told: a table, Markdown, JUnit, JSON, an exit code."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from ..show import print_table

Status = Literal["ok", "better", "worse", "missing", "new", "shown"]
_NOT_IN_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
HEADER = ("benchmark", "field", "base", "head", "change", "limit", "verdict")


class ExitCode(IntEnum):
    """How `edje bench compare` and the gate end."""

    FINE = 0
    REGRESSION = 1  # a limit is broken, or a benchmark of the base is missing
    CANNOT_COMPARE = 2  # other machines, unreadable files, a stage that does not run


@dataclass(frozen=True, slots=True)
class Verdict:
    """One field of one benchmark.

    Attributes:
        benchmark, field: what is compared.
        base, head: the values, in `unit`; None where there is none.
        unit: `s`, `pairs/s`, or nothing for counts.
        change: head over base, less one; infinite where the base is 0 and the head is not.
        limit: as it was asked for: `5%`; empty where the field is only shown.
        status: `worse` breaks the limit, `better` is beyond it the other way, `missing` and `new`
            are benchmarks (or counters) that one side lacks, `shown` has no limit.
        note: what else there is to know.
    """

    benchmark: str
    field: str
    base: float | None
    head: float | None
    unit: str
    limit: str
    status: Status
    note: str = ""

    @property
    def change(self) -> float | None:
        if self.base is None or self.head is None:
            return None
        if self.base == 0:
            return 0.0 if self.head == 0 else math.inf
        return self.head / self.base - 1

    @property
    def fails(self) -> bool:
        """Whether it makes the comparison fail."""
        return self.status in ("worse", "missing")

    def cells(self) -> tuple[str, ...]:
        """Return it as texts, in the order of `HEADER`."""
        change = self.change
        said = f"{self.status}: {self.note}" if self.note else self.status
        return (
            self.benchmark,
            self.field,
            _value(self.base, self.unit),
            _value(self.head, self.unit),
            "" if change is None else "from 0" if math.isinf(change) else f"{change:+.1%}",
            self.limit,
            said.upper() if self.fails and not self.note else said,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        change = self.change
        finite = change if change is not None and math.isfinite(change) else None
        return {**asdict(self), "change": finite}


def exit_code(verdicts: Iterable[Verdict]) -> ExitCode:
    """Return `REGRESSION` where one of them fails, else `FINE`."""
    failed = any(verdict.fails for verdict in verdicts)
    return ExitCode.REGRESSION if failed else ExitCode.FINE


def headline(verdicts: Sequence[Verdict]) -> str:
    """Return one sentence that says how it went."""
    failing = [verdict for verdict in verdicts if verdict.fails]
    if not failing:
        return f"no regression in {len(verdicts)} comparisons"
    names = ", ".join(dict.fromkeys(f"{one.benchmark} ({one.field})" for one in failing))
    return f"{len(failing)} of {len(verdicts)} comparisons fail: {names}"


def print_verdicts(title: str, verdicts: Sequence[Verdict]) -> None:
    """Write them to stdout as a table, with the headline below."""
    print_table(title, HEADER, [verdict.cells() for verdict in verdicts])
    print(headline(verdicts))


def markdown(title: str, verdicts: Sequence[Verdict], about: Mapping[str, Any]) -> str:
    """Return a page for a pull request: the headline, failing rows first, then the conditions."""
    rows = sorted(verdicts, key=lambda verdict: not verdict.fails)
    lines = [f"## {title}", "", f"**{headline(verdicts)}**", ""]
    lines += [_line(HEADER), _line(["---"] * len(HEADER))]
    lines += [_line(verdict.cells()) for verdict in rows]
    lines += ["", *(f"- {name}: {value}" for name, value in about.items())]
    return "\n".join(lines) + "\n"


def junit(title: str, verdicts: Sequence[Verdict]) -> str:
    """Return JUnit XML: one test case for every verdict, a failure for each that fails."""
    suite = ElementTree.Element("testsuite", name=title)
    suite.set("tests", str(len(verdicts)))
    suite.set("failures", str(sum(verdict.fails for verdict in verdicts)))
    suite.set("errors", "0")
    for verdict in verdicts:
        case = ElementTree.SubElement(
            suite, "testcase", classname=_xml(verdict.benchmark), name=_xml(verdict.field), time="0"
        )
        said = dict(zip(HEADER, verdict.cells(), strict=True))
        text = _xml(", ".join(f"{name} {value}" for name, value in said.items() if value))
        if verdict.fails:
            ElementTree.SubElement(case, "failure", message=text, type=verdict.status)
        else:
            ElementTree.SubElement(case, "system-out").text = text
    return _document(suite)


def junit_error(title: str, message: str) -> str:
    """Return JUnit XML of a comparison that could not be made."""
    suite = ElementTree.Element("testsuite", name=title, tests="1", failures="0", errors="1")
    case = ElementTree.SubElement(suite, "testcase", classname=title, name="compare", time="0")
    ElementTree.SubElement(case, "error", message=_xml(message), type="cannot compare")
    return _document(suite)


def write_reports(
    title: str,
    verdicts: Sequence[Verdict],
    about: Mapping[str, Any],
    *,
    markdown_file: Path | None = None,
    junit_file: Path | None = None,
) -> None:
    """Write what was asked for; folders are made."""
    if markdown_file is not None:
        _write(markdown_file, markdown(title, verdicts, about))
    if junit_file is not None:
        _write(junit_file, junit(title, verdicts))


def write_error(
    title: str,
    message: str,
    *,
    markdown_file: Path | None = None,
    junit_file: Path | None = None,
) -> None:
    """Write into the same files that nothing could be compared."""
    if markdown_file is not None:
        _write(markdown_file, f"## {title}\n\n**cannot compare**\n\n```\n{message}\n```\n")
    if junit_file is not None:
        _write(junit_file, junit_error(title, message))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _document(suite: ElementTree.Element) -> str:
    ElementTree.indent(suite)
    text = ElementTree.tostring(suite, encoding="unicode", xml_declaration=False)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def _xml(text: str) -> str:
    """Return `text` without the characters that no XML document may hold."""
    return _NOT_IN_XML.sub("?", text)


def _line(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _value(value: float | None, unit: str) -> str:
    """Return a value that a person can read: seconds as s, ms or us."""
    if value is None:
        return "-"
    if unit == "s":
        for scale, name in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
            if value * scale >= 1:
                return f"{value * scale:.4g} {name}"
        return f"{value * 1e9:.4g} ns"
    shown = f"{value:,.0f}" if value >= 1000 or float(value).is_integer() else f"{value:.4g}"
    return f"{shown} {unit}".strip()
