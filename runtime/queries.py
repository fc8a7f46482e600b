"""Queries with candidates, as users write them, and the samples drawn from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import Arguments, StrPath, read_text
from ..arrays import Array, Int32
from ..bundle import BundleManifest
from ..engines.samples import SEED, RankingSample, fingerprint_of
from ..errors import RequestError, StoreError, named
from ..files import Closing
from .source import encoder_faults, float16_tokens
from .store import TokenStore
from .text import QueryTokenizer

DEFAULT_NUM_CANDIDATES = 50
MAX_FAULTS = 20
_KEYS = ("query", "target", "candidates")


@dataclass(frozen=True, slots=True)
class QueryEntry:
    """One query of a queries file.

    Attributes:
        where: its line, for messages.
        text: the query.
        target: id of the image that it describes; None where the file does not say.
        candidates: ids that it ranks; None leaves them to be drawn.
    """

    where: str
    text: str
    target: str | None = None
    candidates: tuple[str, ...] | None = None


class StoreSamples(Closing):
    """Queries of a file, each with its candidates of a store; tokens are read when iterated.

    The tokens of an int8 store are dequantised, so that an engine is measured on what it will read.

    A query without candidates of its own gets `num_candidates` ids drawn from the store with a
    seed, its target among them, or the whole store where that holds no more.
    """

    random = False

    def __init__(
        self,
        store: TokenStore,
        tokenizer: QueryTokenizer,
        queries: StrPath,
        *,
        num_candidates: int = DEFAULT_NUM_CANDIDATES,
        max_queries: int | None = None,
        seed: int = SEED,
    ):
        """Check everything but the tokens. `store` stays the caller's and must stay open.

        Args:
            queries: UTF-8 text, a line `query` or `query<TAB>target id`; or `.jsonl` with
                `{"query": ..., "target": id, "candidates": [ids]}`, the last two optional.
            max_queries: use no more, drawn with the seed; None uses all.

        Raises:
            RequestError: the file cannot be read or used (all faults, up to 20, by their lines).
        """
        _check(num_candidates, max_queries, seed, queries=queries)
        queries = Path(queries)
        if not len(store):
            raise RequestError(f"the store {store.path} is empty: there is nothing to rank")
        entries, text_ids = _usable(queries, tokenizer, store)
        order = np.random.default_rng(seed).permutation(len(entries))[:max_queries]
        chosen = sorted(order.tolist())
        pool = store.ids(), num_candidates, seed
        self._store = store
        self._source = float16_tokens(store)
        self._text_ids = [text_ids[number] for number in chosen]
        self._candidates = [_drawn(entries[number], number, *pool) for number in chosen]
        self._targets = [entries[number].target for number in chosen]
        drawn = len(store) > num_candidates and any(e.candidates is None for e in entries)
        seeded = drawn or len(chosen) < len(entries)
        self.build_options: Mapping[str, str | bool] = {
            "calibration_store": str(store.path.absolute()),
            "calibration_queries": str(queries.absolute()),
        }
        self.data = self._words(queries, len(entries), f", seed {seed}" if seeded else "")

    @classmethod
    def open(
        cls,
        store: StrPath,
        bundle: StrPath,
        queries: StrPath,
        *,
        num_candidates: int = DEFAULT_NUM_CANDIDATES,
        max_queries: int | None = None,
        seed: int = SEED,
    ) -> StoreSamples:
        """Open a store for the model of `bundle`; `close` (or a `with` block) closes it.

        Raises:
            CheckpointError: `bundle` is no model bundle.
            StoreError: no store there, or one of another encoder.
            RequestError: as the constructor; paths that are none, before anything is opened.
        """
        _check(num_candidates, max_queries, seed, store=store, bundle=bundle, queries=queries)
        manifest = BundleManifest.read(bundle)
        tokenizer = QueryTokenizer.open(bundle, manifest.text)
        opened = TokenStore.open(store)
        try:
            if faults := encoder_faults(opened, manifest, "bundle"):
                raise StoreError(
                    f"the store {opened.path} was not made for this bundle",
                    faults=faults,
                    hint="index the images again: edje index BUNDLE IMAGES --store NEW_STORE",
                )
            return cls(
                opened,
                tokenizer,
                queries,
                num_candidates=num_candidates,
                max_queries=max_queries,
                seed=seed,
            )
        except BaseException:
            opened.close()
            raise

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over queries, candidates, targets and the records' checksums; reads no token."""
        parts: list[Array] = [np.frombuffer(self._store.fingerprint_encoder.encode(), np.uint8)]
        for text_ids, ids, target in self._parts():
            parts += [text_ids, self._store.checksums(self._store.rows(ids))]
            parts.append(np.array([-1 if target is None else target], np.int64))
        return fingerprint_of(parts)

    def __len__(self) -> int:
        return len(self._text_ids)

    def __iter__(self) -> Iterator[RankingSample]:
        """Read one query's tokens after the other; each sample's arrays are the caller's.

        Raises:
            StoreError: damaged records (each named).
        """
        for text_ids, ids, target in self._parts():
            tokens = np.empty((len(ids), *self._store.record_shape), np.float16)
            self._source.read(self._store.rows(ids), tokens)
            yield RankingSample(text_ids, tokens, target)

    def close(self) -> None:
        """Close the store."""
        self._store.close()

    def _parts(self) -> Iterator[tuple[Int32, tuple[str, ...], int | None]]:
        """Yield ids of the text, of the candidates, and the target's place among them."""
        whole = zip(self._text_ids, self._candidates, self._targets, strict=True)
        for text_ids, ids, target in whole:
            yield text_ids, ids, ids.index(target) if target in ids else None

    def _words(self, queries: Path, num_entries: int, how: str) -> str:
        """Say what is scored, for a manifest."""
        of = "" if len(self) == num_entries else f" of {num_entries}"
        sizes = {len(ids) for ids in self._candidates}
        dtype = self._store.layout.dtype
        tokens = "" if dtype == "float16" else f" ({dtype} tokens)"
        span = "{}" if len(sizes) == 1 else "{} to {}"
        each = span.format(*sorted({min(sizes), max(sizes)}))
        absent = sum(
            target is not None and target not in ids
            for target, ids in zip(self._targets, self._candidates, strict=True)
        )
        return (
            f"{len(self)}{of} queries of {queries.name}, {each} candidates each of the "
            f"{len(self._store)} images of {self._store.path.name}{tokens}{how}"
            + (f"; {absent} targets are not among their candidates" if absent else "")
        )


