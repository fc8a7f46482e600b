"""`python -m edje.perf.readme`: write the README's part on speed, and its chart, from the results.

The part stands between two markers; whatever else is written there is lost. Every block comes from
one committed file of `perf/results` and is left out where that file is missing:

- `peers.json`: entries of group `peers`, a row each; params `wordpieces`; conditions `what` (in
  words), `kind` (`ours`, `library`, `peer`) and `function` (`other`: computes another function).
  Entries of other groups are contests of their own.
- `stages.json`, `candidates.json`, `images.json`, `top10.json`, `cold.json`: of `edje bench suite`.
- `nvidia-h200-2026-11-27.json`: of `make gpu`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EdjeError
from .charts import draw_contest
from .harness import RESULTS, ROOT
from .readme_blocks import BLOCKS
from .readme_chart import H200, chart_conditions, chart_digest, panels
from .report import Result

README = ROOT / "README.md"
CHART = "contest.svg"
BEGIN = "<!-- perf: begin. `python -m edje.perf.readme` writes what follows -->"
END = "<!-- perf: end -->"
OLDER = ("end_to_end", H200)  # their own figures stand under `result`


def load(folder: Path = RESULTS) -> dict[str, Any]:
    """Return the results that the part is made of, those that are there, by name."""
    found = {}
    for name in ("peers", "stages", "candidates", "images", "top10", "cold", *OLDER):
        path = folder / f"{name}.json"
        if path.exists():
            values = json.loads(path.read_text(encoding="utf-8"))
            found[name] = values.get("result", values) if name in OLDER else values
    return found


def section(results: Mapping[str, Result]) -> str:
    """Return the part, without its markers."""
    chart = f"![Pairs per second of edje and the others](perf/results/{CHART})"
    return "\n\n".join([chart, *filter(None, (write(results) for write in BLOCKS))])


def replaced(readme: str, part: str) -> str:
    """Return the README's text with another part between the markers.

    Raises:
        EdjeError: the markers do not stand there once each, in their order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise EdjeError(f"README.md needs one {BEGIN!r} and one {END!r} behind it")
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write README.md and the chart; with `--check` only say whether they are up to date."""
    parser = argparse.ArgumentParser(prog="python -m edje.perf.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where they differ")
    options = parser.parse_args(arguments)
    results = load()
    faults = list(differences(results))
    if options.check:
        for fault in faults:
            print(fault, file=sys.stderr)
        return 1 if faults else 0
    text = README.read_text(encoding="utf-8")
    README.write_text(replaced(text, section(results)), encoding="utf-8")
    described = chart_digest(results)
    draw_contest(panels(results), chart_conditions(results), RESULTS / CHART, described)
    print(f"written: {README.name}, perf/results/{CHART}")
    return 0


def differences(results: Mapping[str, Result]) -> Iterator[str]:
    """Yield one sentence for everything that was not written from these results."""
    text = README.read_text(encoding="utf-8")
    if replaced(text, section(results)) != text:
        yield "README.md differs from perf/results: run `python -m edje.perf.readme`"
    chart = RESULTS / CHART
    if not chart.exists() or chart_digest(results) not in chart.read_text(encoding="utf-8"):
        yield f"perf/results/{CHART} is older than the results: run `python -m edje.perf.readme`"


if __name__ == "__main__":
    sys.exit(main())
