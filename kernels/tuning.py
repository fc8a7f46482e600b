"""Which tile each product of a layer takes on which GPU: tables that `make tune` measures.

A table is `tuning/<compute capability>.json`. Where no card was measured, it says what its tiles
were chosen by.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ..arguments import read_fields
from ..errors import EngineError

FOLDER = Path(__file__).parent / "tuning"
FORMAT_VERSION = 1
# In `measured_us`: under a product's step, the time of product, residual and norm in one kernel of
# `kernels/cuda`; as a step with one entry, the time of residual and norm alone.
FUSED, NORM = "cuda", "norm"


@dataclass(frozen=True, slots=True)
class Table:
    """The content of a file.

    Attributes:
        conditions: the GPU and what was measured, or why these tiles where nothing was.
        tiles: element type -> step of a layer (`qkv`, `ffn1`, ...) -> name of a tile.
        measured_us: element type -> step -> tile -> microseconds; empty where nothing was.
        fused: element type -> steps whose product takes residual and norm along, in one kernel:
            only where that was measured, right and faster. A file need not have it.
    """

    format_version: int
    conditions: str
    tiles: Mapping[str, Mapping[str, str]]
    measured_us: Mapping[str, Mapping[str, Mapping[str, float]]]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tuning:
    """One architecture's table; `sha256` is of what it chooses, not of what that was chosen by."""

    capability: str
    table: Table
    sha256: str

    @property
    def tiles(self) -> Mapping[str, Mapping[str, str]]:
        """The tiles by element type and step."""
        return self.table.tiles


def tuned_capabilities() -> tuple[str, ...]:
    """Return the compute capabilities that have a table, in ascending order."""
    return tuple(sorted((path.stem for path in FOLDER.glob("*.json")), key=_version))


@cache
def read_tuning(capability: str) -> Tuning:
    """Read the table of a compute capability, as `9.0`.

    Raises:
        EngineError: there is none, or it is damaged.
    """
    path, faults = FOLDER / f"{capability}.json", []
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        faults = [str(error)]
    else:
        table = read_fields(Table, {"fused": {}, **values}, "", faults)
        if table is not None and table.format_version == FORMAT_VERSION:
            faults += _fused_faults(table)
            if not faults:
                chosen = [values["tiles"], table.fused] if table.fused else values["tiles"]
                content = json.dumps(chosen, sort_keys=True).encode()
                return Tuning(capability, table, hashlib.sha256(content).hexdigest())
    known = ", ".join(tuned_capabilities())
    raise EngineError(
        f"no kernels are tuned for compute capability {capability}, only for {known}",
        faults=faults,
    )


def fused_steps(measured_us: Mapping[str, Mapping[str, float]]) -> tuple[str, ...]:
    """Return the steps that are faster with residual and norm in one kernel.

    Args:
        measured_us: step -> tile -> microseconds, of one element type.
    """
    norm_us = measured_us.get(NORM, {}).get(NORM, 0.0)
    return tuple(
        step
        for step, times in measured_us.items()
        if FUSED in times
        and times[FUSED] < norm_us + min(us for tile, us in times.items() if tile != FUSED)
    )


def _fused_faults(table: Table) -> list[str]:
    return [
        f"{element}: {step} with residual and norm in one was not measured to be faster"
        for element, steps in table.fused.items()
        for step in set(steps) - set(fused_steps(table.measured_us.get(element, {})))
    ]


def serving_table(capability: str, known: Iterable[str]) -> str | None:
    """Return which of the compute capabilities `known` serves a GPU of `capability`.

    Its own, else the latest before it of the same major version; None where there is none.
    """
    major, minor = _version(capability)
    fitting = [each for each in map(_version, known) if each[0] == major and each[1] <= minor]
    return "{}.{}".format(*max(fitting)) if fitting else None


def _version(capability: str) -> tuple[int, int]:
    major, _, minor = capability.partition(".")
    return int(major), int(minor)
