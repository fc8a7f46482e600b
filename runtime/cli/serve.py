"""`edje serve`: its options are many, so they live beside the other verbs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from ...arguments import Arguments, read_ids
from ...show import note, warn
from .options import require, verb_of

if TYPE_CHECKING:
    from ..residency import Place
    from ..server.answers import Unknown
    from ..server.host import Host
    from ..server.settings import Settings

KEYS_VARIABLE = "EDJE_API_KEYS"  # where no process list shows them; separated by commas


@dataclass(frozen=True, slots=True)
class ServeArguments:
    """The words of `edje serve`: each field is an argument or an option of the command line."""

    engine: Annotated[Path, typer.Argument(help="Engine folder, written by `edje build`.")]
    store: Annotated[
        list[Path],
        typer.Option(
            help="Token store, written by `edje index`. Several with --ray: a shard each."
        ),
    ]
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines ask.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port; 0: any that is free.")] = 8000
    admin_port: Annotated[
        int | None, typer.Option(help="Loopback port of /reload and /state; default: none.")
    ] = None
    model_name: Annotated[str, typer.Option(help="What /v1/models tells.")] = "edje"
    unknown_ids: Annotated[
        str, typer.Option(help="Ids that STORE lacks: error (422), lowest (they rank last), skip.")
    ] = "error"
    id_pattern: Annotated[
        str | None, typer.Option(help="Regular expression that finds the id in a document.")
    ] = None
    timeout: Annotated[
        float, typer.Option(help="Seconds that a request may take which names no time itself.")
    ] = 30.0
    max_wait: Annotated[
        float, typer.Option(help="Refuse requests (429) while what waits takes more seconds.")
    ] = 10.0
    max_batch: Annotated[
        int | None, typer.Option(help="Pairs in a batch; default: as the engine was built.")
    ] = None
    max_body_mb: Annotated[float, typer.Option(help="Largest body, in 1e6 bytes.")] = 16.0
    api_keys: Annotated[
        Path | None,
        typer.Option(help=f"File with a bearer key a line; or {KEYS_VARIABLE}=KEY,KEY."),
    ] = None
    max_pairs_per_key: Annotated[
        int | None, typer.Option(help="Pairs of one key in flight; default: no limit.")
    ] = None
    rescore: Annotated[
        list[Path] | None,
        typer.Option(help="Precise engine: the top N becomes its own. Several: each more precise."),
    ] = None
    num_threads: Annotated[int | None, typer.Option(help="CPU threads of the engine.")] = None
    device: Annotated[
        str | None, typer.Option(help="host, cuda_core (:1 for the next GPU) or pycuda.")
    ] = None
    residency: Annotated[
        str | None, typer.Option(help="Read tokens from disk (default), host, device or auto.")
    ] = None
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures, for the page at /; default: none.")
    ] = None
    grace: Annotated[
        float, typer.Option(help="Seconds between SIGTERM and the last new connection.")
    ] = 0.0
    drain: Annotated[
        float, typer.Option(help="Seconds that accepted requests have to finish at the end.")
    ] = 30.0
    log_queries: Annotated[
        bool, typer.Option("--log-queries", help="Put the query's text in the log.")
    ] = False
    ray: Annotated[
        bool, typer.Option("--ray", help="Run on Ray Serve: a deployment for each store.")
    ] = False
    copies: Annotated[int, typer.Option(help="With --ray: replicas of each store.")] = 1

    def settings(self, number: int = 0) -> Settings:
        """Return what the server of the store `number` needs, checked.

        Raises:
            RequestError: options that cannot be meant, all of them.
        """
        from ..residency import Place, ResidencyOptions
        from ..server.answers import Unknown
        from ..server.limits import ServiceOptions
        from ..server.settings import Settings

        given = Arguments("edje serve")
        for name, port in {"--port": self.port, "--admin-port": self.admin_port or 0}.items():
            if not 0 <= port < 1 << 16:
                given.refuse(name, port, "0 to 65535")
        given.choice("--unknown-ids", self.unknown_ids, get_args(Unknown))
        for name, seconds in {
            "--timeout": self.timeout,
            "--max-wait": self.max_wait,
            "--grace": self.grace,
            "--drain": self.drain,
        }.items():
            given.number(name, seconds, "0 or more seconds")
        if self.max_batch is not None:
            given.whole("--max-batch", self.max_batch, "1 or more")
        given.number("--max-body-mb", self.max_body_mb, "0 or more")
        given.whole("--copies", self.copies, "1 or more")
        if not self.ray and (len(self.store) > 1 or self.copies > 1):
            given.faults.append("several stores or copies need --ray; or `edje route` before them")
        if self.residency is not None:
            given.choice("--residency", self.residency, get_args(Place))
        given.check()
        opening = {
            "rescore": self.rescore,
            "num_threads": self.num_threads,
            "device": self.device,
            "residency": ResidencyOptions(cast("Place | None", self.residency)),
        }
        made = Settings(
            self.engine,
            self.store[number],
            opening=opening,
            service=ServiceOptions(
                timeout_s=self.timeout,
                max_wait_s=self.max_wait,
                unknown=cast("Unknown", self.unknown_ids),
                max_batch_pairs=self.max_batch,
            ),
            model=self.model_name,
            max_body_bytes=int(self.max_body_mb * 1e6),
            keys=self._keys(),
            max_pairs_per_key=self.max_pairs_per_key,
            id_pattern=self.id_pattern,
            images=self.images,
            log_queries=self.log_queries,
        )
        made.check()
        return made

    def _keys(self) -> list[str]:
        if self.api_keys is not None:
            return read_ids(str(self.api_keys), what="API keys")
        return [key for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key]


def _serve(arguments: ServeArguments) -> None:
    """Serve rankings over HTTP, in the dialects that rerank clients speak.

    SIGTERM answers what was accepted and ends; SIGHUP opens ENGINE and STORE anew without losing
    a request. Exits with 1 when the engine died.

    \b
    Example:
      edje serve engine --store photos.store --port 8000
    """
    require("serve", "fastapi", "uvicorn", "msgspec", "prometheus_client")
    from ..server.process import serve as run

    settings = arguments.settings()
    warn_of_strangers(arguments.host, settings.keys)
    if arguments.ray:
        require("cluster-serve", "ray", "grpc")  # ray alone is the extra `cluster`
        from ..server.route.ray_serve import run as run_on_ray

        shards = [arguments.settings(number) for number in range(len(arguments.store))]
        run_on_ray(
            shards,
            settings,
            copies=arguments.copies,
            address=arguments.host,
            port=arguments.port,
        )
        return

    def say(host: Host, port: int) -> None:
        assert host.service is not None
        facts = host.service.facts()
        engine = facts["engines"][0]
        with suppress(OSError):  # the disk of its log is full: serve all the same
            note(
                f"serving {facts['num_images']:,} images on {engine['backend']} "
                f"{engine['precision']} at "
                f"http://{arguments.host}:{port} (a page at /, the API at /docs)"
            )

    code = run(
        settings,
        address=arguments.host,
        port=arguments.port,
        admin_port=arguments.admin_port,
        grace_s=arguments.grace,
        drain_s=arguments.drain,
        on_ready=say,
    )
    if code:
        warn("the engine died; the log says of what")
        raise typer.Exit(code)


serve = verb_of(ServeArguments, _serve)


def warn_of_strangers(address: str, keys: Sequence[str]) -> None:
    """Warn where other machines may ask without a key."""
    if not _is_loopback(address) and not keys:
        warn(f"everybody who reaches {address} may ask: --api-keys FILE wants a key")


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
