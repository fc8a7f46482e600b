"""`engine.json`: what an engine folder says of itself, and the command that builds it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..arguments import StrPath, path_of, read_fields
from ..bundle import FORMAT_VERSION as BUNDLE_VERSION
from ..bundle import MANIFEST as BUNDLE_MANIFEST
from ..bundle import BundleManifest
from ..errors import EngineError

FORMAT_VERSION = 3  # 3: engines of the first layers; fidelity says how deep to look
MANIFEST = "engine.json"
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "fp8")
QUANTIZED = ("int8", "fp8")  # of PRECISIONS: products of 8 bits
DEFAULT_MAX_PAIRS = 256
# With 64 visual tokens and the last SEP the sequences are 80, 88, 96, 112 and 128 slots: multiples
# of the tiles of CPUs and GPUs (81 slots instead of 80 cost OpenVINO 5.6 %). 63 is the longest
# query: 61 wordpieces, CLS and SEP.
DEFAULT_TEXT_BUCKETS = (15, 23, 31, 47, 63)

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Profile:
    """What an engine accepts: at most `max_pairs` pairs, T one of `text_buckets` (ascending)."""

    max_pairs: int
    text_buckets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineManifest:
    """The content of `engine.json`.

    Attributes:
        backend: command-line name of the backend, with `backend_version` of its library.
        precision: one of `PRECISIONS`: what the matrix products run in.
        device: what the engine was built for. `kind` is `cpu` (with `architecture`, `model` and
            `features`, the instruction sets that this precision's kernels may use) or `cuda` (with
            the compute capabilities that it serves, or the GPU that it was built on).
        bundle: the manifest of the bundle it was built from.
        bundle_path: where that bundle lay, for the rebuild command.
        onnx_sha256: hash of the bundle's `joint_encoder.onnx`.
        precision_plan: what was done to that graph: types, what is quantised, what was kept and
            why, the calibration and its data.
        layers: encoder layers that it runs: all of the bundle's, or the first ones.
        token_dtype: dtype of `visual_tokens` it takes: `float16` or `int8`.
        files: sha256 of every file of the folder but this one, by name.
        build_options: flags of the build that another build needs to give the same engine.
        build_seconds: the whole build, fidelity included.
        fidelity: scores against the float32 bundle, with the data they were measured on.
    """

    backend: str
    backend_version: str
    precision: str
    device: Mapping[str, Any]
    profile: Profile
    bundle: BundleManifest
    bundle_path: str
    onnx_sha256: str
    precision_plan: Mapping[str, Any]
    layers: int
    token_dtype: str
    files: Mapping[str, str]
    build_options: Mapping[str, Any]
    build_seconds: float
    fidelity: Mapping[str, Any]
    format_version: int = FORMAT_VERSION

    @property
    def hides_nan(self) -> bool:
        """Whether rounding turns NaN into a number, and the score into a wrong one."""
        return self.precision in QUANTIZED or self.token_dtype == "int8"

    @property
    def is_shallow(self) -> bool:
        """Whether it runs the first layers only: to rule candidates out, not to rank them."""
        return self.layers < self.bundle.sizes.num_layers

    @property
    def words(self) -> str:
        """What it is, in words: `openvino int8`, and its layers where it has not all."""
        some = f", {self.layers} of {self.bundle.sizes.num_layers} layers"
        return f"{self.backend} {self.precision}{some if self.is_shallow else ''}"

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Values, *, folder: Path) -> EngineManifest:
        """Rebuild a manifest from `to_json` values; `folder` is named in messages.

        Raises:
            EngineError: another format version, or fields missing, unknown or of another type
                (all named), with the command that rebuilds the engine.
        """
        hint = "build it again: " + rebuild_command(values, folder)
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise EngineError(
                f"the engine {folder} cannot be opened: format version is {version!r}, "
                f"this edje reads {FORMAT_VERSION}",
                hint=hint,
            )
        faults: list[str] = []
        manifest = read_fields(cls, values, "", faults)
        if manifest is not None:
            faults += _value_faults(manifest)
        if manifest is None or faults:
            raise EngineError(f"{folder / MANIFEST} is damaged", faults=faults, hint=hint)
        return manifest

    def write(self, folder: Path) -> None:
        """Write `engine.json` into `folder`."""
        text = json.dumps(self.to_json(), indent=2) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: StrPath) -> EngineManifest:
        """Read `engine.json` of the engine at `folder`.

        Raises:
            EngineError: no engine there, or a manifest that cannot be read.
        """
        folder = path_of("engine", folder)
        try:
            content = (folder / MANIFEST).read_bytes()
        except OSError as error:
            raise EngineError(
                f"{folder} is not an engine folder: {_why(folder, error)}", hint=_build_hint(folder)
            ) from error
        try:
            values = json.loads(content)
        except ValueError as error:
            raise EngineError(
                f"{folder / MANIFEST} is not JSON: {error}", hint=_build_hint(folder)
            ) from error
        if not isinstance(values, dict):
            raise EngineError(
                f"{folder / MANIFEST} holds {type(values).__name__}, expected an object",
                hint=_build_hint(folder),
            )
        return cls.from_json(values, folder=folder)


def _value_faults(manifest: EngineManifest) -> list[str]:
    """Return what is wrong with values of the right types."""
    faults = []
    if not manifest.profile.text_buckets:
        faults.append("profile.text_buckets: got none, expected whole numbers")
    version = manifest.bundle.format_version
    if version != BUNDLE_VERSION:
        faults.append(f"bundle.format_version: got {version}, this edje reads {BUNDLE_VERSION}")
    return faults


def rebuild_command(values: Values, folder: Path) -> str:
    """Return the shell command that builds the engine at `folder` again, from what is known."""
    profile = values.get("profile")
    profile = profile if isinstance(profile, Mapping) else {}
    options = values.get("build_options")
    options = options if isinstance(options, Mapping) else {}
    words = ["edje", "build", str(values.get("bundle_path", "BUNDLE"))]
    words += ["--backend", str(values.get("backend", "BACKEND"))]
    words += ["--precision", str(values.get("precision", "PRECISION"))]
    if profile.get("max_pairs", DEFAULT_MAX_PAIRS) != DEFAULT_MAX_PAIRS:
        words += ["--max-pairs", str(profile["max_pairs"])]
    buckets = profile.get("text_buckets", DEFAULT_TEXT_BUCKETS)
    if isinstance(buckets, list | tuple) and tuple(buckets) != DEFAULT_TEXT_BUCKETS:
        words += ["--text-buckets", ",".join(str(bucket) for bucket in buckets)]
    if values.get("token_dtype", "float16") != "float16":
        words += ["--tokens", str(values["token_dtype"])]
    words += [word for name, value in options.items() for word in option_words(name, value)]
    return shlex.join([*words, "--out", str(folder), "--overwrite"])


# Entries of `build_options` that are options of `edje build`, too.
_FLAGS = (
    *("image_encoder", "calibration_random", "hardware_compatible"),
    *("version_compatible", "report"),
)
_VALUES = (
    *("calibration_store", "calibration_queries", "min_kendall_tau", "max_top1_change"),
    *("layers", "role", "optimization_level"),
)


def option_words(name: str, value: Any) -> list[str]:
    """Return how `edje build` spells an entry of `build_options`, if it does."""
    option = "--" + name.replace("_", "-")
    if name in _FLAGS:
        return [option] if value else []
    if name in _VALUES:
        return [option, str(value)]
    if name == "workspace_bytes" and isinstance(value, int):
        return ["--workspace-mb", str(value // 2**20)]
    if name == "compute_capabilities" and isinstance(value, list | tuple):
        return [word for one in value for word in ("--compute-capability", str(one))]
    return []


def _why(folder: Path, error: OSError) -> str:
    if not folder.exists():
        return "it does not exist"
    if (folder / BUNDLE_MANIFEST).exists():
        return "it is a model bundle"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return f"it holds no {MANIFEST}"
    return f"cannot read {MANIFEST} ({error.strerror})"


def _build_hint(folder: Path) -> str:
    if (folder / BUNDLE_MANIFEST).exists():
        bundle = shlex.quote(str(folder))
        return f"build an engine from it: edje build {bundle} --backend openvino --out ENGINE"
    return "make one with `edje build BUNDLE --backend B --precision P --out ENGINE`"
