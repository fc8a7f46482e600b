"""How the command line shows things: tables and JSON on stdout, progress and notes on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..bundle import BundleManifest
from ..engines.fidelity import NOT_MEASURED, is_measured
from ..errors import named
from .doctor import Diagnosis
from .results import RankResult

MAX_NOTES = 20  # faults that are told one a line
FILE_WIDTH = 160  # columns of a table that goes to a file or a pipe


def print_json(values: Any) -> None:
    """Write one JSON document to stdout."""
    print(json.dumps(values, indent=2, ensure_ascii=False))


def note(message: str) -> None:
    """Tell the user something beside the result."""
    print(f"edje: {message}", file=sys.stderr)


@contextmanager
def progress_bar(
    description: str, *, text: Callable[[float], str] | None = None
) -> Iterator[Callable[[int, int], None]]:
    """Yield `update(done, total)`, shown as a bar on stderr.

    `text` gives what stands beside the counts, from the speed a second.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *([TextColumn("{task.fields[text]}")] if text else []),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=None, text="")

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if text:
                bar.update(task, text=text(bar.tasks[0].speed or 0.0))

        yield update


@contextmanager
def progress_steps(description: str) -> Iterator[Callable[[str], None]]:
    """Yield `show(step)`: names the step at work, with a clock, on stderr."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as steps:
        task = steps.add_task(description, total=None)
        yield lambda step: steps.update(task, description=f"{description}: {step}")


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """Write name/value lines to stdout under a title."""
    _print_table(title, ("", ""), [(name, _shown(value)) for name, value in facts.items()])


def print_exported(out: str, manifest: BundleManifest, parity: Mapping[str, Any]) -> None:
    """Write what a bundle holds, and how far its graphs are from PyTorch."""
    _print_table("exported", ("", ""), [("bundle", out), *_bundle_rows(manifest)])
    rows = [
        (graph, f"{found['max_abs_difference']:.1e}", f"{found['limit']:.1e}", _outputs(found))
        for graph, found in parity.items()
    ]
    runtime = next((found["runtime"] for found in parity.values()), "")
    _print_table(
        f"parity: the same inputs through PyTorch and through {runtime}",
        ("graph", "largest difference", "allowed", "of outputs"),
        rows,
    )


def _bundle_rows(manifest: BundleManifest) -> list[tuple[str, str]]:
    sizes, text, image = manifest.sizes, manifest.text, manifest.image
    token_bytes = 2 * sizes.num_tokens * sizes.hidden
    images = "none: the bundle scores but does not index (no --vision-model was given)"
    if image is not None:
        images = f"{image.size} x {image.size} pixels, {sizes.num_features} features"
    dropped = manifest.provenance.get("dropped_from_keys", {})
    wrappers = "; ".join(f"{part} dropped from {count:,} keys" for part, count in dropped.items())
    rows = [
        (
            "queries",
            f"{text.normalization} normalization, at most {text.max_wordpieces} wordpieces",
        ),
        ("images", images),
        ("visual tokens", f"{sizes.num_tokens} x {sizes.hidden}: {token_bytes:,} bytes an image"),
        (
            "joint encoder",
            f"{sizes.num_layers} layers, {sizes.num_heads} heads, width {sizes.hidden}, "
            f"intermediate {sizes.intermediate}, vocabulary {sizes.vocab_size:,}",
        ),
        *_origins(manifest.provenance),
        ("encoder", f"fingerprint {manifest.fingerprint_encoder}"),
        ("scorer", f"fingerprint {manifest.fingerprint_scorer}"),
    ]
    return [*rows, ("checkpoint keys", wrappers)] if wrappers else rows


def _origins(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each input that came from the Hugging Face Hub, with its commit."""
    for name, origin in provenance.get("sources", {}).items():
        if origin and "repository" in origin:
            file = f"{origin['file']} in " if "file" in origin else ""
            yield name.replace("_", " "), f"{file}{origin['repository']} at {origin['commit']}"


def _outputs(found: Mapping[str, Any]) -> str:
    return f"up to {found['max_abs_output']:.3g}, {found['output_dtype']}"


