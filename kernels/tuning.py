"""Which tile each product of a layer takes on which GPU: tables that `make tune` measures.

A table is `tuning/<compute capability>.json`. Where no card was measured, it says what its tiles
were chosen by.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..arguments import read_fields
from ..errors import EngineError

FOLDER = Path(__file__).parent / "tuning"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Table:
    """The content of a file.

    Attributes:
        conditions: the GPU and what was measured, or why these tiles where nothing was.
        tiles: element type -> step of a layer (`qkv`, `ffn1`, ...) -> name of a tile.
        measured_us: element type -> step -> tile -> microseconds; empty where nothing was.
    """

    format_version: int
    conditions: str
    tiles: Mapping[str, Mapping[str, str]]
    measured_us: Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True, slots=True)
class Tuning:
    """One architecture's table; `sha256` is of its tiles, not of what they were chosen by."""

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
        table = read_fields(Table, values, "", faults)
        if table is not None and table.format_version == FORMAT_VERSION:
            content = json.dumps(values["tiles"], sort_keys=True).encode()
            return Tuning(capability, table, hashlib.sha256(content).hexdigest())
    known = ", ".join(tuned_capabilities())
    raise EngineError(
        f"no kernels are tuned for compute capability {capability}, only for {known}",
        faults=faults,
    )


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
