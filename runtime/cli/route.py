"""`edje route`: one server in front of several, each with a part of the ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...arguments import Arguments
from ...show import note
from .options import ServerArguments, keys_of, require, verb_of

if TYPE_CHECKING:
    from ..server.host import Host
    from ..server.route.settings import RouteSettings

SHARD_KEY_VARIABLE = "EDJE_SHARD_KEY"


@dataclass(frozen=True)
class RouteArguments(ServerArguments):
    """The words of `edje route`: each field is an option of the command line."""

    shard: Annotated[
        list[str],
        typer.Option(metavar="<str>", help="A shard's servers: URLs with commas. Once a shard."),
    ]
    partial: Annotated[
        bool, typer.Option("--partial", help="Answer without shards that are down.")
    ] = False
    shard_model: Annotated[str, typer.Option(help="The shards' --model-name.")] = "edje"
    shard_key: Annotated[
        Path | None,
        typer.Option(help=f"File with the shards' bearer key; or {SHARD_KEY_VARIABLE}=KEY."),
    ] = None

    def settings(self) -> RouteSettings:
        """Return what the router needs, checked.

        Raises:
            RequestError: options that cannot be meant, all of them.
        """
        from ..server.route.settings import RouteSettings

        given = Arguments("edje route")
        self.check_server(given)
        given.check()
        shard_keys = keys_of(self.shard_key, SHARD_KEY_VARIABLE)
        made = RouteSettings(
            [[url for url in one.split(",") if url] for one in self.shard],
            partial=self.partial,
            shard_model=self.shard_model,
            shard_key=shard_keys[0] if shard_keys else None,
            **self.front_settings(),
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

    def say(host: Host, url: str) -> None:
        assert host.service is not None
        facts = host.service.facts()
        note(
            f"routing {facts['num_images']:,} images on {facts['num_shards']} shards at {url} "
            "(the API at /docs)",
            host.log.say,
        )
        if not host.ready:
            note(f"not ready yet: {host.health.fault}", host.log.say)

    arguments.run(arguments.settings(), say)


route = verb_of(RouteArguments, _route)
