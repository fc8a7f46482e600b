"""A real engine small enough to know every score by heart, and what it needs around it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from edje.bundle import BundleManifest, ModelSizes, TextSpec
from edje.engines.contract import Batch, HostEngine
from edje.engines.manifest import EngineManifest, Profile
from edje.runtime.pipeline import Request
from edje.runtime.store import BadRecord, TokenStore
from edje.runtime.text import QueryTokenizer, TokenizedQueries

FINGERPRINT = "f" * 64
NUM_TOKENS, HIDDEN = 4, 8
CLS, SEP, UNK = 2, 3, 1
WORDS = ("red", "blue", "circle", "square", "a", "above", "##s", "cls", "sep", "mask", "image")
# Fidelities: of an engine that errs, and of one that does not.
REAL = {"random": False, "max_underrating": 2.0, "max_abs_diff": 3.0, "data": "real pairs"}
EXACT = {"random": True, "max_underrating": 0.0, "max_abs_diff": 1e-6, "data": "random pairs"}


def toy_manifest(
    *, max_pairs: int = 8, text_buckets: tuple[int, ...] = (8, 16, 64), normalization: str = "none"
) -> EngineManifest:
    bundle = BundleManifest(
        sizes=ModelSizes(NUM_TOKENS, HIDDEN, 1, 1, 16, 64, 16, None),
        text=TextSpec(normalization, 61, CLS, SEP, 0),
        image=None,
        fingerprint_encoder=FINGERPRINT,
        fingerprint_scorer="0" * 64,
        provenance={},
    )
    return EngineManifest(
        backend="toy",
        backend_version="1",
        precision="fp32",
        device={"kind": "cpu"},
        profile=Profile(max_pairs, text_buckets),
        bundle=bundle,
        bundle_path="nowhere",
        onnx_sha256="",
        precision_plan={},
        layers=1,
        token_dtype="float16",
        files={},
        build_options={},
        build_seconds=0.0,
        fidelity={},
    )


class ToyEngine(HostEngine):
    """score = first token value of the image (times its scale) + (sum of the query's ids) / 1024.

    `before` runs on the stream's worker ahead of every batch: tests block or fail there.
    """

    def __init__(
        self, manifest: EngineManifest | None = None, before: Callable[[Batch], None] | None = None
    ):
        super().__init__(manifest or toy_manifest())
        self.before = before
        self.batches: list[tuple[int, int]] = []
        self.closed = False
        self.running = threading.Semaphore(1)

    def _infer(self, batch: Batch, scores: np.ndarray) -> None:
        assert self.running.acquire(blocking=False), "two batches at once on one stream"
        try:
            if self.before is not None:
                self.before(batch)
            self.batches.append((len(batch), batch.text_ids.shape[1]))
            inside = np.arange(batch.text_ids.shape[1]) < batch.text_length[:, None]
            text = (batch.text_ids * inside).sum(1) / 1024
            scales = 1 if batch.visual_scales is None else batch.visual_scales[:, 0]
            scores[:] = batch.visual_tokens[:, 0, 0] * scales + text[batch.query_of_pair]
        finally:
            self.running.release()

    def close(self) -> None:
        self.closed = True


class FastEngine(ToyEngine):
    """Scores like `ToyEngine`, but wrong by up to `error`, and not at all where the score is 13."""

    def __init__(self, manifest: EngineManifest, error: float = 1.5):
        super().__init__(manifest)
        self.error = error

    def _infer(self, batch: Batch, scores: np.ndarray) -> None:
        super()._infer(batch, scores)
        value = batch.visual_tokens[:, 0, 0].astype(np.float32)
        scores += self.error * np.sin(value * 12.9898).astype(np.float32)
        scores[value == 13] = np.nan


def fast_manifest(**changed: Any) -> EngineManifest:
    return replace(toy_manifest(max_pairs=32), **{"precision": "int8", "fidelity": REAL, **changed})


def precise_manifest(**changed: Any) -> EngineManifest:
    return replace(toy_manifest(), **{"fidelity": EXACT, **changed})


class ToySource:
    """Record `row` holds the value row everywhere (as int8: row % 100, scaled by row // 100 + 1).

    Rows in `bad` are damaged, those in `broken` hold a NaN in their last token.
    """

    def __init__(
        self,
        bad: Sequence[int] = (),
        fail: Mapping[int, Exception] | None = None,
        broken: Sequence[int] = (),
    ):
        self.bad = set(bad)
        self.broken = broken
        self.fail = dict(fail or {})
        self.buffers: set[int] = set()
        self.calls: list[tuple[str, list[int]]] = []

    def prefetch(self, rows: np.ndarray) -> None:
        self.calls.append(("prefetch", rows.tolist()))

    def read(
        self, rows: np.ndarray, out: np.ndarray, scales: np.ndarray | None = None, *, bad: str
    ) -> list[BadRecord]:
        assert bad == "mark"
        for row in rows.tolist():
            if row in self.fail:
                raise self.fail[row]
        self.buffers.add(out.ctypes.data)
        self.calls.append(("read", rows.tolist()))
        broken = np.isin(rows, self.broken)
        if scales is None:
            out[:] = rows[:, None, None]
            out[broken, -1, -1] = np.nan
        else:
            out[:] = (rows % 100)[:, None, None]
            scales[:] = (rows // 100 + 1)[:, None]
            scales[broken, -1] = np.nan
        return [
            BadRecord(place, str(row), 0, row, "flipped")
            for place, row in enumerate(rows.tolist())
            if row in self.bad
        ]


def toy_tokenizer_json() -> str:
    """A BERT-like tokenizer.json whose special tokens and `<image>` are added tokens."""
    vocab = {"[PAD]": 0, "[UNK]": UNK, "[CLS]": CLS, "[SEP]": SEP, "[MASK]": 4}
    for word in (*WORDS, *"[]<>|,.!'", "x"):
        vocab.setdefault(word, len(vocab))
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<image>"])
    tokenizer.add_tokens(["<extra>"])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding()
    return str(tokenizer.to_str())


def toy_tokenizer(tmp_path, *, normalization: str = "none") -> QueryTokenizer:
    (tmp_path / "tokenizer.json").write_text(toy_tokenizer_json(), encoding="utf-8")
    return QueryTokenizer.open(tmp_path, TextSpec(normalization, 61, CLS, SEP, 0))


def toy_store(path: Path, values: Iterable[float], **changed: Any) -> TokenStore:
    """Make and open a store whose image `img-i` holds `values[i]` everywhere: `ToyEngine`'s score,
    but for what the query adds."""
    sizes = {"num_tokens": NUM_TOKENS, "hidden": HIDDEN, "fingerprint_encoder": FINGERPRINT}
    tokens = np.stack([np.full((NUM_TOKENS, HIDDEN), value, np.float16) for value in values])
    with TokenStore.create(path, **{**sizes, **changed}) as store:
        store.append([f"img-{i}" for i in range(len(tokens))], tokens, allow_nonfinite=True)
    return TokenStore.open(path)


def toy_request(lengths: Any, query_of_pair: Any, rows: Any, **more: Any) -> Request:
    """Query q holds its own number + 1 at every real id, so its length tells it apart too."""
    lengths = np.asarray(lengths, np.int32)
    text_ids = np.zeros((len(lengths), 63), np.int32)
    for q, length in enumerate(lengths):
        text_ids[q, :length] = q + 1
    queries = TokenizedQueries(text_ids, lengths, np.zeros(len(lengths), np.bool_))
    pairs = np.asarray(query_of_pair, np.int64), np.asarray(rows, np.int64)
    return Request(queries, *pairs, **more)


def toy_scores(request: Request) -> np.ndarray:
    """What `ToyEngine` makes of a request over `ToySource`."""
    text = request.queries.text_ids.sum(1) / 1024
    return (request.rows + text[request.query_of_pair]).astype(np.float32)