def print_ranking(result: RankResult) -> None:
    """Write the hits to stdout; what could not be ranked goes to stderr."""
    rows = [(str(n), f"{hit.score:.4f}", hit.id) for n, hit in enumerate(result, 1)]
    times, engine, rescoring = result.timings_ms, result.engine, result.rescoring
    ran = f"{engine.backend} {engine.precision}"
    if engine.tokens != "float16":
        ran += f" from {engine.tokens} tokens"
    if rescoring is not None:
        precise = rescoring.engine
        ran += f", {rescoring.num_rescored} rescored on {precise.backend} {precise.precision}"
    _print_table(
        f"{len(rows)} images in {times.total:.1f} ms on {ran}",
        ("rank", "score", "id"),
        rows,
    )
    if result.truncated:
        note("the query was cut to the wordpieces that the model takes")
    if result.missing:
        names = named([fault.id for fault in result.missing])
        note(f"{len(result.missing)} candidates are not in the store: {names}")
    for fault in result.errors[:MAX_NOTES]:
        note(f"{fault.id!r} was not ranked: {fault.reason}")
    if len(result.errors) > MAX_NOTES:
        note(f"{len(result.errors) - MAX_NOTES:,} more were not ranked: --json names all")


def print_fidelity(title: str, values: Mapping[str, Any]) -> None:
    """Write a manifest's `fidelity`: what was measured, and what was only emulated beside it."""
    if is_measured(values):
        _print_table(title, ("measure", "value", "what it says"), _fidelity_rows(values))
    else:
        note(f"fidelity: {NOT_MEASURED}; `edje verify` measures it where the engine runs")
    if "emulated" in values:
        rows = _fidelity_rows(values["emulated"])
        _print_table(f"{title}, emulated", ("measure", "value", "what it says"), rows)


def _fidelity_rows(values: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    share, score = "{:.2%}".format, "{:.2g}".format
    rows = [
        ("same first place", share(values["top_1"]), "queries whose best image is float32's"),
        ("same first ten", share(values["top_10"]), "of float32's ten best are among its ten"),
        ("Kendall tau", f"{values['kendall_tau']:.4f}", "order of all candidates: 1 is the same"),
        ("mean difference", score(values["mean_abs_diff"]), "of a pair's score (raw logit)"),
        ("99.9 % differ by", score(values["p999_abs_diff"]), "or less"),
        ("max difference", score(values["max_abs_diff"]), "of any pair"),
    ]
    for name, found in (values["recall"] or {}).items():
        exact = share(values["reference_recall"][name])
        says = f"of {values['num_targets']:,} targets found; float32 finds {exact}"
        rows.append((name, share(found), says))
    size = f"{values['num_queries']:,} queries, {values['num_pairs']:,} pairs"
    warning = "; made-up data shows rounding, not how a ranking fares" if values["random"] else ""
    return [
        *rows,
        ("scored", size, values["data"] + warning),
        ("reference", "float32", values["reference"]),
        ("ran on", "", values["measured_on"]),
    ]


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Write what this machine can run, and why not the rest."""
    print_facts(
        "machine",
        {
            "edje": f"{diagnosis.edje} on Python {diagnosis.python}, {diagnosis.system}",
            "cpu": f"{diagnosis.cpu_model} ({diagnosis.num_cpus} usable)",
            "features": " ".join(diagnosis.cpu_features) or "none that matter",
            "memory": f"{diagnosis.memory_bytes / 2**30:.1f} GiB",
            "nvidia driver": diagnosis.nvidia_driver or "none",
            **({} if diagnosis.gpu is None else {"gpu": diagnosis.gpu.describe()}),
        },
    )
    backends = [
        (status.name, status.version or "-", precision, why or "runs")
        for status in diagnosis.backends
        for precision, why in status.precisions.items()
    ]
    _print_table("backends", ("backend", "version", "precision", "here"), backends)
    extras = [
        (extra.name, extra.command if extra.missing else "installed", ", ".join(extra.missing))
        for extra in diagnosis.extras
    ]
    _print_table("optional parts", ("extra", "state or mend", "missing"), extras)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "; ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=any(header), box=None)
    for name in header[:-1]:
        table.add_column(name, no_wrap=True)
    table.add_column(header[-1], overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: ids may hold rich's markup
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(Text(title, style="bold"))
    console.print(table)
    console.print()
