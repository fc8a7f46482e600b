"""Public names that are imported when they are first asked for: `import edje` costs nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package that hands out names of modules below it.

    Hide it from type checkers (`if not TYPE_CHECKING`): one that sees it takes every misspelt
    name for a public one.

    Args:
        package: its `__name__`.
        homes: each name's module, relative to the package: `{"Reranker": ".runtime.reranker"}`.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    return get
