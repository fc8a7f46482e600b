"""stdout and stderr as the command line uses them: any encoding, `--quiet`, readers that leave."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from ...notes import speak

EXIT_NO_READER = 141  # as the shell says of a program that SIGPIPE ended


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
