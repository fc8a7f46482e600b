"""One safetensors shard of exported tokens: written as it streams, read with distrust.

A file is the u64 length of the header, the header (JSON), the tensors with no gap between them.
Those of a shard of n records, in this order:

- `id_ends` I64 [n]: where each id ends in `ids`.
- `visual_scales` F16 [n, m]: for int8 tokens only.
- `visual_tokens` F16 or I8 [n, m, H].
- `ids` U8 [bytes]: the ids' UTF-8, one behind the other (safetensors knows no text).

`__metadata__` says what the tokens are: `format`, `format_version`, `fingerprint_encoder`,
`num_tokens`, `hidden`, `dtype`. The bytes depend on the records only. A shard that somebody else
wrote needs `visual_tokens` (and `visual_scales`), and the ids as above or as U8 [n, width], each
padded with zeros; other tensors are left alone.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ...arrays import Array, UInt8
from ...errors import StoreError
from ...files import Closing
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
            content = file.read(_LENGTH.size)
            (length,) = _LENGTH.unpack(content) if len(content) == _LENGTH.size else (size,)
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - _LENGTH.size):
                most = f"at most {MAX_HEADER_BYTES} and inside the file of {size} bytes"
                raise refused(path, [f"its header has {length} bytes, expected {most}"])
            content = file.read(length)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    values = _parse(path, content)
    first = _LENGTH.size + length
    metadata = values.pop("__metadata__", {})
    tensors, faults = _tensors(values, first)
    faults = faults or _tiling_faults(tensors, first, size) or _token_faults(tensors)
    texts = metadata.values() if isinstance(metadata, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        faults.append("__metadata__: expected text values only")
    if faults:
        raise refused(path, faults)
    return ShardHeader(path, metadata, tensors)


def plan_header(
    layout: StoreLayout, num_records: int, id_bytes: int
) -> tuple[bytes, dict[str, Tensor]]:
    """Return the bytes of a new shard's header and where every tensor will lie."""
    shape = (num_records, layout.num_tokens, layout.hidden)
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {"id_ends": ("I64", shape[:1])}
    if layout.dtype == "int8":
        wanted["visual_scales"] = ("F16", shape[:2])
    wanted["visual_tokens"] = (DTYPE_NAMES[layout.dtype], shape)
    wanted["ids"] = ("U8", (id_bytes,))
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "fingerprint_encoder": layout.fingerprint_encoder,
        "num_tokens": str(layout.num_tokens),
        "hidden": str(layout.hidden),
        "dtype": layout.dtype,
    }
    at, tensors, values = 0, {}, dict[str, Any](__metadata__=metadata)
    for name, (dtype, dims) in wanted.items():
        tensors[name] = Tensor(dtype, dims, at, prod(dims) * VALUE_BYTES[dtype])
        end = at + tensors[name].num_bytes
        values[name] = {"dtype": dtype, "shape": list(dims), "data_offsets": [at, end]}
        at = end
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned for whoever maps the file
    first = _LENGTH.size + len(text)
    placed = {name: replace(each, offset=first + each.offset) for name, each in tensors.items()}
    return _LENGTH.pack(len(text)) + text, placed


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
    in_order = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes))
    for name, place in in_order:
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


def refused(path: Path, faults: list[str]) -> ShardError:
    """Return the error that says why a shard cannot be used."""
    return ShardError(f"{path} is no whole shard of visual tokens", faults=faults[:20])


HASH_BYTES = 8 << 20  # read at once to hash a tensor


