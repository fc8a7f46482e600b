"""`edje demo`: render scenes, export, build, index, retrieve, rerank; a table, a page, a sheet."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch
from rich.table import Table

from .. import __version__
from ..bundle import JOINT_ENCODER, PARITY
from ..engines.builder.build import build_engine
from ..engines.builder.trial import trial_lines
from ..engines.cpu import cpu_features
from ..engines.image import ImageEncoder
from ..engines.manifest import EngineManifest
from ..errors import EdjeError, RequestError
from ..export.export import export_bundle
from ..files import LOST_AND_FOUND, is_free
from ..machine import cpu_model, usable_cores
from ..runtime.indexing.index import index_images
from ..runtime.reranker import Reranker
from ..runtime.store import TokenStore
from ..show import make_screen, print_facts, progress_bar, progress_steps
from . import evaluation as calibration
from . import scenes
from . import tiny_model as weights
from .contact_sheet import draw_contact_sheet
from .evaluation import CUTOFFS, DemoResult, FirstStage, QueryResult
from .page import write_page

NUM_QUERIES = 1024
NUM_CANDIDATES = 50
QUERIES_STEP = 4
EXAMPLE = 38  # the README's first query
MARKER = ".edje-demo"


def run_demo(out: Path, *, num_queries: int = NUM_QUERIES) -> DemoResult:
    """Walk from the shipped checkpoint to reranked images, and write what was seen to `out`.

    Args:
        out: folder for images, bundle, engine, store, `index.html`, `contact-sheet.png` and
            `demo.json`; a former demo there is replaced, anything else is refused.
        num_queries: test queries, a multiple of 4 up to the full set of 1,024; the pool holds as
            many images.

    Raises:
        RequestError: another number of queries.
        EdjeError: `out` holds something else, or a step fails.
    """
    if num_queries not in range(QUERIES_STEP, NUM_QUERIES + 1, QUERIES_STEP):
        raise RequestError(
            f"num_queries is {num_queries}, expected a multiple of {QUERIES_STEP} "
            f"from {QUERIES_STEP} to {NUM_QUERIES}"
        )
    out = _fresh_folder(out)
    result = DemoResult(num_candidates=min(NUM_CANDIDATES, num_queries), num_images=num_queries)
    pool = _render(result, out / "images", num_queries)
    _export(result, out)
    _index(result, out)
    stage = FirstStage(weights.load())
    _build(result, out, stage)
    order = _retrieve(result, out, pool, stage)
    names = list(pool)
    candidates = ([names[i] for i in row] for row in order)
    calibration.write_queries(out / "queries.jsonl", pool, candidates)
    _rerank(result, out, pool, order)
    with result.step("page") as detail:
        write_page(result, out / "images", pool, out / "index.html")
        draw_contact_sheet(result, out / "images", out / "contact-sheet.png")
        detail.append("index.html, contact-sheet.png")
    (out / "demo.json").write_text(json.dumps(result.to_json(), indent=2) + "\n")
    print_table(result, out)
    return result


def _fresh_folder(out: Path) -> Path:
    """Make `out` empty if it is new, empty or a former demo's; the folder itself stays."""
    if not is_free(out) and not (out / MARKER).exists():
        raise EdjeError(
            f"{out} holds files that no demo wrote, expected an empty or a new folder",
            hint="choose another folder: edje demo --out DIR",
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()  # first: the next demo knows a folder that is half emptied
    for entry in out.iterdir():
        if entry.name in (MARKER, LOST_AND_FOUND):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return out


def _render(result: DemoResult, folder: Path, count: int) -> dict[str, str]:
    with result.step("render scenes") as detail, progress_bar("Rendering scenes") as advance:
        captions = scenes.draw_pool(scenes.SEEDS["test"], count, folder, advance)
        detail.append(f"{count:,} pictures of 288 x 288, no caption true of two")
    return captions


def _export(result: DemoResult, out: Path) -> None:
    with result.step("export") as detail, progress_steps("Exporting") as progress:
        checkpoint, language, vision = weights.write_checkpoint(out / "checkpoint")
        export_bundle(checkpoint, language, out / "bundle", vision_model=vision, progress=progress)
        parity = json.loads((out / "bundle" / PARITY).read_text())
        difference = parity[JOINT_ENCODER]["max_abs_difference"]
        detail.append(f"scores of the graph within {difference:.0e} of PyTorch's")


def _build(result: DemoResult, out: Path, stage: FirstStage) -> None:
    """Build the fastest faithful engine, calibrated on drawings of their own."""
    with result.step("build engine") as detail, progress_steps("Building") as progress:
        num_images = min(calibration.NUM_IMAGES, max(64, result.num_images))
        folder = out / "calibration"
        with calibration.samples(out / "bundle", folder, stage, num_images) as samples:
            manifest = build_engine(
                out / "bundle", out / "engine", calibration=samples, progress=progress
            )
        result.engine = f"{manifest.backend} {manifest.precision}"
        result.conditions = _conditions(manifest)
        result.trials = list(manifest.build_options["auto"])
        detail.append(f"{manifest.backend} {manifest.backend_version}, {manifest.precision}")


def _conditions(manifest: EngineManifest) -> dict[str, str]:
    """Return what the figures depend on, for people to compare by."""
    sizes = manifest.bundle.sizes
    return {
        "CPU": f"{cpu_model()}, {usable_cores()} cores, "
        + " ".join(cpu_features(manifest.precision)),
        "engine": f"{manifest.backend} {manifest.backend_version}, {manifest.precision}",
        "scorer": f"{sizes.num_layers} layers, hidden {sizes.hidden}, "
        f"{sizes.num_tokens} tokens an image, float16 store",
        "batches": f"one query and its {NUM_CANDIDATES} candidates a batch",
        "software": f"edje-runtime {__version__}, Python {platform.python_version()}, "
        f"torch {torch.__version__} (export and first stage only)",
    }


def _index(result: DemoResult, out: Path) -> None:
    encoder = ImageEncoder.open(out / "bundle")
    with result.step("index") as detail, progress_bar("Indexing images") as advance:
        report = index_images(encoder, out / "images", out / "scenes.store", progress=advance)
        detail.append(f"{report.indexed:,} images, {report.images_per_s:,.0f} images/s")
    with TokenStore.open(out / "scenes.store") as store:
        result.bytes_per_image = store.layout.record_bytes


def _retrieve(
    result: DemoResult, out: Path, pool: dict[str, str], stage: FirstStage
) -> npt.NDArray[np.int64]:
    """Return every query's candidates by the first stage, best first: int64 [Q, k]."""
    with result.step("first stage") as detail:
        images = [out / "images" / name for name in pool]
        order = stage.candidates(images, list(pool.values()), out / "bundle")
        detail.append(f"dual encoder, top {result.num_candidates} of {len(pool):,}")
    return order[:, : result.num_candidates]


def _rerank(
    result: DemoResult, out: Path, pool: dict[str, str], order: npt.NDArray[np.int64]
) -> None:
    names = list(pool)
    with Reranker.open(out / "engine", store=out / "scenes.store") as reranker:
        reranker.rank(pool[names[0]], names[: result.num_candidates])  # warm-up, not counted
        with result.step("rerank") as detail, progress_bar("Reranking") as advance:
            began = perf_counter()
            for number, (name, caption) in enumerate(pool.items()):
                before = tuple(names[i] for i in order[number])
                hits = reranker.rank(caption, before)
                after = tuple(hit.id for hit in hits)
                result.queries.append(QueryResult(caption, name, before, after))
                advance(number + 1, len(names))
            result.pairs_per_s = order.size / (perf_counter() - began)
            detail.append(f"{order.size:,} pairs, one query at a time")


def print_table(result: DemoResult, out: Path) -> None:
    """Print the demo's one table, what was tried, and where to go on."""
    screen, recalls = make_screen(), result.recalls()
    screen.print(
        f"{len(result.queries):,} queries, {result.num_candidates} candidates each; "
        "R@k: the right image is among the first k"
    )
    table = Table("")
    columns = [f"R@{k}" for k in CUTOFFS if k < result.num_candidates]
    columns.append(f"R@{result.num_candidates}")
    for name in columns:
        table.add_column(name, justify="right")
    for stage, values in recalls.items():
        style = "bold green" if stage == "reranked" else ""
        table.add_row(stage, *(f"{values[name]:.1f} %" for name in columns), style=style)
    screen.print(table)
    screen.print(
        f"{result.pairs_per_s:,.0f} pairs/s with {result.engine}; "
        f"{result.bytes_per_image:,} bytes an image\n"
    )
    print_facts("engines: the fastest that ranks as float32 does", dict(trial_lines(result.trials)))
    print_facts("seconds", {step.name: f"{step.seconds:.1f}" for step in result.steps})
    query = shlex.quote(result.queries[min(EXAMPLE, len(result.queries) - 1)].caption)
    print(f"Look:  {out / 'index.html'}, {out / 'contact-sheet.png'}")
    print(f"Try:   {_command()} rerank {out / 'engine'} --store {out / 'scenes.store'} \\")
    print(f"           --top-k 5 --query {query}")


def _command() -> str:
    """Return how this process could be started again from a shell."""
    if shutil.which("edje"):
        return "edje"
    return f"{shlex.quote(os.path.relpath(sys.executable))} -m edje"
