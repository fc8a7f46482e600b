"""Charts of results, as SVG or PNG by the path's ending, drawn from JSON alone.

Every chart names its conditions. Text stays text in SVG: it can be searched and read aloud.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from .report import Result, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, LIBRARY, PEER, ROOF = "#c2410c", "#475569", "#94a3b8", "#0f172a"
KINDS = {
    "ours": (OURS, "edje"),
    "library": (LIBRARY, "the library called directly"),
    "peer": (PEER, "the official code and others"),
}
LINES = ("#c2410c", "#0369a1", "#15803d", "#7e22ce", "#a16207", "#be123c", "#334155")
STYLE: Any = {  # matplotlib's own type lists all its names
    "svg.fonttype": "none",
    "svg.hashsalt": "edje",
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#64748b",
    "figure.facecolor": "white",
}


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: whose it is, pairs/s, and its kind: `ours`, `library` (bare) or `peer`."""

    label: str
    value: float
    kind: str = "peer"


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars of one machine.

    Attributes:
        base: the bar whose multiples ours are told as, by its label.
        roof: pairs/s that the machine's products allow, all else free; None: not known.
    """

    title: str
    bars: Sequence[Bar]
    base: str
    roof: float | None = None
    roof_label: str = ""


def draw_contest(panels: Sequence[Panel], conditions: str, path: Path, described: str = "") -> Path:
    """Draw pairs/s of us and the others, a panel a machine, on one logarithmic axis.

    Args:
        described: goes into the SVG's metadata.
    """
    heights = [len(panel.bars) + 1.4 for panel in panels]
    from matplotlib.patches import Patch

    with _figure(path, (9.2, 0.33 * sum(heights) + 1.1), described) as figure:
        grid = figure.subplots(
            len(panels), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights}
        )
        most = max(bar.value for panel in panels for bar in panel.bars)
        most = max([most, *(panel.roof or 0.0 for panel in panels)])
        least = min(bar.value for panel in panels for bar in panel.bars)
        for panel, axes in zip(panels, grid[:, 0], strict=True):
            _draw_panel(axes, panel)
            axes.set_xscale("log")
            axes.set_xlim(least / 2, most * 8)
            axes.xaxis.set_major_formatter("{x:,.0f}")
        grid[-1, 0].set_xlabel("image-text pairs per second, logarithmic: more is better")
        shown = {bar.kind for panel in panels for bar in panel.bars}
        grid[0, 0].legend(
            handles=[Patch(color=c, label=label) for k, (c, label) in KINDS.items() if k in shown],
            loc="lower right", frameon=False, fontsize=9,
        )  # fmt: skip
        _conditions(figure, conditions)
    return path


def _draw_panel(axes: Axes, panel: Panel) -> None:
    bars = sorted(panel.bars, key=lambda bar: bar.value)
    places = range(len(bars))
    [base] = [bar.value for bar in bars if bar.label == panel.base]
    axes.barh(places, [bar.value for bar in bars], color=[KINDS[bar.kind][0] for bar in bars])
    axes.set_yticks(places, [bar.label for bar in bars])
    for tick, bar in zip(axes.get_yticklabels(), bars, strict=True):
        tick.set_fontweight("bold" if bar.kind == "ours" else "normal")
    for at, bar in zip(places, bars, strict=True):
        said = f"{bar.value:,.0f}"
        if bar.kind == "ours":
            said += f"  ({bar.value / base:.1f}x)"
        weight = "bold" if bar.kind == "ours" else "normal"
        axes.text(
            *(bar.value * 1.08, at, said), va="center", fontweight=weight,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
    if panel.roof is not None:
        axes.axvline(panel.roof, color=ROOF, linestyle=(0, (4, 3)), linewidth=1.1, zorder=0)
        said = f"{panel.roof_label} {panel.roof:,.0f}"
        axes.text(panel.roof * 1.06, -0.6, said, color=ROOF, va="bottom", fontsize=8.5)
    axes.set_title(panel.title, loc="left", fontsize=11.5, fontweight="bold")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e2e8f0")
    axes.set_axisbelow(True)


def draw_sweep(result: Result, path: Path) -> Path:
    """Draw pairs/s of every stage over what was swept, with the roofs."""
    over = result["swept"]
    entries = [one for one in result["benchmarks"] if over in one["params"]]
    names = list(dict.fromkeys(one["name"] for one in entries))
    with _figure(path, (7.6, 4.6)) as figure:
        axes = figure.subplots()
        for name, colour in zip(names, LINES, strict=False):
            own = [one for one in entries if one["name"] == name]
            x = [one["params"][over] for one in own]
            y = [one["extra_info"]["pairs_per_s"] for one in own]
            axes.plot(x, y, marker="o", color=colour, label=name)
            roofs = [roof for one in own if (roof := _roof_of(one)) is not None]
            if len(roofs) == len(own):
                axes.plot(
                    x, roofs, color=colour, linestyle="--", linewidth=1, label=f"roof: {name}"
                )
        speeds = [one["extra_info"]["pairs_per_s"] for one in entries]
        values = sorted({one["params"][over] for one in entries})
        axes.set_xscale("log")
        axes.set_xticks(values, [f"{value:,}" for value in values], minor=False)
        axes.set_xticks([], minor=True)
        _scale_y(axes, logarithmic=max(speeds) > 30 * min(speeds))
        axes.set_xlabel(over)
        axes.set_ylabel("pairs per second")
        axes.grid(axis="y", color="#e2e8f0")
        axes.legend(frameon=False)
        _conditions(figure, conditions_of(result))
    return path


def _roof_of(entry: Mapping[str, Any]) -> float | None:
    extra = entry["extra_info"]
    share: float | None = extra["share_of_roof"]
    return None if not share else extra["pairs_per_s"] / share


def draw_stages(result: Result, path: Path) -> Path:
    """Draw what a pair costs in every stage, logarithmic."""
    entries = [one for one in result["benchmarks"] if one["group"] == "stages"]
    with _figure(path, (7.6, 0.36 * len(entries) + 1.5)) as figure:
        axes = figure.subplots()
        costs = [one["extra_info"]["us_per_pair"] for one in entries]
        places = range(len(entries) - 1, -1, -1)
        whole = ("rank", "serve")
        colours = [OURS if one["name"] in whole else LIBRARY for one in entries]
        axes.barh(places, costs, color=colours)
        for at, one, cost in zip(places, entries, costs, strict=True):
            share = one["extra_info"]["share_of_roof"]
            said = f"{cost:,.2f}" + ("" if share is None else f"  ({share:.0%} of its roof)")
            axes.text(cost * 1.1, at, said, va="center")
        axes.set_yticks(places, [one["name"] for one in entries])
        axes.set_xscale("log")
        axes.set_xlim(min(costs) / 2, max(costs) * 40)
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.set_xlabel("microseconds a pair, logarithmic: less is better")
        axes.tick_params(axis="y", length=0)
        _conditions(figure, conditions_of(result))
    return path


def draw_load(result: Result, path: Path) -> Path:
    """Draw latency (p50 and p99) of a server over the pairs/s that it answers."""
    entries = [one for one in result["benchmarks"] if one["group"] == "load"]
    with _figure(path, (7.6, 4.4)) as figure:
        axes = figure.subplots()
        x = [one["extra_info"]["pairs_per_s"] for one in entries]
        for q, colour in (("p50", LINES[1]), ("p99", LINES[0])):
            y = [one["extra_info"][f"{q}_ms"] for one in entries]
            axes.plot(x, y, marker="o", color=colour, label=q)
        for at, one in zip(x, entries, strict=True):
            most = one["extra_info"]["p99_ms"]
            clients = one["params"]["clients"]
            axes.annotate(f"{clients}", (at, most), (0, 5), textcoords="offset points", ha="center")
        _scale_y(axes, logarithmic=False)
        axes.set_xlim(left=0)
        axes.set_xlabel("pairs per second answered (numbers: clients that wait for their answers)")
        axes.set_ylabel("milliseconds a request")
        axes.grid(axis="y", color="#e2e8f0")
        axes.legend(frameon=False)
        _conditions(figure, conditions_of(result))
    return path


def draw_depths(results: Sequence[Result], path: Path) -> Path:
    """Draw pairs/s of two engines in a row over the layers of the first, and who wins alone.

    A line a number of candidates and precision of the first engine; beside each point stands on
    how many queries the top 10 was the whole model's, in order.
    """
    entries = [one for result in results for one in result["benchmarks"]]
    lines: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for one in entries:
        params = one["params"]
        if params["engines"] == 2 and one["extra_info"]["conditions"]["survivors"] == "all":
            lines.setdefault((params["candidates"], params["first"]), []).append(one)
    with _figure(path, (7.6, 4.8)) as figure:
        axes = figure.subplots()
        for ((candidates, first), points), colour in zip(
            sorted(lines.items()), LINES, strict=False
        ):
            points = sorted(points, key=lambda one: one["params"]["layers"])
            x = [one["params"]["layers"] for one in points]
            y = [one["extra_info"]["pairs_per_s"] for one in points]
            label = f"{candidates:,} candidates, {first} first"
            axes.plot(x, y, marker="o", color=colour, label=label)
            for at, high, one in zip(x, y, points, strict=True):
                num_queries = one["stats"]["rounds"]
                same = 1 - one["extra_info"]["counters"]["other_top_10"] / num_queries
                axes.annotate(
                    f"{same:.3g}" if same < 1 else "1", (at, high), (0, 6), color=colour,
                    textcoords="offset points", ha="center", fontsize=9,
                )  # fmt: skip
        alone = [one for one in entries if one["params"]["engines"] == 1]
        for one, style in zip(alone, ("--", ":", "-."), strict=False):
            label = f"{one['params']['candidates']:,} candidates, {one['params']['first']} alone"
            speed = one["extra_info"]["pairs_per_s"]
            axes.axhline(speed, color=ROOF, linestyle=style, linewidth=1, label=label)
        most = max(one["params"]["layers"] for one in entries)
        axes.set_xlim(0.6, most + 0.4)
        axes.set_xticks(range(1, most + 1), [*map(str, range(1, most)), f"{most} (whole)"])
        _scale_y(axes, logarithmic=False)
        axes.set_xlabel(
            "layers of the first engine (numbers: share of the queries with the same top 10)"
        )
        axes.set_ylabel("pairs per second")
        axes.grid(axis="y", color="#e2e8f0")
        axes.legend(frameon=False, fontsize=9)
        _conditions(figure, conditions_of(results[-1]))
    return path


def _scale_y(axes: Axes, *, logarithmic: bool) -> None:
    """Let the y axis begin at 0, or be logarithmic, with plain numbers."""
    if logarithmic:
        axes.set_yscale("log")
        axes.set_yticks([], minor=True)
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")


def conditions_of(result: Result) -> str:
    """Return the conditions that all entries share, and the machine, on one line."""
    entries = [one for one in result["benchmarks"] if one["group"] != "roof"]
    shared = dict(entries[0]["extra_info"]["conditions"]) if entries else {}
    for one in entries:
        own = one["extra_info"]["conditions"]
        shared = {k: v for k, v in shared.items() if own.get(k) == v and v is not None}
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shared.items())
    return f"{said} {summary(result)}".strip()


@contextmanager
def _figure(path: Path, size: tuple[float, float], described: str = "") -> Iterator[Figure]:
    """Yield a figure that is written to `path` when the block ends."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(size, layout="constrained")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        svg = path.suffix == ".svg"
        metadata = {"Date": None, "Description": described} if svg else None
        figure.savefig(path, dpi=150, metadata=metadata)


def _conditions(figure: Figure, text: str) -> None:
    width = int(figure.get_figwidth() * 15)
    figure.supxlabel(fill(text, width), fontsize=8, color="#475569", x=0.01, ha="left")
