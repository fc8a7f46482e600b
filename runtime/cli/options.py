"""What several verbs share: options, their checks, stdout and stderr as users leave them."""

from __future__ import annotations

import inspect
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, get_args, get_type_hints

import typer
from typer.core import TyperGroup

from ...arguments import Arguments, read_ids
from ...errors import EdjeError, RequestError
from ...show import print_facts, print_json, speak, warn

if TYPE_CHECKING:
    from ..residency import Place
    from ..server.answers import Unknown
    from ..server.host import Host
    from ..server.settings import FrontSettings

Words = TypeVar("Words")

KEYS_VARIABLE = "EDJE_API_KEYS"  # where no process list shows them; separated by commas
EXIT_NO_READER = 141  # as the shell says of a program that SIGPIPE ended

Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]
Overwrite = Annotated[bool, typer.Option(help="Replace OUT if it exists.")]


@dataclass(frozen=True, kw_only=True)
class OpeningArguments:
    """How an engine is opened; each field is an option of the command line."""

    rescore: Annotated[
        list[Path] | None,
        typer.Option(metavar="<path>", help="Engine that scores the best again; several: in turn."),
    ] = None
    num_threads: Annotated[int | None, typer.Option(help="CPU threads of the engine.")] = None
    device: Annotated[
        str | None, typer.Option(help="host, cuda_core (:1 for the next GPU) or pycuda.")
    ] = None
    residency: Annotated[
        str | None, typer.Option(help="Read tokens from disk (default), host, device or auto.")
    ] = None

    def check_opening(self, given: Arguments) -> None:
        """Note what cannot be meant, in the words of the command line."""
        from ..residency import Place

        if self.num_threads is not None:
            given.whole("--num-threads", self.num_threads, "1 or more")
        if self.residency is not None:
            given.choice("--residency", self.residency, get_args(Place))

    def opening(self, max_bytes: int | None = None) -> dict[str, Any]:
        """Return what `Reranker.open` takes.

        Args:
            max_bytes: device memory for tokens; None: most of it.
        """
        from ..residency import ResidencyOptions

        place = cast("Place | None", self.residency)
        return {
            "rescore": self.rescore,
            "num_threads": self.num_threads,
            "device": self.device,
            "residency": ResidencyOptions(place, max_bytes=max_bytes),
        }


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


def verb_of(words: Callable[..., Words], run: Callable[[Words], None]) -> Callable[..., None]:
    """Return the function that typer makes a verb of: one parameter a field of `words`.

    Args:
        words: a dataclass; annotations and defaults of its fields are those of the options.
        run: what the verb does; its name (without `_`) and docstring are the verb's.
    """

    def verb(**values: Any) -> None:
        run(words(**values))

    hints = get_type_hints(words, include_extras=True)
    parameters = inspect.signature(words).parameters.values()
    verb.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(annotation=hints[p.name], kind=p.KEYWORD_ONLY) for p in parameters]
    )
    verb.__annotations__ = {**hints, "return": None}
    verb.__name__ = run.__name__.strip("_")
    verb.__doc__ = run.__doc__
    return verb


def require(extra: str, *modules: str) -> None:
    """Refuse a verb whose optional libraries are not installed, without importing them."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise EdjeError(
            f"this verb needs {', '.join(missing)}, not installed here",
            hint=f"pip install 'edje-runtime[{extra}]'",
        )


def refuse(faults: list[str]) -> None:
    """Raise one RequestError that holds all faults of the options; return where there are none."""
    if faults:
        raise RequestError("these options do not go together", faults=faults)


def as_text(argument: str, option: str) -> str:
    """Return an argument that the locale could not decode (`LC_ALL=C`) as the UTF-8 that it is."""
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError:
        try:
            return os.fsencode(argument).decode("utf-8")
        except UnicodeError as error:
            raise RequestError(f"{option} is {argument!r}, which is not UTF-8 text") from error
    return argument


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


def write_facts(title: str, facts: Mapping[str, Any], as_json: bool) -> None:
    """Write name/value pairs to stdout, for people or as JSON."""
    if as_json:
        print_json(facts)
    else:
        print_facts(title, facts)


class Verbs(TyperGroup):
    """Verbs that know the root's `--quiet`, and end without a word when nobody reads on."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a verb, which takes `--quiet` as the root does."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            shared = [p for p in ctx.find_root().command.params if p.name == "quiet"]
            command.params += [option for option in shared if option not in command.params]
        return command

    def invoke(self, ctx: Any) -> Any:
        """Run a verb."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            _write_nowhere()
            raise typer.Exit(EXIT_NO_READER) from error


def start_output() -> None:
    """Let both streams take any text: what their encoding lacks becomes an escape (`\\xe9`)."""
    speak()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller: `>&-`
            nowhere = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, os.fdopen(nowhere, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            for method in ("write", "writelines", "flush"):
                if method not in vars(stream):
                    setattr(stream, method, _naming(name, getattr(stream, method)))


def _naming(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Let what a stream raises say which stream it was, as a file's errors do."""

    def named(*args: Any) -> Any:
        try:
            return call(*args)
        except OSError as error:
            raise OSError(error.errno, error.strerror, name) from error

    return named


def finish_output() -> None:
    """Write out what stdout still holds; a reader that left ends the process with its code."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _write_nowhere()
        if isinstance(error, BrokenPipeError):
            raise SystemExit(EXIT_NO_READER) from error
        raise


def _write_nowhere() -> None:
    """Send what is buffered to /dev/null: Python would complain when it cannot flush at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
