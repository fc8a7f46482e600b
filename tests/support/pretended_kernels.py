"""The compiled copies, `gather_tokens` and `scatter_tokens`, run on the host by their references.

A pretended GPU's memory is host memory, so the addresses of a launch can be followed. What a
launch does is told by the manifest's entry of the cubin, as on a GPU by the cubin itself.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edje.kernels import references
from edje.kernels.manifest import KernelEntry, read_manifest


@dataclass(frozen=True)
class Copy:
    """One launch: records of bytes, with scales beside them in int8 variants.

    Attributes:
        numbers: int32 or int64 [P]: rows of a gather, places of a scatter.
        source, target: what it reads and writes, as (records, scales or None).
    """

    is_gather: bool
    numbers: np.ndarray
    source: tuple[np.ndarray, np.ndarray | None]
    target: tuple[np.ndarray, np.ndarray | None]

    def run(self) -> None:
        (tokens, scales), (out, out_scales) = self.source, self.target
        if self.is_gather:
            more = {"scales": scales, "out_scales": out_scales}
            references.gather_tokens(tokens, self.numbers, out, **more)
        else:
            more = {"scales": scales, "pool_scales": out_scales}
            references.scatter_tokens(tokens, self.numbers, out, **more)


def entry_of(code: bytes) -> KernelEntry | None:
    """Return the entry of the manifest that this cubin belongs to; None for other code."""
    digest = hashlib.sha256(code).hexdigest()
    entries = read_manifest().kernels.values()
    return next((e for e in entries if any(cubin.sha256 == digest for cubin in e.cubins)), None)


def copy_of(entry: KernelEntry, num_programs: int, arguments: Sequence[np.generic]) -> Copy:
    """Return what a launch with these arguments copies."""
    names = (parameter.name for parameter in entry.parameters)
    given = {name: value.item() for name, value in zip(names, arguments, strict=True)}
    is_gather = entry.symbol == "gather_tokens"
    assert is_gather or entry.symbol == "scatter_tokens", entry.symbol
    parts = -(-given["record_vectors"] // entry.constants["VECTORS"])
    assert num_programs % parts == 0, "a record is not copied whole"
    num_pairs, num_records = num_programs // parts, given["num_records"]
    numbers = "rows" if is_gather else "places"
    types = {parameter.name: parameter.type for parameter in entry.parameters}
    dtype = "int32" if types[numbers] == "*i32" else "int64"
    source_count, target_count = (num_records, num_pairs) if is_gather else (num_pairs, num_records)

    def records(tokens: str, scales: str, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        held = at(given[tokens], (count, given["record_vectors"] * 16), "uint8")
        if scales not in given:
            return held, None
        return held, at(given[scales], (count, given["num_scales"]), "float16")

    return Copy(
        is_gather,
        at(given[numbers], (num_pairs,), dtype),
        records("tokens", "scales", source_count),
        records("out_tokens", "out_scales", target_count),
    )


def at(address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return the memory at an address as an array."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = (ctypes.c_uint8 * num_bytes).from_address(address)
    return np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)
