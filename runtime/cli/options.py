"""What several verbs share: options declared once, their checks, and how results are written."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from ...errors import EdjeError, RequestError

Words = TypeVar("Words")

Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]
Overwrite = Annotated[bool, typer.Option(help="Replace OUT if it exists.")]


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
