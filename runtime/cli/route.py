"""`edje route`: one server in front of several, each with a part of the ids."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from ...arguments import Arguments, read_ids
from ...show import note
from .options import require, verb_of
from .serve import KEYS_VARIABLE, warn_of_strangers

if TYPE_CHECKING:
    from ..server.answers import Unknown
    from ..server.host import Host
    from ..server.route.settings import RouteSettings

SHARD_KEY_VARIABLE = "EDJE_SHARD_KEY"


@dataclass(frozen=True, slots=True)
class RouteArguments:
    """The words of `edje route`: each field is an option of the command line."""

    shard: Annotated[
        list[str], typer.Option(help="URLs of one shard's servers, with commas. Once a shard.")
    ]
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines ask.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port; 0: any that is free.")] = 8000
    admin_port: Annotated[
        int | None, typer.Option(help="Loopback port of /reload and /state; default: none.")
    ] = None
    partial: Annotated[
        bool, typer.Option("--partial", help="Answer without shards that are down.")
    ] = False
    model_name: Annotated[str, typer.Option(help="What /v1/models tells.")] = "edje"
    shard_model: Annotated[str, typer.Option(help="The shards' --model-name.")] = "edje"
    shard_key: Annotated[
        Path | None,
        typer.Option(help=f"File with the shards' bearer key; or {SHARD_KEY_VARIABLE}=KEY."),
    ] = None
    unknown_ids: Annotated[
        str, typer.Option(help="Ids that no shard has: error (422), lowest (they rank last), skip.")
    ] = "error"
    id_pattern: Annotated[
        str | None, typer.Option(help="Regular expression that finds the id in a document.")
    ] = None
    timeout: Annotated[
        float, typer.Option(help="Seconds that a request may take which names no time itself.")
    ] = 30.0
    max_body_mb: Annotated[float, typer.Option(help="Largest body, in 1e6 bytes.")] = 16.0
    api_keys: Annotated[
        Path | None,
        typer.Option(help=f"File with a bearer key a line; or {KEYS_VARIABLE}=KEY,KEY."),
    ] = None
    max_pairs_per_key: Annotated[
        int | None, typer.Option(help="Pairs of one key in flight; default: no limit.")
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

    def settings(self) -> RouteSettings:
        """Return what the router needs, checked.

        Raises:
            RequestError: options that cannot be meant, all of them.
        """
        from ..server.answers import Unknown
        from ..server.limits import ServiceOptions
        from ..server.route.settings import RouteSettings

        given = Arguments("edje route")
        for name, port in {"--port": self.port, "--admin-port": self.admin_port or 0}.items():
            if not 0 <= port < 1 << 16:
                given.refuse(name, port, "0 to 65535")
        given.choice("--unknown-ids", self.unknown_ids, get_args(Unknown))
        seconds = {"--timeout": self.timeout, "--grace": self.grace, "--drain": self.drain}
        for name, value in seconds.items():
            given.number(name, value, "0 or more seconds")
        given.number("--max-body-mb", self.max_body_mb, "0 or more")
        given.check()
        if self.api_keys is not None:
            keys = read_ids(str(self.api_keys), what="API keys")
        else:
            keys = [key for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key]
        if self.shard_key is not None:
            shard_keys = read_ids(str(self.shard_key), what="API keys")
        else:
            shard_keys = [key for key in [os.environ.get(SHARD_KEY_VARIABLE, "")] if key]
        made = RouteSettings(
            [[url for url in one.split(",") if url] for one in self.shard],
            partial=self.partial,
            shard_model=self.shard_model,
            shard_key=shard_keys[0] if shard_keys else None,
            service=ServiceOptions(
                timeout_s=self.timeout, unknown=cast("Unknown", self.unknown_ids)
            ),
            model=self.model_name,
            max_body_bytes=int(self.max_body_mb * 1e6),
            keys=keys,
            max_pairs_per_key=self.max_pairs_per_key,
            id_pattern=self.id_pattern,
            log_queries=self.log_queries,
        )
        made.check()
        return made


def _route(arguments: RouteArguments) -> None:
    """Serve rankings over several `edje serve`, each of which has a part of the ids.

    Keeps nothing on disk: which ids lie where it asks the shards. Ready when every shard has a
    ready server.

    \b
    Example:
      edje route --shard http://a:8000,http://a2:8000 --shard http://b:8000
    """
    require("serve", "fastapi", "uvicorn", "msgspec", "prometheus_client")
    from ..server.process import serve as run

    settings = arguments.settings()
    warn_of_strangers(arguments.host, settings.keys)

    def say(host: Host, port: int) -> None:
        assert host.service is not None
        facts = host.service.facts()
        note(
            f"routing {facts['num_images']:,} images on {facts['num_shards']} shards at "
            f"http://{arguments.host}:{port} (the API at /docs)"
        )
        if not host.ready:
            note(f"not ready yet: {host.health.fault}")

    run(
        settings,
        address=arguments.host,
        port=arguments.port,
        admin_port=arguments.admin_port,
        grace_s=arguments.grace,
        drain_s=arguments.drain,
        on_ready=say,
    )


route = verb_of(RouteArguments, _route)
