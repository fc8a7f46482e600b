"""The header of a safetensors shard of tokens: written, and read with distrust.

A file is the u64 length of the header, the header (JSON), the tensors with no gap between them.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

from ...errors import StoreError
from .format import StoreLayout

FORMAT = "edje-visual-tokens"
FORMAT_VERSION = 1
DTYPE_NAMES = {"float16": "F16", "int8": "I8"}
VALUE_BYTES = {"I64": 8, "F16": 2, "I8": 1, "U8": 1}
# A real header takes half a kB. JSON of this size can grow to 30 MB of Python objects, no more.
MAX_HEADER_BYTES = 1 << 20
MAX_DIMS = 8  # so that multiplying them stays quick

_LENGTH = struct.Struct("<Q")


class ShardError(StoreError):
    """A file is no shard of visual tokens, or a damaged one; `faults` says why."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a shard: safetensors' name of its dtype, its shape, its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What the checked header of a shard says; every tensor lies inside the file."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, Tensor]

    @property
    def num_records(self) -> int:
        """n."""
        return self.tensors["visual_tokens"].shape[0]

    @property
    def record_shape(self) -> tuple[int, int]:
        """(m, H)."""
        _, num_tokens, hidden = self.tensors["visual_tokens"].shape
        return num_tokens, hidden

    @property
    def dtype(self) -> str:
        """`float16` or `int8`."""
        names = {name: dtype for dtype, name in DTYPE_NAMES.items()}
        return names[self.tensors["visual_tokens"].dtype]


def read_header(path: Path) -> ShardHeader:
    """Return the header of a shard, checked against the size of the file.

    Raises:
        ShardError: no shard of visual tokens; every fault is named.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = _header_bytes(path, file.read(_LENGTH.size), size)
            content = file.read(header)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    values = _parse(path, content)
    first = _LENGTH.size + header
    metadata = values.pop("__metadata__", {})
    tensors, faults = _tensors(values, first)
    faults = faults or _tiling_faults(tensors, first, size) or _token_faults(tensors)
    if not _is_text_map(metadata):
        faults.append("__metadata__: expected text values only")
    if faults:
        raise refused(path, faults)
    return ShardHeader(path, metadata, tensors)


def plan_header(
    layout: StoreLayout, num_records: int, id_bytes: int
) -> tuple[bytes, dict[str, Tensor]]:
    """Return the bytes of a new shard's header and where every tensor will lie."""
    shape = (num_records, layout.num_tokens, layout.hidden)
    wanted: list[tuple[str, str, tuple[int, ...]]] = [("id_ends", "I64", shape[:1])]
    if layout.dtype == "int8":
        wanted.append(("visual_scales", "F16", shape[:2]))
    wanted.append(("visual_tokens", DTYPE_NAMES[layout.dtype], shape))
    wanted.append(("ids", "U8", (id_bytes,)))
    values: dict[str, Any] = {"__metadata__": _metadata(layout)}
    at, sizes = 0, {}
    for name, dtype, dims in wanted:
        sizes[name] = prod(dims) * VALUE_BYTES[dtype]
        offsets = [at, at + sizes[name]]
        values[name] = {"dtype": dtype, "shape": list(dims), "data_offsets": offsets}
        at = offsets[1]
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned for whoever maps the file
    first = _LENGTH.size + len(text)
    tensors = {
        name: Tensor(dtype, dims, first + values[name]["data_offsets"][0], sizes[name])
        for name, dtype, dims in wanted
    }
    return _LENGTH.pack(len(text)) + text, tensors


def _metadata(layout: StoreLayout) -> dict[str, str]:
    """Return the `__metadata__` of a shard of this store."""
    return {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "fingerprint_encoder": layout.fingerprint_encoder,
        "num_tokens": str(layout.num_tokens),
        "hidden": str(layout.hidden),
        "dtype": layout.dtype,
    }


