"""The bytes of a store: `store.json`, a segment's header page, where a record lies."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

from ...arguments import StrPath, path_of
from ...arrays import Array, Float16, Int64
from ...errors import StoreError
from ...files import is_free

FORMAT = "edje-token-store"
FORMAT_VERSION = 2
STORE_JSON = "store.json"
CATALOG = "catalog.sqlite"
SEGMENTS = "segments"
INCOMING = "incoming"
LOCK = "writer.lock"
READERS = "readers.lock"

PAGE_BYTES = 4096
MAGIC = b"EDJETOK\0"
# dtype -> (code in the header page, bytes a value, bytes of a token's scale)
DTYPES = {"float16": (1, 2, 0), "int8": (2, 1, 2)}
# Past this a size is taken for damage: 512 tokens of 4,096 values are 4 MiB.
MAX_RECORD_BYTES = 64 << 20
MAX_FINGERPRINT_BYTES = 128
DEFAULT_SEGMENT_BYTES = 1 << 30
MAX_SEGMENT_BYTES = 1 << 40  # so that a row number always fits 32 bits

# A row handle is segment << ROW_BITS | row.
ROW_BITS = 32
ROW_MASK = (1 << ROW_BITS) - 1
MAX_ID_BYTES = 4096  # so that the ids of a segment never take more bytes than its records

# magic, version, header bytes, dtype, tokens, hidden, group records, record bytes, stride,
# scale bytes, key
HEADER = struct.Struct("<8sIIIIIIQQQQ")
FINGERPRINT_AT = 64
CHECKSUM_AT = PAGE_BYTES - 8

Row = TypeVar("Row", int, Int64)


@dataclass(frozen=True, slots=True)
class StoreLayout:
    """The content of `store.json`: what every record of the store looks like.

    Attributes:
        num_tokens: m, visual tokens an image.
        hidden: H, values a token.
        dtype: `float16`, or `int8` with a float16 scale a token.
        fingerprint_encoder: the encoder that made the tokens (a bundle's `fingerprint_encoder`).
        segment_bytes: a segment file grows no larger than this (one record always fits).
        created_by: package and version.
    """

    num_tokens: int
    hidden: int
    dtype: str
    fingerprint_encoder: str
    segment_bytes: int
    created_by: str
    format_version: int = FORMAT_VERSION

    @property
    def record_bytes(self) -> int:
        """Bytes of one image's tokens."""
        return self.num_tokens * self.hidden * DTYPES[self.dtype][1]

    @property
    def stride(self) -> int:
        """Bytes from one record to the next: `record_bytes` rounded up to whole pages."""
        return pages(self.record_bytes)

    @property
    def scale_bytes(self) -> int:
        """Bytes of one image's scales; 0 for float16."""
        return self.num_tokens * DTYPES[self.dtype][2]

    @property
    def group_records(self) -> int:
        """Records that share a scales page; 0 for float16, which has none."""
        return max(1, PAGE_BYTES // self.scale_bytes) if self.scale_bytes else 0

    @property
    def max_rows(self) -> int:
        """Records a segment takes."""
        room = self.segment_bytes - PAGE_BYTES
        if not self.group_records:
            return max(1, room // self.stride)
        groups, rest = divmod(room, self._group_bytes)
        more = max(0, rest - self._scales_pages) // self.stride
        return max(1, groups * self.group_records + more)

    def offset(self, row: Row) -> Row:
        """Return where record `row` (int or int64 [N]) begins in its segment file."""
        if not self.group_records:
            return PAGE_BYTES + row * self.stride
        group, place = row // self.group_records, row % self.group_records
        return PAGE_BYTES + group * self._group_bytes + self._scales_pages + place * self.stride

    def scales_offset(self, row: Row) -> Row:
        """Return where the scales of record `row` (int or int64 [N]) begin; int8 only."""
        group, place = row // self.group_records, row % self.group_records
        return PAGE_BYTES + group * self._group_bytes + place * self.scale_bytes

    def end(self, num_rows: int) -> int:
        """Return the bytes of a segment file with `num_rows` records and no footer."""
        return self.offset(num_rows - 1) + self.stride if num_rows else PAGE_BYTES

    def buffers(self, count: int) -> tuple[Array, Float16 | None]:
        """Return new memory for `count` records: tokens [N, m, H]; for int8, scales [N, m]."""
        tokens = np.empty((count, self.num_tokens, self.hidden), self.dtype)
        return tokens, np.empty(tokens.shape[:2], np.float16) if self.scale_bytes else None

    @property
    def _scales_pages(self) -> int:
        return pages(self.group_records * self.scale_bytes)

    @property
    def _group_bytes(self) -> int:
        return self._scales_pages + self.group_records * self.stride

    def faults(self) -> list[str]:
        """Return one sentence for every value that no store can have."""
        kinds: dict[str, type] = dict.fromkeys(("num_tokens", "hidden", "segment_bytes"), int)
        kinds |= dict.fromkeys(("dtype", "fingerprint_encoder", "created_by"), str)
        found = [
            f"{name}: got {value!r}, expected {kind.__name__}"
            for name, kind in kinds.items()
            if type(value := getattr(self, name)) is not kind
        ]
        if found:
            return found
        limits = {"num_tokens": MAX_RECORD_BYTES, "hidden": MAX_RECORD_BYTES}
        limits["segment_bytes"] = MAX_SEGMENT_BYTES
        found = [
            f"{name}: got {getattr(self, name)}, expected 1 to {most}"
            for name, most in limits.items()
            if not 1 <= getattr(self, name) <= most
        ]
        if self.dtype not in DTYPES:
            found.append(f"dtype: got {self.dtype!r}, expected one of {list(DTYPES)}")
        elif not found and self.record_bytes > MAX_RECORD_BYTES:
            found.append(f"record: {self.record_bytes} bytes, expected at most {MAX_RECORD_BYTES}")
        text = self.fingerprint_encoder
        if not is_id(text) or len(text.encode()) > MAX_FINGERPRINT_BYTES:
            limit = f"1 to {MAX_FINGERPRINT_BYTES} bytes of UTF-8"
            found.append(f"fingerprint_encoder: got {text!r}, expected {limit}")
        return found

    def to_bytes(self) -> bytes:
        """Return the content of `store.json`."""
        values: dict[str, Any] = {"format": FORMAT, **asdict(self)}
        values |= {"record_bytes": self.record_bytes, "stride_bytes": self.stride}
        values |= {"scale_bytes": self.scale_bytes, "group_records": self.group_records}
        values["checksum"] = xxhash.xxh3_64_hexdigest(json.dumps(values, sort_keys=True).encode())
        return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def read(cls, folder: StrPath) -> StoreLayout:
        """Read `store.json` of the store at `folder`.

        Raises:
            RequestError: `folder` is no path.
            StoreError: no store there, another format version, or one damaged byte.
        """
        path = path_of("folder", folder) / STORE_JSON
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise StoreError(
                f"there is no token store at {folder}: {STORE_JSON} is missing",
                hint=_hint_for(path.parent),
            ) from error
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
        return cls.parse(content, path)

    @classmethod
    def parse(cls, content: bytes, path: Path) -> StoreLayout:
        """Return what the bytes of a `store.json` say; `path` is named in errors.

        Raises:
            StoreError: another format version, or one damaged byte.
        """
        damaged = StoreError(
            f"{path} is damaged: its {len(content)} bytes do not fit their own checksum",
            hint=f"`edje store verify --repair {path.parent}` restores it from the catalog",
        )
        try:
            values = json.loads(content)
        except ValueError as error:
            raise damaged from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise damaged
        names = [field.name for field in fields(cls)]
        version = values.get("format_version")
        # Another version has other fields; its own checksum still tells it from damage.
        if version != FORMAT_VERSION and _checksum_fits(values):
            raise StoreError(
                f"{path} has format version {version!r}, this edje reads {FORMAT_VERSION}",
                hint="open the store with the edje that made it, or index the images again",
            )
        if not set(names) <= values.keys():
            raise damaged
        layout = cls(**{name: values[name] for name in names})
        # Byte for byte, so that no flipped bit goes unseen, not even one in a blank.
        if layout.faults() or layout.to_bytes() != content:
            raise damaged
        return layout


def _hint_for(folder: Path) -> str:
    """Return what to do where a store has no `store.json`."""
    if any((folder / name).exists() for name in (CATALOG, SEGMENTS)):
        return f"`edje store verify --repair {folder}` mends what is left of a store"
    with suppress(OSError):
        if not is_free(folder):
            return f"{folder} holds other files: name a store, or a new or an empty folder for one"
    return f"make one with `edje index ENGINE_OR_BUNDLE IMAGES --store {folder}`"


def _checksum_fits(values: dict[str, Any]) -> bool:
    rest = {name: value for name, value in values.items() if name != "checksum"}
    text = json.dumps(rest, sort_keys=True).encode()
    return bool(values.get("checksum") == xxhash.xxh3_64_hexdigest(text))


def segment_name(segment: int) -> str:
    """Return the file name of a segment."""
    return f"{segment:06d}.tokens"


def header_page(layout: StoreLayout, key: int) -> bytes:
    """Return the first 4,096 bytes of the segment file with this random u64 key."""
    page = bytearray(PAGE_BYTES)
    values = (DTYPES[layout.dtype][0], layout.num_tokens, layout.hidden, layout.group_records)
    sizes = (layout.record_bytes, layout.stride, layout.scale_bytes)
    HEADER.pack_into(page, 0, MAGIC, FORMAT_VERSION, PAGE_BYTES, *values, *sizes, key)
    fingerprint = layout.fingerprint_encoder.encode()
    page[FINGERPRINT_AT : FINGERPRINT_AT + len(fingerprint)] = fingerprint
    page[CHECKSUM_AT:] = _header_checksum(page)
    return bytes(page)


def header_fault(page: bytes, layout: StoreLayout, key: int) -> str | None:
    """Return why `page` is not the header page of this segment, or None when it is."""
    if page == header_page(layout, key):
        return None
    if len(page) < PAGE_BYTES:
        return f"its header page ends after {len(page)} of {PAGE_BYTES} bytes"
    if not is_whole_page(page):
        return "its header page is damaged (checksum)"
    found = HEADER.unpack_from(page)[-1]
    return f"it is another segment's file (its key is {found:016x}, expected {key:016x})"


def is_whole_page(page: bytes) -> bool:
    """Return whether a header page, of whatever segment, fits its own checksum."""
    return page[CHECKSUM_AT:] == _header_checksum(page)


def _header_checksum(page: bytes | bytearray) -> bytes:
    return xxhash.xxh3_64_intdigest(bytes(page[:CHECKSUM_AT])).to_bytes(8, "little")


def id_digest(image_id: str) -> bytes:
    """Return xxh3-128 of the id's UTF-8 bytes: 16 bytes, the high half first."""
    return bytes(xxhash.xxh3_128_digest(image_id.encode()))


def id_fault(image_id: object) -> str | None:
    """Return why this cannot be an id, or None: text of 1 to 4,096 UTF-8 bytes without NUL."""
    if not isinstance(image_id, str):
        return f"is {type(image_id).__name__}, no text"
    try:
        size = len(image_id.encode())
    except UnicodeEncodeError:
        return "has no UTF-8 form (a lone surrogate)"
    if not 1 <= size <= MAX_ID_BYTES:
        return f"has {size} bytes, expected 1 to {MAX_ID_BYTES}"
    return "holds a NUL character" if "\0" in image_id else None


def is_id(image_id: object) -> bool:
    """Return whether this can be an id (see `id_fault`)."""
    return id_fault(image_id) is None


def pages(size: int) -> int:
    """Round bytes up to whole pages."""
    return -(-size // PAGE_BYTES) * PAGE_BYTES
