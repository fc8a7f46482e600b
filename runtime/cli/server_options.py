"""What `edje serve` and `edje route` share: how a server speaks HTTP, and how its process runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from ...arguments import Arguments, read_ids
from ...show import warn

if TYPE_CHECKING:
    from ..server.answers import Unknown
    from ..server.host import Host
    from ..server.settings import FrontSettings

KEYS_VARIABLE = "EDJE_API_KEYS"  # where no process list shows them; separated by commas


@dataclass(frozen=True, kw_only=True)
class ServerArguments:
    """Options of every verb that serves; each field is one of the command line."""

    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines ask.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port; 0: any that is free.")] = 8000
    admin_port: Annotated[
        int | None, typer.Option(help="Loopback port of /reload and /state; default: none.")
    ] = None
    model_name: Annotated[str, typer.Option(help="What /v1/models tells.")] = "edje"
    unknown_ids: Annotated[
        str,
        typer.Option(help="Ids that are not stored: error (422), lowest (they rank last), skip."),
    ] = "error"
    id_pattern: Annotated[
        str | None, typer.Option(help="Regular expression that finds the id in a document.")
    ] = None
    timeout: Annotated[
        float, typer.Option(help="Seconds that a request may take which names no time itself.")
    ] = 30.0
    max_body_mb: Annotated[float, typer.Option(help="Largest body, in 1e6 bytes.")] = 16.0
    max_bodies_mb: Annotated[
        float | None,
        typer.Option(help="All bodies at a time; more are refused (429). Default: 16 largest."),
    ] = None
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

    def check_server(self, given: Arguments) -> None:
        """Note what cannot be meant, in the words of the command line."""
        from ..server.answers import Unknown

        for name, port in {"--port": self.port, "--admin-port": self.admin_port or 0}.items():
            if not 0 <= port < 1 << 16:
                given.refuse(name, port, "0 to 65535")
        given.choice("--unknown-ids", self.unknown_ids, get_args(Unknown))
        seconds = {"--timeout": self.timeout, "--grace": self.grace, "--drain": self.drain}
        for name, value in seconds.items():
            given.number(name, value, "0 or more seconds")
        given.number("--max-body-mb", self.max_body_mb, "0 or more")
        if self.max_bodies_mb is not None:
            given.number("--max-bodies-mb", self.max_bodies_mb, "--max-body-mb or more")

    def front_settings(self, **service_options: Any) -> dict[str, Any]:
        """Return what `FrontSettings` takes.

        Args:
            service_options: what else `ServiceOptions` takes.

        Raises:
            RequestError: the file of keys cannot be read.
        """
        from ..server.limits import ServiceOptions

        return {
            "service": ServiceOptions(
                timeout_s=self.timeout,
                unknown=cast("Unknown", self.unknown_ids),
                **service_options,
            ),
            "model": self.model_name,
            "max_body_bytes": int(self.max_body_mb * 1e6),
            "max_bodies_bytes": (
                None if self.max_bodies_mb is None else int(self.max_bodies_mb * 1e6)
            ),
            "keys": keys_of(self.api_keys, KEYS_VARIABLE),
            "max_pairs_per_key": self.max_pairs_per_key,
            "id_pattern": self.id_pattern,
            "log_queries": self.log_queries,
        }

    def run(self, settings: FrontSettings, on_ready: Callable[[Host, str], None]) -> int:
        """Serve until a signal ends it, or the engine dies; return the exit code.

        Args:
            on_ready: called with the host and the server's URL.
        """
        from ..server.process import serve

        self.warn_of_strangers(settings.keys)
        return serve(
            settings,
            address=self.host,
            port=self.port,
            admin_port=self.admin_port,
            grace_s=self.grace,
            drain_s=self.drain,
            on_ready=lambda host, port: on_ready(host, f"http://{self.host}:{port}"),
        )

    def warn_of_strangers(self, keys: Sequence[str]) -> None:
        """Warn where other machines may ask without a key."""
        if not _is_loopback(self.host) and not keys:
            warn(f"everybody who reaches {self.host} may ask: --api-keys FILE wants a key")


def keys_of(file: Path | None, variable: str) -> list[str]:
    """Return the bearer keys of a file, or of a variable of the environment.

    Raises:
        RequestError: the file cannot be read.
    """
    if file is not None:
        return read_ids(str(file), what="API keys")
    return [key for key in os.environ.get(variable, "").split(",") if key]


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
