"""`edje serve`: its options are many, so they live beside the other verbs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...arguments import Arguments
from ...show import note, warn
from .options import OpeningArguments, ServerArguments, require, verb_of

if TYPE_CHECKING:
    from ..server.host import Host
    from ..server.settings import Settings


@dataclass(frozen=True)
class ServeArguments(ServerArguments, OpeningArguments):
    """The words of `edje serve`: each field is an argument or an option of the command line."""

    engine: Annotated[Path, typer.Argument(help="Engine folder, written by `edje build`.")]
    store: Annotated[
        list[Path],
        typer.Option(metavar="<path>", help="Token store. Several with --ray: a shard each."),
    ]
    max_wait: Annotated[
        float, typer.Option(help="Refuse requests (429) while what waits takes more seconds.")
    ] = 10.0
    max_batch: Annotated[
        int | None, typer.Option(help="Pairs in a batch; default: as the engine was built.")
    ] = None
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures, for the page at /; default: none.")
    ] = None
    ray: Annotated[
        bool, typer.Option("--ray", help="Run on Ray Serve: a deployment for each store.")
    ] = False
    copies: Annotated[int, typer.Option(help="With --ray: replicas of each store.")] = 1
    ray_cpus: Annotated[
        float | None,
        typer.Option(help="With --ray: CPUs kept free for a replica; default: --num-threads or 1."),
    ] = None

    def settings(self, number: int = 0) -> Settings:
        """Return what the server of the store `number` needs, checked.

        Raises:
            RequestError: options that cannot be meant, all of them.
        """
        from ..server.settings import Settings

        given = Arguments("edje serve")
        self.check_server(given)
        self.check_opening(given)
        given.number("--max-wait", self.max_wait, "0 or more seconds")
        if self.max_batch is not None:
            given.whole("--max-batch", self.max_batch, "1 or more")
        given.whole("--copies", self.copies, "1 or more")
        self._check_ray(given)
        given.check()
        made = Settings(
            self.engine,
            self.store[number],
            opening=self.opening(),
            images=self.images,
            **self.front_settings(max_wait_s=self.max_wait, max_batch_pairs=self.max_batch),
        )
        made.check()
        return made

    def _check_ray(self, given: Arguments) -> None:
        """Note options that mean nothing with Ray, or nothing without."""
        if self.ray:
            of_ray = {
                "--admin-port": self.admin_port,
                "--grace": self.grace,
                "--port 0": not self.port,
                f"--device {self.device}": self.device not in (None, "host"),
            }
            why = "not with --ray, which decides that itself: see runtime/server/route/README.md"
            given.faults += [f"{name}: {why}" for name, is_given in of_ray.items() if is_given]
        elif len(self.store) > 1 or self.copies > 1:
            given.faults.append("several stores or copies need --ray; or `edje route` before them")
        if self.ray_cpus is None:
            return
        if not self.ray:
            given.faults.append("--ray-cpus: only with --ray")
        given.number("--ray-cpus", self.ray_cpus, "0 or more")
        if self.ray_cpus > 1 and self.ray_cpus % 1:
            given.refuse("--ray-cpus", self.ray_cpus, "a whole number, or a part of one CPU")


def _serve(arguments: ServeArguments) -> None:
    """Serve rankings over HTTP, in the dialects that rerank clients speak.

    SIGTERM answers what was accepted and ends; SIGHUP opens ENGINE and STORE anew without losing
    a request. Exits with 1 when the engine died.

    \b
    Example:
      edje serve engine --store photos.store --port 8000
    """
    require("serve", "fastapi", "uvicorn", "msgspec", "prometheus_client")
    settings = arguments.settings()
    if arguments.ray:
        require("cluster-serve", "ray", "grpc")  # ray alone is the extra `cluster`
        from ..server.route.ray_serve import run as run_on_ray

        arguments.warn_of_strangers(settings.keys)
        shards = [arguments.settings(number) for number in range(len(arguments.store))]
        given, threads = arguments.ray_cpus, arguments.num_threads
        run_on_ray(
            shards,
            settings,
            copies=arguments.copies,
            num_cpus=float(threads or 1) if given is None else given,
            drain_s=arguments.drain,
            address=arguments.host,
            port=arguments.port,
            on_lack=_warn_of_lack,
        )
        return

    def say(host: Host, url: str) -> None:
        assert host.service is not None
        facts = host.service.facts()
        engine = facts["engines"][0]
        note(
            f"serving {facts['num_images']:,} images on {engine['backend']} "
            f"{engine['precision']} at {url} (a page at /, the API at /docs)",
            host.log.say,
        )

    code = arguments.run(settings, say)
    if code:
        raise typer.Exit(code)


serve = verb_of(ServeArguments, _serve)


def _warn_of_lack(asked: float, there: float) -> None:
    warn(
        f"Ray has {there:g} CPUs, the replicas and the ingress ask for {asked:g}: some wait until "
        "nodes come. Give --ray-cpus less, parts of one are allowed"
    )
