"""Text of a query -> `text_ids`: canonicalise, tokenise with `tokenizers` alone, truncate.

What a user types is plain text. `<image>`, `[SEP]` and their like never become special ids:
the only special ids of a query are the CLS and SEP put around it here.
"""

from __future__ import annotations

import html
import json
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ..arguments import Arguments, StrPath, path_of
from ..bundle import TEXT_NORMALIZATIONS, TOKENIZER, TextSpec
from ..errors import EngineError, RequestError

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonicalize(text: str) -> str:
    """Return `text` as the official datasets feed it to the tokenizer (normalization `openclip`).

    Fixes broken Unicode and HTML entities, drops every ASCII punctuation mark ("t-shirt" becomes
    "tshirt"; `_` becomes a space), lowers the case and collapses white space.

    Source: EDJE `data/utils.py` `pre_caption` = open_clip `canonicalize_text(basic_clean(x))`.
    """
    if text.isascii() and text.isprintable() and "&" not in text:
        fixed = text  # nothing to fix: no entity, no control character, nothing garbled
    else:
        import ftfy  # slow to import, needed by this normalisation only

        fixed = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    plain = fixed.replace("_", " ").translate(_DELETE_PUNCTUATION).lower()
    return " ".join(plain.split())


# Whether a lone query was cut: shared, not to be written to.
_CUT = (np.zeros(1, np.bool_), np.ones(1, np.bool_))
_CUT[False].flags.writeable = _CUT[True].flags.writeable = False
_NORMALIZERS: dict[str, Callable[[str], str]] = {"openclip": canonicalize, "none": str}


@dataclass(frozen=True, slots=True)
class TokenizedQueries:
    """Q tokenised queries.

    Attributes:
        text_ids: int32 [Q, max_wordpieces + 2]: `[CLS] wordpieces [SEP]`, right-padded with 0.
        text_length: int32 [Q]: real ids of each query, CLS and SEP included.
        truncated: bool [Q]: the query had more wordpieces than the model takes.
    """

    text_ids: npt.NDArray[np.int32]
    text_length: npt.NDArray[np.int32]
    truncated: npt.NDArray[np.bool_]


class QueryTokenizer:
    """Turn queries into ids, as one model wants them. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, spec: TextSpec):
        if spec.normalization not in _NORMALIZERS:
            raise EngineError(
                f"unknown text normalization {spec.normalization!r}",
                hint=f"export the bundle again with one of {', '.join(TEXT_NORMALIZATIONS)}",
            )
        self._tokenizer = tokenizer
        self._spec = spec
        self._normalize = _NORMALIZERS[spec.normalization]
        self._normalize("wärm-up")  # pays the lazy import before the first request

    @classmethod
    def open(cls, folder: StrPath, spec: TextSpec) -> QueryTokenizer:
        """Read `tokenizer.json` of a bundle or engine folder.

        Raises:
            EngineError: the file is missing or is not a tokenizer.
        """
        path = path_of("folder", folder) / TOKENIZER
        try:
            tokenizer = _plain_tokenizer(path.read_text(encoding="utf-8"))
        except Exception as error:  # `tokenizers` raises bare Exception on a bad file
            raise EngineError(
                f"cannot read {path}: {error}",
                hint="build the engine again with `edje build BUNDLE --out ENGINE --overwrite`",
            ) from error
        return cls(tokenizer, spec)

    def __call__(self, queries: Iterable[str]) -> TokenizedQueries:
        """Return the ids of `queries`, each cut to its first `max_wordpieces` wordpieces.

        Raises:
            RequestError: a query is not a string, not valid Unicode, or has no text left after
                normalisation (all such queries are named).
        """
        faults: list[str] = []
        if type(queries) is not list:
            given = Arguments("a tokenizer")
            queries, faults = given.items("queries", queries, "a list of strings"), given.faults
            given.check()
        if len(queries) == 1:
            return self._one(queries[0])
        texts = [self._text(number, query, faults) for number, query in enumerate(queries)]
        if faults:
            raise RequestError("a query cannot be used", faults=faults)
        pieces = [e.ids for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)]
        empty = [query for query, ids in zip(queries, pieces, strict=True) if not ids]
        if empty:
            raise _no_wordpieces(empty[0])
        return self._pack(pieces)

    def _one(self, query: str) -> TokenizedQueries:
        """Do as `__call__` does for one query, as a server asks: half the time of a list of one."""
        faults: list[str] = []
        text = self._text(0, query, faults)
        if faults:
            raise RequestError("a query cannot be used", faults=faults)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not ids:
            raise _no_wordpieces(query)
        spec = self._spec
        limit, num_ids = spec.max_wordpieces, len(ids)
        text_ids = np.zeros((1, limit + 2), np.int32)
        text_ids[0, : min(num_ids, limit) + 2] = (spec.cls_id, *ids[:limit], spec.sep_id)
        length = np.array([min(num_ids, limit) + 2], np.int32)
        return TokenizedQueries(text_ids, length, _CUT[num_ids > limit])

    def _text(self, number: int, query: object, faults: list[str]) -> str:
        """Return the normalised query; note in `faults` why it cannot be used."""
        if not isinstance(query, str):
            faults.append(f"query {number}: got {type(query).__name__}, expected a string")
            return ""
        text = self._normalize(query)
        if not text or text.isspace():
            after = " after normalization" if query.strip() else ""
            faults.append(f"query {number}: {query[:80]!r} is empty{after}, expected some text")
        elif not _is_unicode(text):
            faults.append(f"query {number}: {query[:80]!r} is not valid Unicode text")
        return text

    def _pack(self, pieces: Sequence[Sequence[int]]) -> TokenizedQueries:
        limit, cls_id, sep_id = self._spec.max_wordpieces, self._spec.cls_id, self._spec.sep_id
        padded = [
            [cls_id, *ids[:limit], sep_id, *[0] * (limit - len(ids))] for ids in pieces
        ]  # a tenth of the calls into NumPy that filling row by row takes
        return TokenizedQueries(
            np.array(padded, np.int32).reshape(len(pieces), limit + 2),
            np.array([min(len(ids), limit) + 2 for ids in pieces], np.int32),
            np.array([len(ids) > limit for ids in pieces], np.bool_),
        )


def _no_wordpieces(query: str) -> RequestError:
    return RequestError(f"the query {query!r} has no wordpieces, expected some text")


def _plain_tokenizer(text: str) -> Tokenizer:
    """Make a tokenizer that knows no added or special tokens and neither pads nor truncates.

    Without its added tokens the tokenizer cannot match `[SEP]` or `<image>` in a query: they are
    split and looked up like any other characters.
    """
    values = json.loads(text)
    values.update(added_tokens=[], truncation=None, padding=None, post_processor=None)
    tokenizer: Tokenizer = Tokenizer.from_str(json.dumps(values))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _is_unicode(text: str) -> bool:
    """Lone surrogates (half of a character) cannot be encoded, hence not be tokenised."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
