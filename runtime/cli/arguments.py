"""A verb of the command line whose many words are the fields of one dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

Words = TypeVar("Words")


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
