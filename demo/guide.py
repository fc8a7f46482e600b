"""`edje demo`: render scenes, export, build, index, retrieve, rerank; a table, a page, a sheet."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..engines.backends import usable_precisions
from ..engines.build import build_engine
from ..errors import EdjeError
from ..export.export import export_bundle
from ..runtime.index import index_images
from ..runtime.reranker import Reranker
from . import scenes, weights
from .contact_sheet import draw_contact_sheet
from .evaluation import DemoResult, QueryResult
from .first_stage import FirstStage
from .page import write_page

NUM_QUERIES = 1024
NUM_CANDIDATES = 50
MARKER = ".edje-demo"

Advance = Callable[[int, int], None]


def run_demo(
    out: Path, *, num_queries: int = NUM_QUERIES, console: Console | None = None
) -> DemoResult:
    """Walk from the shipped checkpoint to reranked images, and write what was seen to `out`.

    Args:
        out: folder for images, bundle, engine, store, `index.html`, `contact-sheet.png` and
            `demo.json`; a former demo there is replaced, anything else is refused.
        num_queries: test queries, a multiple of 4; the pool holds as many images.
        console: where progress and the table go; None means standard error.

    Raises:
        EdjeError: `out` holds something else, or a step fails.
    """
    console = console or Console(stderr=True)
    out = _fresh_folder(out)
    result = DemoResult(num_candidates=min(NUM_CANDIDATES, num_queries), num_images=num_queries)
    show = _Progress(console)
    pool = _render(result, out / "images", num_queries, show)
    _export_and_build(result, out, show)
    _index(result, out, show)
    order = _retrieve(result, out, pool)
    _rerank(result, out, pool, order, show)
    with result.step("page") as detail:
        write_page(result, out / "images", pool, out / "index.html")
        draw_contact_sheet(result, out / "images", out / "contact-sheet.png")
        detail.append("index.html, contact-sheet.png")
    (out / "demo.json").write_text(json.dumps(result.to_json(), indent=2) + "\n")
    return result


def _fresh_folder(out: Path) -> Path:
    """Make `out` empty if it is new, empty or a former demo's."""
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise EdjeError(
            f"{out} holds files that no demo wrote, expected an empty or a new folder",
            hint="choose another folder: edje demo --out DIR",
        )
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).touch()
    return out


class _Progress:
    """One progress bar a long step, on the console."""

    def __init__(self, console: Console):
        self._console = console

    @contextmanager
    def bar(self, title: str) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(title, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)


def _render(result: DemoResult, folder: Path, count: int, show: _Progress) -> dict[str, str]:
    """Write the test pool's pictures; return the caption of each file, in query order."""
    folder.mkdir()
    groups = scenes.groups(scenes.SEEDS["test"])
    pool = itertools.islice(itertools.chain.from_iterable(groups), count)
    captions = {}
    with result.step("render scenes") as detail, show.bar("Rendering scenes") as advance:
        for number, scene in enumerate(pool):
            name = f"scene-{number:04}.png"
            scenes.render(scene).save(folder / name)
            captions[name] = scene.caption
            advance(number + 1, count)
        detail.append(f"{count:,} pictures of 288 x 288, no caption true of two")
    return captions


def _export_and_build(result: DemoResult, out: Path, show: _Progress) -> None:
    with result.step("export") as detail, show.bar("Exporting the checkpoint"):
        paths = weights.write_checkpoint(out / "checkpoint")
        export_bundle(
            paths.checkpoint, paths.language_model, out / "bundle", vision_model=paths.vision_model
        )
        parity = json.loads((out / "bundle" / "parity.json").read_text())
        detail.append(f"PyTorch to ONNX, largest difference {_worst(parity):.1e}")
    with result.step("build engine") as detail, show.bar("Building the engine"):
        backend, precision = _choose_engine()
        manifest = build_engine(
            out / "bundle", out / "engine", backend=backend, precision=precision
        )
        result.engine = f"{manifest.backend} {manifest.precision}"
        detail.append(f"{manifest.backend} {manifest.backend_version}, {manifest.precision}")


