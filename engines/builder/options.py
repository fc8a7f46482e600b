"""What may be asked of a new engine: one object for builder, `auto`, cache and command line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...arguments import Arguments, is_whole, shown
from ...errors import EngineError
from ..contract import BuildOptions, flag, given_options
from ..fidelity import FidelityLimits
from ..manifest import DEFAULT_MAX_PAIRS, DEFAULT_TEXT_BUCKETS, Profile
from ..precision.prepare import DEFAULT_LIMITS
from ..samples import Samples

AUTO = "auto"
TOKEN_DTYPES = ("float16", "int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How an engine is built, beside backend, precision and calibration pairs.

    Attributes:
        max_pairs: most pairs of one batch.
        text_buckets: text lengths to build for, in slots, CLS and SEP included.
        token_dtype: of the stored tokens that it takes: `float16`, or `int8` with a scale a token.
        limits: what its ranking must hold against float32; None: Kendall tau 0.975, and 2 % of
            the first places.
        image_encoder: also copy `image_encoder.onnx`, so that the folder can index images.
        backend_options: how the backend builds; not with `auto`.
    """

    max_pairs: int = DEFAULT_MAX_PAIRS
    text_buckets: Iterable[int] = DEFAULT_TEXT_BUCKETS
    token_dtype: str = "float16"
    limits: FidelityLimits | None = None
    image_encoder: bool = False
    backend_options: BuildOptions = field(default_factory=BuildOptions)

    def __post_init__(self) -> None:
        if isinstance(self.text_buckets, Iterator):  # it can be asked only once
            object.__setattr__(self, "text_buckets", tuple(self.text_buckets))

    @property
    def limits_to_hold(self) -> FidelityLimits:
        """The limits that were set, or the defaults."""
        return self.limits or DEFAULT_LIMITS

    def profile(self, max_wordpieces: int) -> Profile:
        """Return the engine's profile: its buckets in ascending order, each once.

        Args:
            max_wordpieces: of the model's longest query; 61 in the official one.

        Raises:
            EngineError: sizes or a token dtype that no engine of this model can have (all named).
        """
        longest = max_wordpieces + 3  # 64 in the official model: 61, CLS, SEP, rounded up
        given = Arguments("a profile")
        buckets, faults = (
            given.items("text_buckets", self.text_buckets, "whole numbers"),
            given.faults,
        )
        if not is_whole(self.max_pairs):
            faults.append(f"max_pairs: got {shown(self.max_pairs)}, expected 1 or more")
        if not (buckets or faults):
            faults.append("text_buckets: got none, expected at least one")
        faults += [
            f"text_buckets: got {shown(bucket)}, expected 3 (CLS, one wordpiece, SEP) to {longest}"
            for bucket in buckets
            if not (is_whole(bucket, 3) and bucket <= longest)
        ]
        if self.token_dtype not in TOKEN_DTYPES:
            expected = " or ".join(TOKEN_DTYPES)
            faults.append(f"token_dtype: got {shown(self.token_dtype)}, expected {expected}")
        if faults:
            raise EngineError("no engine can have this profile", faults=faults)
        return Profile(int(self.max_pairs), tuple(sorted({int(bucket) for bucket in buckets})))


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One engine that is asked for: all that decides what it will be. See `build_engine`."""

    bundle: Path
    backend: str
    precision: str
    calibration: Samples | None
    options: EngineOptions


def auto_faults(precision: str | None, options: BuildOptions) -> list[str]:
    """Return one sentence for everything that belongs to one backend and was given to `auto`."""
    faults = [
        f"{flag(name, value)}: it belongs to one backend; name that in place of auto"
        for name, value in given_options(options).items()
    ]
    if precision is not None:
        faults.append(f"--precision {precision}: --backend auto chooses it; name a backend")
    return faults
