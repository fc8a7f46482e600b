"""How a backend builds: options that some backends know, and which of them one refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from ..arguments import take_once
from ..errors import EngineError
from .manifest import option_words

_CAPABILITY = re.compile(r"\d+\.\d")


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How a backend builds. Those that a backend does not know it refuses, by name.

    Attributes:
        workspace_bytes: most device memory that a kernel may take while building; None is the
            library's choice.
        optimization_level: 0 (fast build) to 5 (fast engine); None is the library's choice.
        compute_capabilities: GPUs to build for, as `8.9`; none: every one the library knows.
        hardware_compatible: also run on other GPUs of the same or a later generation.
        version_compatible: also run with later versions of the library.
        report: keep the layers' names, kernels and precisions, and write them into the folder.
    """

    workspace_bytes: int | None = None
    optimization_level: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    hardware_compatible: bool = False
    version_compatible: bool = False
    report: bool = False

    def __post_init__(self) -> None:
        take_once(self, "compute_capabilities")


_NONE = BuildOptions()


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


def refused_options(
    why_not_build: Callable[[BuildOptions], str | None], options: BuildOptions
) -> list[str]:
    """Return the options without which a backend would build; none where it could not anyway.

    Args:
        why_not_build: why that backend cannot build with some options, None where it can.
    """
    if why_not_build(_NONE) is not None:
        return []
    return [
        flag(name, value)
        for name, value in given_options(options).items()
        if why_not_build(replace(_NONE, **{name: value})) is not None
    ]


def flag(name: str, value: Any) -> str:
    """Return how `edje build` spells the option `name`."""
    return option_words(name, value)[0]
