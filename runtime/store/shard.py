"""One safetensors shard of exported tokens: written as it streams, read with distrust.

Tensors of a shard of n records, in this order in the file:

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

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ...files import Closing
from .format import StoreLayout
from .shard_header import ShardHeader, Tensor, plan_header, refused

HASH_BYTES = 8 << 20  # read at once to hash a tensor

Bytes = npt.NDArray[np.uint8]


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

    def write(self, tokens: npt.NDArray[Any], scales: npt.NDArray[Any] | None = None) -> None:
        """Add the next records: float16 or int8 [N, m, H]; for int8 also scales float16 [N, m].

        Raises:
            OSError: the disk is full.
        """
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
    """Reads the tensors of one shard into the caller's memory; use it as a context manager."""

    def __init__(self, header: ShardHeader):
        self.header = header
        self._descriptor = os.open(header.path, os.O_RDONLY | os.O_CLOEXEC)

    def ids(self) -> list[str]:
        """Return the n ids.

        Raises:
            ShardError: empty ids, ids twice, no UTF-8, or ends that do not fit the bytes.
        """
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

    def read(
        self, first: int, tokens: npt.NDArray[Any], scales: npt.NDArray[Any] | None = None
    ) -> None:
        """Fill tokens [N, m, H] (and scales [N, m]), C-contiguous, from record `first` on.

        Raises:
            ShardError: the file ends early (it was cut since its header was checked).
        """
        wanted = {"visual_tokens": tokens}
        if scales is not None:
            wanted["visual_scales"] = scales
        for name, out in wanted.items():
            place = self.header.tensors[name]
            record_bytes = place.num_bytes // place.shape[0]
            self._fill(place.offset + first * record_bytes, _bytes_of(out))

    def verify(self, hashes: Mapping[str, str]) -> None:
        """Compare xxh3-128 of every tensor's bytes, in hex; reads the whole file.

        Raises:
            ShardError: tensors that differ, or are missing on one side.
        """
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

    def _whole(self, name: str) -> Bytes:
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

    def _fill(self, offset: int, out: Bytes) -> None:
        done = 0
        while done < len(out):  # a call reads 2 GiB at most
            got = os.preadv(self._descriptor, [out[done:].data], offset + done)
            if got == 0:
                missing = len(out) - done
                raise refused(self.header.path, [f"the file ends {missing} bytes early"])
            done += got


def _bytes_of(values: npt.NDArray[Any]) -> Bytes:
    return values.reshape(-1).view(np.uint8)
