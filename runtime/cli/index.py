"""`edje index`: its options are many, so they live beside the other verbs."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ...arguments import Progress, read_ids
from ...errors import RequestError
from ...show import note, progress_bar
from .options import Json, refuse, require, verb_of, write_facts

if TYPE_CHECKING:
    from ..indexing.flow import OnSkip
    from ..indexing.index import IndexReport

EXIT_SKIPPED = 1
MAX_NOTES = 20  # skipped images that the terminal names; `skipped.jsonl` names all


_ADDRESS = re.compile(r"auto|local|ray://.*|\[?[\w.:-]+\]?:\d+")


class IndexCommand(TyperCommand):
    """Lets `--ray` stand without its ADDRESS, which typer has no words for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse `args`; a bare `--ray` gets an empty address."""
        end = args.index("--") if "--" in args else len(args)
        for place in reversed([at for at, arg in enumerate(args[:end]) if arg == "--ray"]):
            if not _ADDRESS.fullmatch(" ".join(args[place + 1 : place + 2])):
                args = [*args[:place], "--ray=", *args[place + 1 :]]
        return super().parse_args(ctx, args)


@dataclass(frozen=True, slots=True)
class IndexArguments:
    """The words of `edje index`: each field is an argument or an option of the command line."""

    model: Annotated[
        Path, typer.Argument(help="Bundle, or engine with image encoder; bundle for --features.")
    ]
    store: Annotated[
        Path, typer.Option("--store", "--into", help="Token store, made if there is none.")
    ]
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folder, list file of `id<TAB>path` lines, or tars ('{000..099}.tar')."
        ),
    ] = None
    features: Annotated[
        Path | None,
        typer.Option(help="Patch features in place of images: .npy, .safetensors, or a folder."),
    ] = None
    ids: Annotated[
        Path | None, typer.Option(help="Ids of a --features .npy, one a line; default: ids.txt.")
    ] = None
    only: Annotated[
        str | None,
        typer.Option(
            "--only", "--from", help="Index only the ids listed here, one a line; - stdin."
        ),
    ] = None
    dtype: Annotated[
        str | None, typer.Option(help="Of a new store: float16 (default), or int8: half the size.")
    ] = None
    device: Annotated[
        str, typer.Option(help="cpu, cuda, or auto: CUDA where ONNX Runtime runs on it.")
    ] = "auto"
    workers: Annotated[
        int | None, typer.Option(help="Decoder processes; default: the usable cores but one.")
    ] = None
    batch_size: Annotated[int, typer.Option(help="Images a forward.")] = 32
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Spread the work over a Ray cluster: HOST:PORT, auto, local, or as Ray finds it.",
        ),
    ] = None
    num_workers: Annotated[
        int | None, typer.Option(help="With --ray, workers; default: one a machine, or one a GPU.")
    ] = None
    images_per_task: Annotated[
        int | None,
        typer.Option(help="With --ray, images done again if a worker dies; default: 2048."),
    ] = None
    follow_links: Annotated[
        bool,
        typer.Option("--follow-links", help="Go into links to folders too; never round in rings."),
    ] = False
    max_pixels: Annotated[
        int | None,
        typer.Option(help="Skip images of more pixels; 0: no limit; default: Pillow's 89,478,485."),
    ] = None
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE[:FUNCTION]",
            help="Load one that registers image formats in Pillow: pillow_heif.HeifImagePlugin.",
        ),
    ] = None
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if anything was skipped.")
    ] = False
    max_skipped: Annotated[
        int | None, typer.Option(help="Exit with 1 if more than so many were skipped.")
    ] = None
    as_json: Json = False

    def check(self) -> None:
        """Refuse options that contradict each other, and a missing Pillow before anything loads."""
        faults = []
        if bool(self.images) == (self.features is not None):
            faults.append("IMAGES and --features: expected one of them")
        if self.strict and self.max_skipped is not None:
            faults.append("--strict allows no skip and --max-skipped some: give one of them")
        if self.features is not None:
            faults += self._feature_faults()
        elif self.ids is not None:
            faults.append("--ids: it names the rows of --features")
        if self.ray is None:
            given = {"--num-workers": self.num_workers, "--images-per-task": self.images_per_task}
            faults += [f"{name}: it goes with --ray" for name in given if given[name] is not None]
        refuse(faults)
        if self.max_skipped is not None and self.max_skipped < 0:
            raise RequestError(f"--max-skipped is {self.max_skipped}, expected 0 or more")
        if self.features is None:
            require("index", "PIL")

    def _feature_faults(self) -> list[str]:
        faults = []
        if self.workers is not None:
            faults.append("--workers: features need no decoding")
        if self.max_pixels is not None or self.plugin:
            faults.append("--max-pixels and --plugin: features need no decoding")
        if self.ray is not None:
            faults.append("--ray spreads images, not --features: the adapter is fast without")
        return faults

    def run(self, only: set[str] | None, progress: Progress, on_skip: OnSkip) -> IndexReport:
        """Index what was asked for, as it was asked for."""
        from ...engines.image import FeatureEncoder, ImageEncoder
        from ..indexing.index import IndexOptions, index_features, index_images
        from ..indexing.ray import DEFAULT_IMAGES_PER_TASK, RayOptions, index_on_ray

        images, batch_size = self.images or [], self.batch_size
        options = IndexOptions(self.dtype, only, progress, on_skip, self.follow_links)
        if self.ray is not None:
            per_task = self.images_per_task
            per_task = DEFAULT_IMAGES_PER_TASK if per_task is None else per_task
            where = (self.ray or None, self.num_workers, per_task)
            workers = RayOptions(*where, self.device, self.workers, batch_size)
            return index_on_ray(self.model, images, self.store, workers, options)
        how: dict[str, Any] = {f.name: getattr(options, f.name) for f in fields(options)}
        how["batch_size"] = batch_size
        if self.features is not None:
            adapter = FeatureEncoder.open(self.model, device=self.device)
            return index_features(adapter, self.features, self.store, ids=self.ids, **how)
        encoder = ImageEncoder.open(self.model, device=self.device)
        return index_images(encoder, images, self.store, workers=self.workers, **how)


def _index(arguments: IndexArguments) -> None:
    """Turn images, or patch features, into tokens of a store. Run again to continue.

    An id is the path below the folder, the name in the list, or the tar's member. What gives no
    record is listed in STORE/skipped.jsonl, and tried again next time. Exits with 1 if all was
    skipped, or more than --strict or --max-skipped allow; what can be indexed is indexed first.

    \b
    Example:
      edje index bundle photos --store photos.store
      edje index bundle 'shards/{000..099}.tar' --store photos.store
      edje index bundle --features features.npy --ids ids.txt --store photos.store
      edje index bundle photos --into new.store --from ids-to-redo.txt
      edje index bundle photos --store photos.store --ray head:6379
    """
    from ..indexing.images import pillow_set

    arguments.check()
    only = None if arguments.only is None else set(read_ids(arguments.only))
    num_skipped = 0

    def on_skip(_: object) -> None:
        nonlocal num_skipped
        num_skipped += 1

    def text(images_per_s: float) -> str:
        return f"{images_per_s:,.0f} images/s, {num_skipped:,} skipped"

    with (
        pillow_set(arguments.max_pixels, arguments.plugin or []),
        progress_bar("index", text=text) as progress,
    ):
        report = arguments.run(only, progress, on_skip)
    _show(report, arguments)
    _exit_unless_enough(report, arguments.store, 0 if arguments.strict else arguments.max_skipped)


index = verb_of(IndexArguments, _index)


def _show(report: IndexReport, arguments: IndexArguments) -> None:
    """Write what was done; what was skipped or passed by goes to stderr."""
    from ..indexing.flow import SKIPPED

    for image in report.skipped[:MAX_NOTES]:
        note(f"{image.id!r} was skipped: {image.reason}")
    rest = report.num_skipped - min(MAX_NOTES, len(report.skipped))
    if rest > 0:
        note(f"{rest:,} more were skipped: {arguments.store / SKIPPED} names all")
    links = f"{report.num_links:,} links to folders"
    if report.num_links and arguments.follow_links:
        note(f"{links} lead back to one above and were not followed")
    elif report.num_links:
        note(f"{links} were not followed; --follow-links follows them")
    facts = {"store": str(arguments.store), **asdict(report)}
    skipped = facts.pop("skipped")
    if arguments.as_json:
        facts["skipped"] = [image._asdict() for image in skipped]
    write_facts("indexed", facts, arguments.as_json)


def _exit_unless_enough(report: IndexReport, store: Path, allowed: int | None) -> None:
    """Exit with 1 where nothing could be read, or more was skipped than is allowed.

    Only now, when all that can be indexed is: a job that stopped at the first skips too many would
    stop there every night, and the good images behind them would never come in.
    """
    from ..indexing.flow import SKIPPED

    skipped, where = report.num_skipped, f"{store / SKIPPED} says why"
    if skipped and not report.indexed and not report.already_present:
        note(f"nothing could be read, {skipped:,} skipped: {where}")
        raise typer.Exit(EXIT_SKIPPED)
    if allowed is not None and skipped > allowed:
        note(f"{skipped:,} skipped, {allowed:,} allowed; all else is indexed: {where}")
        raise typer.Exit(EXIT_SKIPPED)
