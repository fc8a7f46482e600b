"""Build options that cannot be, or that a backend has not, called as `edje build` spells them."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

from ..errors import EngineError
from .contract import Backend, BuildOptions
from .manifest import option_words

_CAPABILITY = re.compile(r"\d+\.\d")


def raise_option_faults(options: BuildOptions) -> None:
    """Refuse values that no backend can take.

    Raises:
        EngineError: with one sentence for each.
    """
    faults = []
    level, workspace = options.optimization_level, options.workspace_bytes
    if level is not None and not 0 <= level <= 5:
        faults.append(f"--optimization-level: got {level}, expected 0 (fast build) to 5")
    if workspace is not None and workspace < 1:
        faults.append(f"--workspace-mb: got {workspace >> 20}, expected 1 or more")
    faults += [
        f"--compute-capability: got {capability!r}, expected major and minor, as 8.9"
        for capability in options.compute_capabilities
        if not _CAPABILITY.fullmatch(capability)
    ]
    if faults:
        raise EngineError("no engine can be built with these options", faults=faults)


def given_options(options: BuildOptions) -> dict[str, Any]:
    """Return the fields that are not at their default, by name."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: value for name, value in values.items() if value != getattr(_NONE, name)}


def refused_options(backend: Backend, precision: str, options: BuildOptions) -> list[str]:
    """Return the options without which `backend` would build; none where it could not anyway."""
    if backend.why_not_build(precision, _NONE) is not None:
        return []
    return [
        flag(name, value)
        for name, value in given_options(options).items()
        if backend.why_not_build(precision, replace(_NONE, **{name: value})) is not None
    ]


def flag(name: str, value: Any) -> str:
    """Return how `edje build` spells the option `name`."""
    return option_words(name, value)[0]


_NONE = BuildOptions()
