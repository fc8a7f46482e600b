"""Histories of a token store: operations, the dict they lead to, and what a store really holds."""

from __future__ import annotations

import json
import os
import random
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from edje.runtime.store import SegmentWriter, TokenStore
from edje.runtime.store.format import StoreLayout
from edje.runtime.store.verify import VerifyReport, verify_store
from edje.tokens import quantize_tokens

FINGERPRINT = "sha256:tower"
# For tests that do not ask what a disk keeps: memory, where there is such a folder.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
Model = dict[str, int]  # id -> version
KINDS = ("append", "replace", "delete", "compact", "commit")


@dataclass(frozen=True)
class Sizes:
    """The shape of a store's records; the defaults make records of three pages."""

    num_tokens: int = 64
    hidden: int = 96
    dtype: str = "float16"
    segment_bytes: int = 4096 * 40

    def create(self, path: Path) -> TokenStore:
        return TokenStore.create(
            path,
            num_tokens=self.num_tokens,
            hidden=self.hidden,
            dtype=self.dtype,
            segment_bytes=self.segment_bytes,
            fingerprint_encoder=FINGERPRINT,
        )


@dataclass(frozen=True)
class Operation:
    """One call of a writer. `records` are (id, version); a version names the tokens' values."""

    kind: str
    records: tuple[tuple[str, int], ...] = ()

    @property
    def ids(self) -> list[str]:
        return [image_id for image_id, _ in self.records]

    def to_json(self) -> str:
        return json.dumps([self.kind, self.records])

    @classmethod
    def from_json(cls, text: str) -> Operation:
        kind, records = json.loads(text)
        return cls(kind, tuple((image_id, version) for image_id, version in records))

    def after(self, model: Mapping[str, int]) -> dict[str, int]:
        """Return what a store that held `model` (id -> version) holds after this operation."""
        if self.kind in ("append", "replace"):
            return {**model, **dict(self.records)}
        if self.kind == "delete":
            return {i: version for i, version in model.items() if i not in set(self.ids)}
        if self.kind == "commit":  # what is there already stays as it is
            return {**dict(self.records), **model}
        return dict(model)

    def apply(self, store: TokenStore) -> None:
        """Do it: when this returns, the store has acknowledged it."""
        if self.kind == "append":
            store.append(self.ids, tokens_of(self.records, store.layout))
        elif self.kind == "replace":
            store.replace(self.ids, tokens_of(self.records, store.layout))
        elif self.kind == "delete":
            store.delete(self.ids)
        elif self.kind == "compact":
            store.compact()
        else:
            store.commit_segments([write_segment(store, self)])


def write_segment(store: TokenStore, operation: Operation) -> Path:
    """Write the records as another process would: a segment that waits in `incoming`."""
    name = xxhash.xxh3_64_hexdigest(operation.to_json().encode())
    path = store.path / "incoming" / f"{name}.tokens"
    layout = StoreLayout.read(store.path)
    with SegmentWriter(path, layout) as segment:
        half = len(operation.records) // 2
        for part in (operation.records[:half], operation.records[half:]):
            segment.append([image_id for image_id, _ in part], tokens_of(part, layout))
    return path


def tokens_of(records: tuple[tuple[str, int], ...], layout: StoreLayout) -> np.ndarray:
    """Return float16 [N, m, H]: what (id, version) of each record stands for."""
    shape = (layout.num_tokens, layout.hidden)
    tokens = np.empty((len(records), *shape), np.float16)
    for row, (image_id, version) in zip(tokens, records, strict=True):
        seed = xxhash.xxh3_64_intdigest(image_id.encode(), version)
        row[...] = np.random.Generator(np.random.SFC64(seed)).standard_normal(shape, np.float32)
    return tokens


def expected_bytes(model: Mapping[str, int], layout: StoreLayout) -> dict[str, bytes]:
    """Return id -> the bytes of its tokens (then of its scales) that a store of `model` serves."""
    tokens = tokens_of(tuple(model.items()), layout)
    if layout.dtype == "float16":
        return {i: row.tobytes() for i, row in zip(model, tokens, strict=True)}
    pairs = zip(*quantize_tokens(tokens), strict=True)
    rows = [values.tobytes() + scales.tobytes() for values, scales in pairs]
    return dict(zip(model, rows, strict=True))


