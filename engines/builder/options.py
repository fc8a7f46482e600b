"""What may be asked of a new engine: one object for builder, `auto`, cache and command line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from numbers import Integral
from pathlib import Path

from ...arguments import Arguments, is_whole, shown, take_once
from ...errors import EngineError
from ..build_options import BuildOptions, flag, given_options
from ..fidelity import FidelityLimits
from ..manifest import DEFAULT_MAX_PAIRS, DEFAULT_TEXT_BUCKETS, Profile
from ..precision.prepare import DEFAULT_LIMITS
from ..samples import Samples, check_samples

AUTO = "auto"
TOKEN_DTYPES = ("float16", "int8")
ALONE, FIRST = ROLES = ("alone", "first")
# A first engine keeps nothing in 16 bit: of its ways of scaling the search takes the one with which
# a cascade takes least time, and refuses one that leaves nothing out.
FIRST_LIMITS = FidelityLimits(max_rescored=0.9)
# Of a shallow engine against its own float32 graph: beside what its head errs, 8 bits may err, too
# (trained weights, 4 of 6 layers: static scales, tau 0.84, leave no more survivors than dynamic).
SHALLOW_LIMITS = FidelityLimits(min_kendall_tau=0.8)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How an engine is built, beside backend, precision and calibration pairs.

    Attributes:
        max_pairs: most pairs of one batch.
        text_buckets: text lengths to build for, in slots, CLS and SEP included (any iterable,
            taken once).
        token_dtype: of the stored tokens that it takes: `float16`, or `int8` with a scale a token.
        limits: what its ranking must hold against float32; None: by its role.
        role: `alone`: its order counts (Kendall tau 0.975, and 2 % of the first places);
            `first`: of a cascade, whose survivors another engine scores again: everything in 8
            bits that can be, in the way that leaves fewest survivors for its time.
        layers: how many of the model's first layers it runs, with a head fitted on the calibration
            pairs; `auto`: those with which a cascade takes least time; None: all, and the model's
            own head. Fewer than all are always a `first` engine.
        image_encoder: also copy `image_encoder.onnx`, so that the folder can index images.
        backend_options: how the backend builds; not with `auto`.
    """

    max_pairs: int = DEFAULT_MAX_PAIRS
    text_buckets: Iterable[int] = DEFAULT_TEXT_BUCKETS
    token_dtype: str = "float16"
    limits: FidelityLimits | None = None
    role: str = ALONE
    layers: int | str | None = None
    image_encoder: bool = False
    backend_options: BuildOptions = field(default_factory=BuildOptions)

    def __post_init__(self) -> None:
        take_once(self, "text_buckets")

    def check(self, given: Arguments) -> None:
        """Note in `given` what is of another kind; values that no engine can have come later."""
        given.flag("image_encoder", self.image_encoder)
        if not isinstance(self.limits, FidelityLimits | None):
            given.refuse("limits", self.limits, "FidelityLimits, or None")
        given.choice("role", self.role, ROLES)
        if not (self.layers is None or self.layers == AUTO or is_whole(self.layers)):
            given.refuse("layers", self.layers, "a whole number, auto, or None")
        if not isinstance(self.backend_options, BuildOptions):
            given.refuse("backend_options", self.backend_options, "BuildOptions")
        else:
            _check_kinds(given, self.backend_options)

    @property
    def limits_to_hold(self) -> FidelityLimits:
        """The limits that were set, or those of the role."""
        return self.limits or self.default_limits

    @property
    def default_limits(self) -> FidelityLimits:
        """The limits of the role."""
        if self.layers is not None:
            return SHALLOW_LIMITS
        return FIRST_LIMITS if self.is_first else DEFAULT_LIMITS

    @property
    def is_first(self) -> bool:
        """Whether another engine will score its survivors again."""
        return self.role == FIRST or self.layers is not None

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


def _check_kinds(given: Arguments, options: BuildOptions) -> None:
    """Note in `given` the backend's options that are of another kind."""
    for option in fields(options):
        value = getattr(options, option.name)
        if isinstance(option.default, bool):
            given.flag(option.name, value)
        elif isinstance(option.default, tuple):
            given.strings(option.name, value)
        elif not (value is None or isinstance(value, Integral)):
            given.refuse(option.name, value, "a whole number, or None")


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One engine that is asked for: all that decides what it will be. See `build_engine`."""

    bundle: Path
    backend: str
    precision: str
    calibration: Samples | None
    options: EngineOptions

    @classmethod
    def take(
        cls,
        given: Arguments,
        bundle: object,
        backend: str,
        precision: str,
        calibration: Samples | None,
        options: EngineOptions | None,
    ) -> EngineRequest:
        """Return the request of a call; what is of another kind is noted in `given`."""
        given.text("backend", backend, "the name of a backend")
        given.text("precision", precision, "the name of a precision")
        check_samples(given, "calibration", calibration)
        if not isinstance(options, EngineOptions | None):
            given.refuse("options", options, "EngineOptions, or None")
            options = None
        options = EngineOptions() if options is None else options
        options.check(given)
        return cls(given.path("bundle", bundle), backend, precision, calibration, options)


def auto_faults(precision: str | None, options: BuildOptions) -> list[str]:
    """Return one sentence for everything that belongs to one backend and was given to `auto`."""
    faults = [
        f"{flag(name, value)}: it belongs to one backend; name that in place of auto"
        for name, value in given_options(options).items()
    ]
    if precision is not None:
        faults.append(f"--precision {precision}: --backend auto chooses it; name a backend")
    return faults