class ShardWriter(Closing):
    """Writes one shard, record batch by record batch; use it as a context manager.

    Args:
        path: the file, which must not exist.
        layout: of the store that the records come from.
        ids: the ids of all records that `write` will bring, in order.
    """

    def __init__(self, path: Path, layout: StoreLayout, ids: Sequence[str]):
        self.path = path
        encoded = [image_id.encode() for image_id in ids]
        ends = np.cumsum([len(text) for text in encoded], dtype="<i8")
        text = b"".join(encoded)
        header, self.tensors = plan_header(layout, len(ids), len(text))
        self._next = {name: place.offset for name, place in self.tensors.items()}
        self._hashes = {name: xxhash.xxh3_128() for name in self.tensors}
        self._file = path.open("xb")
        self._file.write(header)
        self._put("id_ends", ends.view(np.uint8).data)
        self._put("ids", memoryview(text))

    def write(self, tokens: Array, scales: Array | None = None) -> None:
        """Add the next records: float16 or int8 [N, m, H]; for int8 also scales float16 [N, m]."""
        if scales is not None:
            self._put("visual_scales", _bytes_of(scales).data)
        self._put("visual_tokens", _bytes_of(tokens).data)

    def hashes(self) -> dict[str, str]:
        """Return xxh3-128 of every tensor's bytes so far, as hex."""
        return {name: state.hexdigest() for name, state in sorted(self._hashes.items())}

    def _put(self, name: str, content: memoryview) -> None:
        self._file.seek(self._next[name])
        self._file.write(content)
        self._next[name] += len(content)
        self._hashes[name].update(content)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ShardReader(Closing):
    """Reads the tensors of one shard into the caller's memory; use it as a context manager.

    Its methods raise a ShardError for what is damaged, a file that ends early among it.
    """

    def __init__(self, header: ShardHeader):
        self.header = header
        self._descriptor = os.open(header.path, os.O_RDONLY | os.O_CLOEXEC)

    def ids(self) -> list[str]:
        """Return the n ids; refuse empty ids, ids twice, no UTF-8, ends that do not fit."""
        try:
            found = [text.decode() for text in self._encoded_ids()]
        except UnicodeDecodeError as error:
            raise refused(self.header.path, [f"ids: no UTF-8 text ({error.reason})"]) from error
        if not all(found):
            raise refused(self.header.path, [f"ids: {found.count('')} are empty"])
        if len(set(found)) < len(found):
            twice = len(found) - len(set(found))
            raise refused(self.header.path, [f"ids: {twice} come more than once"])
        return found

    def read(self, first: int, tokens: Array, scales: Array | None = None) -> None:
        """Fill tokens [N, m, H] (and scales [N, m]), C-contiguous, from record `first` on."""
        wanted = {"visual_tokens": tokens}
        if scales is not None:
            wanted["visual_scales"] = scales
        for name, out in wanted.items():
            place = self.header.tensors[name]
            record_bytes = place.num_bytes // place.shape[0]
            self._fill(place.offset + first * record_bytes, _bytes_of(out))

    def verify(self, hashes: Mapping[str, str]) -> None:
        """Refuse a file whose tensors do not have these xxh3-128 hashes; reads it whole."""
        found = {name: self._hash(place) for name, place in self.header.tensors.items()}
        names = sorted(found.keys() | hashes.keys())
        wrong = [name for name in names if found.get(name) != hashes.get(name)]
        if wrong:
            what = [f"{name}: its bytes do not fit their hash" for name in wrong]
            raise refused(self.header.path, what)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _encoded_ids(self) -> Iterator[bytes]:
        text = self._whole("ids")
        if "id_ends" not in self.header.tensors:
            width = self.header.tensors["ids"].shape[1]
            for row in range(self.header.num_records):
                yield text[row * width : (row + 1) * width].tobytes().rstrip(b"\0")
            return
        ends = [0, *self._whole("id_ends").view("<i8").tolist()]
        if ends[-1] != len(text) or any(first > stop for first, stop in pairwise(ends)):
            raise refused(self.header.path, [f"id_ends: do not divide {len(text)} bytes of ids"])
        for first, stop in pairwise(ends):
            yield text[first:stop].tobytes()

    def _whole(self, name: str) -> UInt8:
        place = self.header.tensors[name]
        out = np.empty(place.num_bytes, np.uint8)
        self._fill(place.offset, out)
        return out

    def _hash(self, place: Tensor) -> str:
        state = xxhash.xxh3_128()
        buffer = np.empty(min(place.num_bytes, HASH_BYTES), np.uint8)
        for start in range(0, place.num_bytes, HASH_BYTES):
            piece = buffer[: min(HASH_BYTES, place.num_bytes - start)]
            self._fill(place.offset + start, piece)
            state.update(piece.data)
        return state.hexdigest()

    def _fill(self, offset: int, out: UInt8) -> None:
        done = 0
        while done < len(out):  # a call reads 2 GiB at most
            got = os.preadv(self._descriptor, [out[done:].data], offset + done)
            if got == 0:
                missing = len(out) - done
                raise refused(self.header.path, [f"the file ends {missing} bytes early"])
            done += got


def _bytes_of(values: Array) -> UInt8:
    return values.reshape(-1).view(np.uint8)