def _worst(parity: object) -> float:
    """Return the largest number named `max_abs_difference` anywhere in `parity.json`."""
    if isinstance(parity, dict):
        own = parity.get("max_abs_difference", 0.0)
        return max([float(own), *(_worst(value) for value in parity.values())])
    return 0.0


def _choose_engine() -> tuple[str, str]:
    """Return the preferred CPU backend that this machine has: OpenVINO, else ONNX Runtime."""
    for backend in ("openvino", "onnxruntime"):
        if "fp32" in usable_precisions(backend):
            return backend, "fp32"
    raise EdjeError("no CPU backend is installed", hint="pip install 'edje-runtime[cpu]'")


def _index(result: DemoResult, out: Path, show: _Progress) -> None:
    with result.step("index") as detail, show.bar("Indexing images") as advance:
        report = index_images(
            out / "bundle", out / "images", out / "scenes.store", progress=advance
        )
        detail.append(f"{report.indexed:,} images, {report.images_per_s:,.0f} images/s")


def _retrieve(result: DemoResult, out: Path, pool: dict[str, str]) -> npt.NDArray[np.int64]:
    """Candidates of every query by the first stage, best first: int64 [Q, k]."""
    from ..bundle import BundleManifest

    spec = BundleManifest.read(out / "bundle").image
    if spec is None:
        raise EdjeError("the demo's bundle has no image encoder, expected one")
    with result.step("first stage") as detail:
        stage = FirstStage(weights.load())
        images = stage.embed_images([out / "images" / name for name in pool], spec)
        texts = stage.embed_captions(list(pool.values()))
        order = np.argsort(-(texts @ images.T), axis=1, kind="stable")
        detail.append(f"dual encoder, top {result.num_candidates} of {len(pool):,}")
    return order[:, : result.num_candidates]


def _rerank(
    result: DemoResult,
    out: Path,
    pool: dict[str, str],
    order: npt.NDArray[np.int64],
    show: _Progress,
) -> None:
    names = list(pool)
    with Reranker.open(out / "engine", store=out / "scenes.store") as reranker:
        reranker.rank(pool[names[0]], names[: result.num_candidates])  # warm-up, not counted
        with result.step("rerank") as detail, show.bar("Reranking") as advance:
            began = perf_counter()
            for number, (name, caption) in enumerate(pool.items()):
                before = tuple(names[i] for i in order[number])
                hits = reranker.rank(caption, before)
                after = tuple(hit.id for hit in hits)
                result.queries.append(QueryResult(caption, name, before, after))
                advance(number + 1, len(names))
            result.pairs_per_s = order.size / (perf_counter() - began)
            detail.append(f"{order.size:,} pairs, one query at a time")


def print_table(result: DemoResult, out: Path, console: Console) -> None:
    """Print the demo's one table, and where the page and the sheet lie."""
    recalls = result.recalls()
    table = Table(
        title=f"{len(result.queries):,} queries, {result.num_candidates} candidates each",
        title_justify="left",
    )
    table.add_column("")
    columns = ["R@1", "R@5", "R@10", f"R@{result.num_candidates}"]
    for name in columns:
        table.add_column(name, justify="right")
    for stage, values in recalls.items():
        style = "bold green" if stage == "reranked" else ""
        table.add_row(stage, *(f"{values[name]:.1f} %" for name in columns), style=style)
    console.print(table)
    console.print(
        f"{result.pairs_per_s:,.0f} pairs/s with {result.engine}; "
        f"{result.bytes_per_image:,} bytes an image"
    )
    steps = ", ".join(f"{step.name} {step.seconds:.1f} s" for step in result.steps)
    console.print(f"Steps: {steps}", style="dim")
    console.print(f"Page:  {out / 'index.html'}\nSheet: {out / 'contact-sheet.png'}")