@contextmanager
def open_samples(
    store: StrPath | None, bundle: StrPath, queries: StrPath | None, **drawn: Any
) -> Iterator[StoreSamples | None]:
    """Yield the samples of a store and a queries file, None where neither is given.

    Args:
        drawn: as `StoreSamples.open` takes it: `num_candidates`, `max_queries`, `seed`.

    Raises:
        RequestError: one is given without the other; and all that `StoreSamples.open` raises.
    """
    if (store is None) != (queries is None):
        given, missing = ("queries", "store") if store is None else ("store", "queries")
        raise RequestError(
            f"{given} was given without {missing}: real pairs need both",
            hint=f"add --{missing}, or leave out --{given} to score random pairs",
        )
    if store is None or queries is None:
        yield None
        return
    with StoreSamples.open(store, bundle, queries, **drawn) as samples:
        yield samples


def _drawn(
    entry: QueryEntry, number: int, ids: Sequence[str], num_candidates: int, seed: int
) -> tuple[str, ...]:
    """Return a query's candidates; which other queries are used does not change them."""
    if entry.candidates is not None:
        return entry.candidates
    if len(ids) <= num_candidates:
        return tuple(ids)
    random = np.random.default_rng([seed, number])
    drawn = [ids[at] for at in random.choice(len(ids), num_candidates, replace=False).tolist()]
    if entry.target is not None and entry.target not in drawn:
        drawn[random.integers(len(drawn))] = entry.target
    return tuple(drawn)


