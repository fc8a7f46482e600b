"""What several verbs share: options declared once, their checks, and how results are written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from ...errors import EdjeError, RequestError

Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]
Overwrite = Annotated[bool, typer.Option(help="Replace OUT if it exists.")]


def require(extra: str, *modules: str) -> None:
    """Refuse a verb whose optional libraries are not installed; looks without importing them.

    Raises:
        EdjeError: some are missing (all named), with the command that installs them.
    """
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
    """Return an argument that the locale could not decode (`LC_ALL=C`) as the UTF-8 that it is.

    Raises:
        RequestError: it is not UTF-8 either.
    """
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
    from ...show import print_facts, print_json

    if as_json:
        print_json(facts)
    else:
        print_facts(title, facts)
