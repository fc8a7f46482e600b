"""The bytes of a store: `store.json`, the segment header page, where a record lies.

A store folder holds

- `store.json`: immutable; exactly the bytes that `StoreLayout.to_bytes` gives.
- `catalog.sqlite`: which record lies where (see `catalog.py`). The only truth about what exists.
- `segments/NNNNNN.tokens`: one header page of 4,096 bytes, then records, one each `stride` bytes.
- `writer.lock`: locked (`flock`) by the one writer.

All numbers are little-endian. A record is the tokens of one image, C order, padded with zeros up
to a multiple of 4,096 bytes (49,152 bytes need none). Its checksum, kept in the catalog, is xxh3-64
over the unpadded bytes, seeded with xxh3-64 of the id's UTF-8 bytes: so it also finds a record
that stands under a wrong id or in a wrong place.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import xxhash

from ...errors import StoreError

FORMAT = "edje-token-store"
FORMAT_VERSION = 1
STORE_JSON = "store.json"
CATALOG = "catalog.sqlite"
SEGMENTS = "segments"
LOCK = "writer.lock"

PAGE_BYTES = 4096
MAGIC = b"EDJETOK\0"
# dtype -> (code in the header page, bytes a value). int8 keeps its scales in a file of their own.
DTYPES = {"float16": (1, 2)}
# Past this a size is taken for damage: 512 tokens of 4,096 values are 4 MiB.
MAX_RECORD_BYTES = 64 << 20
MAX_FINGERPRINT_BYTES = 128
DEFAULT_SEGMENT_BYTES = 1 << 30
MAX_SEGMENT_BYTES = 1 << 40  # so that a row number always fits 32 bits

# magic, version, header bytes, segment, dtype, tokens, hidden, record bytes, stride, scale bytes
HEADER = struct.Struct("<8sIIIIIIQQQ")
FINGERPRINT_AT = 64
CHECKSUM_AT = PAGE_BYTES - 8


@dataclass(frozen=True, slots=True)
class StoreLayout:
    """The content of `store.json`: what every record of the store looks like.

    Attributes:
        num_tokens: m, visual tokens an image.
        hidden: H, values a token.
        dtype: `float16`.
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
        return -(-self.record_bytes // PAGE_BYTES) * PAGE_BYTES

    @property
    def max_rows(self) -> int:
        """Records a segment takes."""
        return max(1, (self.segment_bytes - PAGE_BYTES) // self.stride)

    def offset(self, row: int) -> int:
        """Return where record `row` begins in its segment file."""
        return PAGE_BYTES + row * self.stride

    def faults(self) -> list[str]:
        """Return one sentence for every value that no store can have."""
        kinds: dict[str, type] = {"num_tokens": int, "hidden": int, "segment_bytes": int}
        kinds |= {"dtype": str, "fingerprint_encoder": str, "created_by": str}
        found = [
            f"{name}: got {value!r}, expected {kind.__name__}"
            for name, kind in kinds.items()
            if type(value := getattr(self, name)) is not kind
        ]
        return found or [*self._size_faults(), *self._text_faults()]

    def _size_faults(self) -> list[str]:
        limits = {"num_tokens": MAX_RECORD_BYTES, "hidden": MAX_RECORD_BYTES}
        limits["segment_bytes"] = MAX_SEGMENT_BYTES
        found = [
            f"{name}: got {getattr(self, name)}, expected 1 to {most}"
            for name, most in limits.items()
            if not 1 <= getattr(self, name) <= most
        ]
        if not found and self.dtype in DTYPES and self.record_bytes > MAX_RECORD_BYTES:
            found.append(f"record: {self.record_bytes} bytes, expected at most {MAX_RECORD_BYTES}")
        return found

    def _text_faults(self) -> list[str]:
        found = []
        if self.dtype not in DTYPES:
            found.append(f"dtype: got {self.dtype!r}, expected one of {list(DTYPES)}")
        text = self.fingerprint_encoder
        if not is_id(text) or len(text.encode()) > MAX_FINGERPRINT_BYTES:
            limit = f"1 to {MAX_FINGERPRINT_BYTES} bytes of UTF-8"
            found.append(f"fingerprint_encoder: got {text!r}, expected {limit}")
        return found

    def to_bytes(self) -> bytes:
        """Return the content of `store.json`."""
        values: dict[str, Any] = {"format": FORMAT, **asdict(self)}
        values |= {"record_bytes": self.record_bytes, "stride_bytes": self.stride}
        values["checksum"] = xxhash.xxh3_64_hexdigest(json.dumps(values, sort_keys=True).encode())
        return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> StoreLayout:
        """Read `store.json` of the store at `folder`.

        Raises:
            StoreError: no store there, another format version, or one damaged byte.
        """
        path = folder / STORE_JSON
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise StoreError(
                f"there is no token store at {folder}: {STORE_JSON} is missing",
                hint=f"make one with `edje index ENGINE_OR_BUNDLE IMAGES --store {folder}`",
            ) from error
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
        return cls._parse(content, path)

    @classmethod
    def _parse(cls, content: bytes, path: Path) -> StoreLayout:
        damaged = StoreError(
            f"{path} is damaged: its {len(content)} bytes do not fit their own checksum",
            hint="restore store.json from a copy; it never changes after the store was made",
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


def _checksum_fits(values: dict[str, Any]) -> bool:
    rest = {name: value for name, value in values.items() if name != "checksum"}
    text = json.dumps(rest, sort_keys=True).encode()
    return bool(values.get("checksum") == xxhash.xxh3_64_hexdigest(text))


def segment_name(segment: int) -> str:
    """Return the file name of a segment."""
    return f"{segment:06d}.tokens"


def header_page(layout: StoreLayout, segment: int) -> bytes:
    """Return the first 4,096 bytes of a segment file.

    Offset 0: magic, u32 version, header bytes, segment, dtype code, num_tokens, hidden; u64
    record bytes, stride, scale bytes (0 for float16). 64: the fingerprint, padded with zeros to
    128 bytes. 4,088: xxh3-64 of all bytes before. Everything else is zero.
    """
    page = bytearray(PAGE_BYTES)
    HEADER.pack_into(
        page,
        0,
        MAGIC,
        FORMAT_VERSION,
        PAGE_BYTES,
        segment,
        DTYPES[layout.dtype][0],
        layout.num_tokens,
        layout.hidden,
        layout.record_bytes,
        layout.stride,
        0,
    )
    fingerprint = layout.fingerprint_encoder.encode()
    page[FINGERPRINT_AT : FINGERPRINT_AT + len(fingerprint)] = fingerprint
    page[CHECKSUM_AT:] = _header_checksum(page)
    return bytes(page)


def header_fault(page: bytes, layout: StoreLayout, segment: int) -> str | None:
    """Return why `page` is not the header page of this segment, or None when it is."""
    if page == header_page(layout, segment):
        return None
    if len(page) < PAGE_BYTES:
        return f"its header page ends after {len(page)} of {PAGE_BYTES} bytes"
    if page[CHECKSUM_AT:] != _header_checksum(page):
        return "its header page is damaged (checksum)"
    number = HEADER.unpack_from(page)[3]
    return f"it belongs to another store or place (its header says segment {number})"


def _header_checksum(page: bytes | bytearray) -> bytes:
    return xxhash.xxh3_64_intdigest(bytes(page[:CHECKSUM_AT])).to_bytes(8, "little")


def id_hash(image_id: str) -> int:
    """Return xxh3-64 of the id's UTF-8 bytes: the seed of its record's checksum."""
    return int(xxhash.xxh3_64_intdigest(image_id.encode()))


def is_id(image_id: object) -> bool:
    """Return whether this is text, not empty, with a UTF-8 form (a lone surrogate has none)."""
    if not isinstance(image_id, str) or not image_id:
        return False
    try:
        image_id.encode()
    except UnicodeEncodeError:
        return False
    return True
