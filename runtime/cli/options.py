"""What several verbs share: options, their checks, stdout and stderr as users leave them."""

from __future__ import annotations

import inspect
import io
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, get_args, get_type_hints

import typer
from typer.core import TyperGroup

from ...arguments import Arguments
from ...errors import EdjeError, RequestError
from ...show import print_facts, print_json, speak

if TYPE_CHECKING:
    from ..residency import Place

Words = TypeVar("Words")

EXIT_NO_READER = 141  # as the shell says of a program that SIGPIPE ended

Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]
Overwrite = Annotated[bool, typer.Option(help="Replace OUT if it exists.")]


@dataclass(frozen=True, kw_only=True)
class OpeningArguments:
    """How an engine is opened; each field is an option of the command line."""

    rescore: Annotated[
        list[Path] | None,
        typer.Option(help="Precise engine: the best become its own. Several: each more precise."),
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
