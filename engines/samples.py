"""What calibration and fidelity score: queries, each with the candidates it ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

import numpy as np

from ..arguments import Arguments
from ..arrays import Array, Float16, Int32
from ..bundle import BundleManifest
from ..tokens import quantize_tokens
from .contract import Batch
from .manifest import Profile

SEED = 0


@dataclass(frozen=True, slots=True)
class RankingSample:
    """One query with its candidates.

    Attributes:
        text_ids: int32 [L]: `[CLS] wordpieces [SEP]`, no padding.
        tokens: float16 [C, m, H]: the candidates' visual tokens.
        target: which candidate is the right one; None where nobody knows.
    """

    text_ids: Int32
    tokens: Float16
    target: int | None = None


class Samples(Protocol):
    """Samples to go through any number of times; tokens may be read only then.

    Attributes:
        data: where they come from, in words for a manifest.
        random: made up; shows rounding, but says little about a ranking.
        build_options: what `edje build` was told to get them, by the names of its options.
        fingerprint: SHA-256 over what an iteration yields, however it is named or stored.
    """

    @property
    def data(self) -> str: ...
    @property
    def random(self) -> bool: ...
    @property
    def build_options(self) -> Mapping[str, str | bool]: ...
    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[RankingSample]: ...


class SomeSamples:
    """Some queries of other samples: every `step`-th, or all but those.

    Attributes:
        data, random, build_options: as those of the whole, with a word on what was taken.
    """

    def __init__(self, samples: Samples, step: int, *, others: bool = False):
        """Take the queries number `step - 1`, `2 * step - 1`, ...; or the `others`."""
        self._samples, self._step, self._others = samples, step, others
        which = f"all queries but each {step}th" if others else f"each {step}th query"
        self.data = f"{which} of: {samples.data}"
        self.random, self.build_options = samples.random, samples.build_options

    @property
    def fingerprint(self) -> str:
        """SHA-256 over that of the whole and what was taken."""
        taken = f"{self._samples.fingerprint} {self._step} {self._others}".encode()
        return hashlib.sha256(taken).hexdigest()

    def __len__(self) -> int:
        taken = len(self._samples) // self._step
        return len(self._samples) - taken if self._others else taken

    def __iter__(self) -> Iterator[RankingSample]:
        for number, sample in enumerate(self._samples, 1):
            if (number % self._step == 0) != self._others:
                yield sample


def check_samples(given: Arguments, name: str, value: object) -> None:
    """Note in `given` what is neither samples nor None; no fingerprint is asked for: that reads."""
    told = all(hasattr(value, known) for known in ("data", "random", "build_options"))
    many = isinstance(value, Sized) and isinstance(value, Iterable)
    if not (value is None or (told and many)):
        given.refuse(name, value, "samples (StoreSamples, RandomSamples), or None")


class RandomSamples:
    """Seeded random wordpieces, and standard normal tokens that all queries share.

    Query lengths run from one wordpiece to the longest that the model takes.
    """

    random = True
    build_options: Mapping[str, str | bool] = MappingProxyType({"calibration_random": True})

    def __init__(self, bundle: BundleManifest, num_queries: int = 4, num_candidates: int = 32):
        self.data = f"random wordpieces and random tokens, seed {SEED}"
        random = np.random.default_rng(SEED)
        sizes = bundle.sizes
        shape = (num_candidates, sizes.num_tokens, sizes.hidden)
        self._tokens = random.standard_normal(shape, np.float32).astype(np.float16)
        longest = bundle.text.max_wordpieces + 2
        lengths = np.linspace(3, longest, num_queries).astype(int).tolist()
        self._queries = [self._query(random, bundle, length) for length in lengths]

    @staticmethod
    def _query(random: np.random.Generator, bundle: BundleManifest, length: int) -> Int32:
        text_ids = random.integers(0, bundle.sizes.vocab_size, length).astype(np.int32)
        text_ids[0], text_ids[-1] = bundle.text.cls_id, bundle.text.sep_id
        return text_ids

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the queries and the tokens."""
        return fingerprint_of([*self._queries, self._tokens])

    def __len__(self) -> int:
        return len(self._queries)

    def __iter__(self) -> Iterator[RankingSample]:
        return (RankingSample(query, self._tokens) for query in self._queries)


def fingerprint_of(arrays: list[Array]) -> str:
    """Return the SHA-256 over dtype, shape and values of all `arrays`, as hex."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def int8_batch(batch: Batch) -> Batch:
    """Return `batch` with its float16 tokens as int8 [P, m, H] and float16 scales [P, m]."""
    values, scales = quantize_tokens(batch.visual_tokens)
    return replace(batch, visual_tokens=values, visual_scales=scales)


def sample_batches(
    sample: RankingSample, profile: Profile, *, pad_id: int, sep_id: int
) -> Iterator[Batch]:
    """Cut a sample into batches that fit `profile`, in the order of its candidates.

    A query longer than the largest bucket is cut to it, as the tokenizer would: its last
    wordpieces go, SEP stays.
    """
    length = min(len(sample.text_ids), profile.text_buckets[-1])
    bucket = min(bucket for bucket in profile.text_buckets if bucket >= length)
    text_ids = np.full((1, bucket), pad_id, np.int32)
    text_ids[0, :length] = sample.text_ids[:length]
    text_ids[0, length - 1] = sep_id
    lengths = np.array([length], np.int32)
    for start in range(0, len(sample.tokens), profile.max_pairs):
        tokens = sample.tokens[start : start + profile.max_pairs]
        yield Batch(text_ids, lengths, np.zeros(len(tokens), np.int32), tokens)