def _usable(
    path: Path, tokenizer: QueryTokenizer, store: TokenStore
) -> tuple[list[QueryEntry], list[Int32]]:
    """Return the entries of a queries file and their ids, or raise with all of its faults."""
    faults: list[str] = []
    entries = list(_entries(path, faults))
    text_ids = [_tokenized(entry, tokenizer, faults) for entry in entries]
    for entry in entries:
        asked = ([] if entry.target is None else [entry.target]) + list(entry.candidates or ())
        unknown = [name for name in dict.fromkeys(asked) if name not in store]
        if unknown:
            faults.append(f"{entry.where}: not in the store: {named(unknown)}")
    if not entries and not faults:
        faults.append("it holds no query")
    if faults:
        shown = faults[:MAX_FAULTS]
        rest = [f"and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else []
        raise RequestError(
            f"the queries {path} cannot be used over the store {store.path}",
            faults=[*shown, *rest],
            hint="a line is `query` or `query<TAB>target id`; in .jsonl "
            '{"query": ..., "target": id, "candidates": [ids]}',
        )
    return entries, text_ids


def _tokenized(entry: QueryEntry, tokenizer: QueryTokenizer, faults: list[str]) -> Int32:
    """Return int32 [L], `[CLS] wordpieces [SEP]` without padding."""
    try:
        queries = tokenizer([entry.text])
    except RequestError as error:
        reasons = [fault.removeprefix("query 0: ") for fault in error.faults or (error.message,)]
        faults += [f"{entry.where}: {reason}" for reason in reasons]
        return np.empty(0, np.int32)
    text_ids: Int32 = queries.text_ids[0, : int(queries.text_length[0])].copy()
    return text_ids


def _entries(path: Path, faults: list[str]) -> Iterator[QueryEntry]:
    """Yield the queries of a file; note in `faults` the lines that are none."""
    lines = read_text(path, f"the queries {path}").split("\n")
    parse = _json_entry if path.suffix.lower() == ".jsonl" else _text_entry
    for number, line in enumerate(lines, 1):
        if line.strip():
            found = parse(f"line {number}", line.rstrip("\r"))
            if isinstance(found, QueryEntry):
                yield found
            else:
                faults.append(f"line {number}: {found}")


def _text_entry(where: str, line: str) -> QueryEntry | str:
    """Return the query of a line, or what is wrong with it."""
    if _is_json_object(line):
        return "it is a JSON object, expected a query: call a file of JSON lines .jsonl"
    fields = line.split("\t")
    if len(fields) > 2:
        return f"got {len(fields)} fields between tabs, expected a query and a target id"
    if len(fields) == 2 and not fields[1]:
        return "the target id behind the tab is empty"
    return QueryEntry(where, fields[0], fields[1] if len(fields) == 2 else None)


def _is_json_object(line: str) -> bool:
    if not line.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_entry(where: str, line: str) -> QueryEntry | str:
    try:
        values = json.loads(line)
    except ValueError as error:
        return f"not JSON: {error}"
    if not isinstance(values, dict):
        return f"got {type(values).__name__}, expected an object"
    query, target, ids = (values.get(key) for key in _KEYS)
    if values.keys() - set(_KEYS):
        return f"unknown keys: {named(sorted(values.keys() - set(_KEYS)))}"
    if not isinstance(query, str):
        return f"query: got {query!r}, expected a string"
    if not isinstance(target, str | None):
        return f"target: got {target!r}, expected a string"
    if ids is None:
        return QueryEntry(where, query, target)
    if not isinstance(ids, list) or not ids or not all(isinstance(name, str) for name in ids):
        return f"candidates: got {str(ids)[:80]}, expected a list of ids"
    if len(set(ids)) < len(ids):
        return f"candidates: {len(ids) - len(set(ids))} ids come twice"
    return QueryEntry(where, query, target, tuple(ids))


def _check(num_candidates: int, max_queries: int | None, seed: int, **paths: object) -> None:
    """Refuse all that is of another kind, or no number of anything that can be ranked."""
    given = Arguments("StoreSamples")
    for name, path in paths.items():
        given.path(name, path)
    given.whole("num_candidates", num_candidates, "2 or more, which a ranking needs", least=2)
    if max_queries is not None:
        given.whole("max_queries", max_queries, "1 or more, or None")
    given.whole("seed", seed, "0 or more", least=0)
    given.check()
