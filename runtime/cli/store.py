"""`edje store`: the verbs that look after token stores."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...arguments import Arguments, listed, read_ids
from ...errors import RequestError
from ...show import note, print_facts, print_json, progress_bar, warn
from .options import Json, Overwrite, Verbs, as_text, write_facts

if TYPE_CHECKING:
    from ..store.verify import VerifyReport

EXIT_DAMAGED = 1
MAX_SHOWN = 20  # damaged ids and faults told one a line

store_app = typer.Typer(cls=Verbs, help="Look after token stores.", no_args_is_help=True)

Store = Annotated[Path, typer.Argument(help="Token store.")]


@store_app.command()
def stat(store: Store, as_json: Json = False) -> None:
    """Show what a token store holds, which encoder made it, and what it takes on disk.

    \b
    Example:
      edje store stat photos.store
    """
    from ..store import TokenStore

    with TokenStore.open(store) as opened:
        found, stride = opened.stat(), opened.layout.stride
    facts = {**asdict(found), "compact_frees_bytes": found.num_deleted * stride}
    write_facts("token store", facts, as_json)
    if found.faults:
        warn(f"its catalog is damaged: `edje store verify --repair {store}` mends it")


@store_app.command()
def ids(store: Store, as_json: Json = False) -> None:
    """Write the ids of a store, one a line: for `edje index ... --from` and for scripts.

    \b
    Example:
      edje store ids photos.store > ids.txt
    """
    from ..store import TokenStore

    with TokenStore.open(store) as opened:
        found = opened.ids()
    if as_json:
        print_json(found)
    else:
        typer.echo(listed(found).encode(), nl=False)


@store_app.command()
def delete(
    store: Store,
    image_ids: Annotated[list[str] | None, typer.Argument(metavar="ID")] = None,
    source: Annotated[
        str | None, typer.Option("--from", help="File with an id a line, or - for stdin.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Take images out of a store. Their space comes back with `edje store compact`.

    \b
    Example:
      edje store delete photos.store --from gone.txt
    """
    from ..store import TokenStore

    gone = [
        *(as_text(name, "ID") for name in image_ids or []),
        *(read_ids(source) if source else []),
    ]
    if not gone:
        raise RequestError("no ids to delete were given", hint="name them, or a list with --from")
    with TokenStore.open(store, mode="a") as opened:
        opened.delete(list(dict.fromkeys(gone)))
        left = len(opened)
    facts = {"store": str(store), "num_deleted": len(set(gone)), "num_records": left}
    write_facts("deleted", facts, as_json)


@store_app.command()
def compact(
    store: Store,
    max_dead_share: Annotated[
        float, typer.Option(help="Rewrite segments with a larger share of dead records.")
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Give the space of deleted and replaced records back. Readers are not disturbed.

    `freed_bytes` is what the whole folder takes less on disk when the command ends.

    \b
    Example:
      edje store compact photos.store --max-dead-share 0.2
    """
    from ..store import TokenStore
    from ..store.disk import disk_bytes

    before = disk_bytes(store)
    with TokenStore.open(store, mode="a") as opened:
        report = opened.compact(max_dead_share)
    report = replace(report, freed_bytes=before - disk_bytes(store))
    write_facts("compacted", {"store": str(store), **asdict(report)}, as_json)
    if report.waiting_bytes:
        note(
            f"{report.waiting_bytes:,} bytes more come free when the readers that use them have "
            "closed: compact again then"
        )


@store_app.command("export")
def export_shards(
    store: Store,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    shard_mb: Annotated[int, typer.Option(help="Tokens of one shard, in MiB.")] = 1024,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the records of a store into safetensors shards, with hashes in index.json.

    \b
    Example:
      edje store export photos.store --out photos.shards
    """
    from ..store import TokenStore
    from ..store.shards import export_store

    given = Arguments("edje store export")
    given.whole("--shard-mb", shard_mb, "1 or more")
    given.check()
    with TokenStore.open(store) as opened, progress_bar("export") as progress:
        report = export_store(
            opened, out, shard_bytes=shard_mb << 20, overwrite=overwrite, progress=progress
        )
    write_facts("exported", asdict(report), as_json)


@store_app.command("import")
def import_shards(
    store: Annotated[Path, typer.Argument(help="Token store, made if there is none.")],
    shards: Annotated[Path, typer.Argument(help="Folder of safetensors shards, or one shard.")],
    dtype: Annotated[
        str | None, typer.Option(help="Of a new store: as the shards (default), or int8.")
    ] = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="The encoder, for shards that do not name it.")
    ] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Also add records with NaN or infinity.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Append safetensors shards to a store. Ids that it has are left out: run again to continue.

    \b
    Example:
      edje store import photos.store photos.shards
    """
    from ..store.shards import import_store

    with progress_bar("import") as progress:
        report = import_store(
            shards,
            store,
            dtype=dtype,
            fingerprint_encoder=fingerprint,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
    write_facts("imported", asdict(report), as_json)


@store_app.command()
def verify(
    store: Store,
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend what can be, take damaged records out.")
    ] = False,
    bad_ids: Annotated[
        Path | None, typer.Option(help="Write the ids of damaged records here, one a line.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read everything and compare every checksum. Exit with 1 if damage is found and stays.

    After --repair run `edje index` again: it makes exactly the records that were taken out.

    \b
    Example:
      edje store verify photos.store --repair --bad-ids bad.txt
    """
    from ..store.verify import verify_store

    with progress_bar("verify") as progress:
        report = verify_store(store, repair=repair, progress=progress)
    if bad_ids is not None:
        bad_ids.write_text(listed(report.bad), encoding="utf-8")
    if as_json:
        print_json(report.to_json())
    else:
        _show_verified(report)
    if not report.is_clean:
        raise typer.Exit(EXIT_DAMAGED)


def _show_verified(report: VerifyReport) -> None:
    facts = report.to_json()
    names = ("damaged", "faults", "repaired", "leftovers")
    lists = {name: facts.pop(name) for name in names}
    del facts["bad"]
    print_facts("verified", {**facts, **{name: len(lines) for name, lines in lists.items()}})
    for name, lines in lists.items():
        for line in lines[:MAX_SHOWN]:
            warn(f"{name}: {line}")
        if len(lines) > MAX_SHOWN:
            warn(f"{name}: and {len(lines) - MAX_SHOWN} more (all of them with --json)")