def served_bytes(store: TokenStore) -> dict[str, bytes]:
    """Return id -> bytes of everything that a store serves, verified, read in a mixed order."""
    ids = store.ids()
    random.Random(len(ids)).shuffle(ids)
    tokens, scales = buffers(store, len(ids))
    store.read(store.rows(ids), tokens, scales)
    return joined(ids, tokens, scales)


def buffers(store: TokenStore, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return what `read` fills: tokens [N, m, H] and, of an int8 store, scales [N, m]."""
    dtype = np.dtype(store.layout.dtype)
    tokens = np.zeros((count, *store.record_shape), dtype)
    scaled = dtype == np.int8
    return tokens, np.zeros(tokens.shape[:2], np.float16) if scaled else None


def joined(ids: list[str], tokens: np.ndarray, scales: np.ndarray | None) -> dict[str, bytes]:
    """Return id -> bytes of its tokens, then of its scales."""
    rows = [row.tobytes() for row in tokens]
    if scales is not None:
        rows = [row + scale.tobytes() for row, scale in zip(rows, scales, strict=True)]
    return dict(zip(ids, rows, strict=True))


def differences(got: Mapping[str, bytes], expected: Mapping[str, bytes]) -> str:
    """Return in words how the two differ, empty when they are equal."""
    lost = sorted(expected.keys() - got.keys())
    extra = sorted(got.keys() - expected.keys())
    torn = sorted(i for i in got.keys() & expected.keys() if got[i] != expected[i])
    found = {"lost": lost, "not expected": extra, "of other bytes": torn}
    return "; ".join(f"{what}: {ids[:5]} ({len(ids)})" for what, ids in found.items() if ids)


def random_operation(
    pick: random.Random, model: Mapping[str, int], max_records: int = 12
) -> Operation:
    """Draw an operation that suits a store of `model`, which grows to about a hundred ids.

    Ids that were deleted come back with other tokens; a commit brings some that are there.
    """
    names = [f"scenes/é-{number}.png" for number in range(120)]
    absent = [name for name in names if name not in model]
    count = pick.randint(1, max_records)
    kinds = ["append", "commit"] if len(model) < 20 else list(KINDS)
    kind = pick.choice([k for k in kinds if absent or k not in ("append", "commit")])
    if kind == "compact":
        return Operation(kind)
    if kind == "append":
        ids = pick.sample(absent, min(count, len(absent)))
    elif kind == "commit":
        ids = pick.sample(names, count)
    else:
        ids = pick.sample(sorted(model), min(count, len(model)))
    return Operation(kind, tuple((image_id, pick.getrandbits(48)) for image_id in ids))


def draw_operation(pick: random.Random, model: Mapping[str, int], kind: str) -> Operation:
    """Draw operations until one of this kind comes."""
    while (operation := random_operation(pick, model)).kind != kind:
        pass
    return operation


def findings(report: VerifyReport) -> list[str]:
    """Return everything that verification found wrong, in words."""
    found = [*map(str, report.damaged), *report.faults]
    return found if not report.is_clean else [f"clean, but: {line}" for line in found]


class Witness:
    """Knows what the store must hold: everything acknowledged, wholly."""

    def __init__(self, path: Path, model: Model | None = None):
        self.path = path
        self.model: Model = model or {}

    def check(self, begun: Operation | None) -> list[str]:
        """Open without repair and compare; the operation in flight may be there or not."""
        possible = [self.model] + ([begun.after(self.model)] if begun else [])
        try:
            with TokenStore.open(self.path) as store:
                got, layout = served_bytes(store), store.layout
        except Exception:
            return [traceback.format_exc()]
        wrong = [differences(got, expected_bytes(model, layout)) for model in possible]
        if "" not in wrong:
            return [f"in flight: {begun}; {' | '.join(wrong)}"]
        self.model = possible[wrong.index("")]
        return []

    def verify(self) -> list[str]:
        """Return what `verify` finds."""
        return findings(verify_store(self.path))

    def fill(self, pick: random.Random, num_records: int) -> None:
        """Bring the store to about this many records, and make some of them dead."""
        with TokenStore.open(self.path, mode="a") as store:
            while len(self.model) < num_records:
                self._do(store, draw_operation(pick, self.model, "append"))
            while len(self.model) > num_records + 20:
                self._do(store, draw_operation(pick, self.model, "delete"))
            self._do(store, draw_operation(pick, self.model, "replace"))

    def _do(self, store: TokenStore, operation: Operation) -> None:
        operation.apply(store)
        self.model = operation.after(self.model)