def _header_bytes(path: Path, content: bytes, size: int) -> int:
    """Return the length of the header, which must lie inside the file."""
    length = _LENGTH.unpack(content)[0] if len(content) == _LENGTH.size else size
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - _LENGTH.size):
        most = f"at most {MAX_HEADER_BYTES} and inside the file of {size} bytes"
        raise refused(path, [f"its header has {length} bytes, expected {most}"])
    return cast(int, length)


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("a name comes twice")
        return values

    try:
        values = json.loads(content, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise refused(path, [f"its header is no JSON object ({error})"]) from error
    if not isinstance(values, dict):
        raise refused(path, ["its header is no JSON object"])
    return values


def _tensors(values: Mapping[str, Any], first: int) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors with offsets in the file, and what is wrong with their entries."""
    found, faults = {}, []
    for name, entry in values.items():
        if not _is_entry(entry):
            faults.append(f"{name[:80]!r}: expected dtype, shape and data_offsets")
            continue
        begin, end = entry["data_offsets"]
        place = Tensor(entry["dtype"], tuple(entry["shape"]), first + begin, end - begin)
        expected = prod(place.shape) * VALUE_BYTES.get(place.dtype, 0)
        if place.dtype in VALUE_BYTES and expected != place.num_bytes:
            faults.append(f"{name[:80]!r}: {place} takes {expected} bytes, got {place.num_bytes}")
        found[name] = place
    return found, faults


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return False
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (isinstance(shape, list) and isinstance(offsets, list)):
        return False
    if len(offsets) != 2 or len(shape) > MAX_DIMS:
        return False
    if not all(type(number) is int and number >= 0 for number in [*shape, *offsets]):
        return False
    return isinstance(entry["dtype"], str) and offsets[0] <= offsets[1]


def _tiling_faults(tensors: Mapping[str, Tensor], first: int, size: int) -> list[str]:
    """Tensors must fill the file from `first` to its end, with no hole and no overlap."""
    at = first
    for name, place in sorted(
        tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)
    ):
        if place.offset != at:
            what = "overlaps the tensor before it" if place.offset < at else "leaves a hole"
            return [f"{name[:80]!r}: {what} (byte {place.offset}, expected {at})"]
        at += place.num_bytes
    return [] if at == size else [f"its tensors end at byte {at}, the file at {size}"]


def _token_faults(tensors: Mapping[str, Tensor]) -> list[str]:
    """Check the tensors that a shard of tokens must have, against one another."""
    tokens = tensors.get("visual_tokens")
    if tokens is None or tokens.dtype not in DTYPE_NAMES.values() or len(tokens.shape) != 3:
        got = "nothing" if tokens is None else str(tokens)
        return [f"visual_tokens: got {got}, expected F16 or I8 [n, m, H]"]
    num_records, num_tokens, _ = tokens.shape
    faults = [] if num_records else ["visual_tokens: holds no record"]
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    if tokens.dtype == "I8":
        expected["visual_scales"] = ("F16", (num_records, num_tokens))
    if "id_ends" in tensors:
        expected["id_ends"] = ("I64", (num_records,))
    for name, (dtype, shape) in expected.items():
        found = tensors.get(name)
        if found is None or (found.dtype, found.shape) != (dtype, shape):
            faults.append(f"{name}: got {found or 'nothing'}, expected {dtype} {list(shape)}")
    ids = tensors.get("ids")
    dims = 1 if "id_ends" in tensors else 2
    usable = ids is not None and ids.dtype == "U8" and len(ids.shape) == dims
    if ids is None or not usable or (dims == 2 and ids.shape[0] != num_records):
        form = "U8 [bytes] beside id_ends I64 [n], or U8 [n, width] padded with zeros"
        faults.append(f"ids: got {ids or 'nothing'}, expected {form}")
    return faults


def _is_text_map(metadata: object) -> bool:
    return isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())


def refused(path: Path, faults: list[str]) -> ShardError:
    """Return the error that says why a shard cannot be used."""
    return ShardError(f"{path} is no whole shard of visual tokens", faults=faults[:20])
