"""What each verb writes for people: bundles, rankings, fidelity, diagnoses, trials."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...bundle import BundleManifest
from ...engines.fidelity import NOT_MEASURED, is_measured
from ...engines.registry import BackendStatus, by_reason
from ...errors import named
from ...notes import note, warn
from ...show import escaped, print_facts, print_table
from ..results import RankResult
from .doctor import Diagnosis

MAX_NOTES = 20  # faults that are told one a line


def print_exported(out: str, manifest: BundleManifest, parity: Mapping[str, Any]) -> None:
    """Write what a bundle holds, and how far its graphs are from PyTorch."""
    print_table("exported", ("", ""), [("bundle", out), *_bundle_rows(manifest)])
    rows = [
        (graph, f"{found['max_abs_difference']:.1e}", f"{found['limit']:.1e}", _outputs(found))
        for graph, found in parity.items()
    ]
    runtime = next((found["runtime"] for found in parity.values()), "")
    print_table(
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


def print_ranking(result: RankResult, *, open_s: float, warm_up_s: float) -> None:
    """Write the hits to stdout; what could not be ranked goes to stderr.

    Args:
        open_s, warm_up_s: seconds that were spent before the ranking.
    """
    rows = [(str(n), f"{hit.score:.4f}", escaped(hit.id)) for n, hit in enumerate(result, 1)]
    engine, rescoring, total_ms = result.engine, result.rescoring, result.timings_ms.total
    ran = f"{engine.backend} {engine.precision}"
    if engine.tokens != "float16":
        ran += f" from {engine.tokens} tokens"
    if rescoring is not None:
        precise = rescoring.engine
        ran += f", {rescoring.num_rescored} rescored on {precise.backend} {precise.precision}"
    asked = f" of {result.num_asked:,}" if result.num_asked != result.num_scored else ""
    print_table(
        f"{result.num_scored:,}{asked} images scored in {total_ms:,.1f} ms "
        f"({result.num_scored / total_ms * 1e3:,.0f} pairs/s) on {ran}\n"
        f"before: opened in {open_s:.2f} s, warmed up in {warm_up_s:.2f} s",
        ("rank", "score", "id"),
        rows,
    )
    if result.truncated:
        note("the query was cut to the wordpieces that the model takes")
    if result.missing:
        names = named([fault.id for fault in result.missing])
        note(f"{len(result.missing)} candidates are not in the store: {names}")
    for fault in result.errors[:MAX_NOTES]:
        warn(f"{fault.id!r} was not ranked: {fault.reason}")
    if len(result.errors) > MAX_NOTES:
        warn(f"{len(result.errors) - MAX_NOTES:,} more were not ranked: --json names all")


def print_fidelity(title: str, values: Mapping[str, Any]) -> None:
    """Write a manifest's `fidelity`: what was measured, and what was only emulated beside it."""
    if is_measured(values):
        print_table(title, ("measure", "value", "what it says"), _fidelity_rows(values))
    else:
        note(f"fidelity: {NOT_MEASURED}; `edje verify` measures it where the engine runs")
    if "emulated" in values:
        rows = _fidelity_rows(values["emulated"])
        print_table(f"{title}, emulated", ("measure", "value", "what it says"), rows)


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
        (s.name, s.version or "-", _listed(s.buildable), _listed(s.usable))
        for s in diagnosis.backends
    ]
    print_table("backends", ("backend", "version", "builds", "runs"), backends)
    reasons = [row for status in diagnosis.backends for row in _why_not(status)]
    if reasons:
        print_table("why not", ("", ""), reasons)
    extras = [
        (extra.name, extra.command if extra.missing else "installed", ", ".join(extra.missing))
        for extra in diagnosis.extras
    ]
    print_table("optional parts", ("extra", "state or mend", "missing"), extras)


def _why_not(status: BackendStatus) -> Iterator[tuple[str, str]]:
    """Yield each reason for which a backend does not build or run, with its precisions."""
    verdicts = [*status.runs.items(), *status.builds.items()]
    for reason, precisions in by_reason(verdicts).items():
        yield f"{status.name} {_listed(precisions)}", reason


def _listed(precisions: Sequence[str]) -> str:
    return " ".join(precisions) or "none"
