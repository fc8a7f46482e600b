"""The graphs that make stored tokens: of `pixels` (image encoder), of `features` (adapter)."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arguments import StrPath, path_of
from ..arrays import Float16, Float32, UInt8
from ..bundle import ADAPTER, IMAGE_ENCODER, MANIFEST, BundleManifest, ImageSpec
from ..errors import EngineError, RequestError
from ..machine import thread_limit
from .manifest import MANIFEST as ENGINE_MANIFEST

Run = Callable[[Float32], npt.NDArray[np.generic]]

DEVICES = ("auto", "cpu", "cuda")
_CUDA = "CUDAExecutionProvider"


class ImageEncoder:
    """`image_encoder.onnx` of a bundle or an engine folder, in float32.

    Attributes:
        manifest: of the bundle.
        image: how image files become `pixels`.
        name: the library that runs it, with its version, and the device.
    """

    def __init__(self, manifest: BundleManifest, image: ImageSpec, name: str, run: Run):
        self.manifest = manifest
        self.image = image
        self.name = name
        self._run = run

    @classmethod
    def open(cls, folder: StrPath, *, device: str = "auto") -> ImageEncoder:
        """Open the image encoder of a bundle or an engine folder.

        Args:
            folder: of the bundle or the engine.
            device: `cuda` (ONNX Runtime), `cpu` (OpenVINO, else ONNX Runtime), or `auto`: CUDA
                where ONNX Runtime runs on it, else the CPU.

        Raises:
            EngineError: no such folder, one without image encoder, no library that runs it, or
                no CUDA where it was asked for.
            CheckpointError: a damaged bundle manifest.
            RequestError: `folder` is no path, or no such device.
        """
        folder = path_of("folder", folder)
        manifest, model = read_manifest(folder), folder / IMAGE_ENCODER
        if manifest.image is None or not model.is_file():
            raise EngineError(
                f"{folder} holds no image encoder ({IMAGE_ENCODER})",
                hint="export with --vision-model DIR; for an engine, build with --image-encoder",
            )
        name, run = _open_model(model, device)
        return cls(manifest, manifest.image, name, run)

    def encode(self, pixels: Float32) -> Float16:
        """Return the visual tokens float16 [B, m, H], the caller's, of a batch of images.

        Args:
            pixels: float32 [B, 3, R, R], host.

        Raises:
            EngineError: the graph gives another dtype or shape than the manifest says.
        """
        return _checked(self._run(pixels), len(pixels), self.manifest, IMAGE_ENCODER)

    def encode_rgb(self, rgb: UInt8) -> Float16:
        """Return the visual tokens float16 [B, m, H], the caller's, of decoded images.

        Args:
            rgb: uint8 [B, R, R, 3], host, from `decode_entry`.

        Raises:
            EngineError: the graph gives another dtype or shape than the manifest says.
        """
        return self.encode(pixels_from_rgb(rgb, self.image))


class FeatureEncoder:
    """`adapter.onnx` of a bundle, in float32: for those who have patch features already.

    Attributes:
        manifest: of the bundle.
        name: the library that runs it, with its version, and the device.
    """

    def __init__(self, manifest: BundleManifest, name: str, run: Run):
        self.manifest = manifest
        self.name = name
        self._run = run

    @classmethod
    def open(cls, folder: StrPath, *, device: str = "auto") -> FeatureEncoder:
        """Open the adapter of a bundle; arguments and errors are those of `ImageEncoder.open`."""
        folder = path_of("folder", folder)
        manifest, model = read_manifest(folder), folder / ADAPTER
        if not model.is_file():
            raise EngineError(
                f"{folder} holds no adapter ({ADAPTER}); engine folders carry none",
                hint="give the bundle that `edje export` wrote",
            )
        name, run = _open_model(model, device)
        return cls(manifest, name, run)

    def encode(self, features: npt.NDArray[np.floating]) -> Float16:
        """Return the visual tokens float16 [B, m, H], the caller's, of the features of images.

        Args:
            features: float16 or float32 [B, N, D], host.

        Raises:
            EngineError: the graph gives another dtype or shape than the manifest says.
        """
        tokens = self._run(np.asarray(features, np.float32))
        return _checked(tokens, len(features), self.manifest, ADAPTER)


def _checked(
    tokens: npt.NDArray[np.generic], num_images: int, manifest: BundleManifest, graph: str
) -> Float16:
    """Return `tokens` if they are what the manifest says."""
    expected = (num_images, manifest.sizes.num_tokens, manifest.sizes.hidden)
    if tokens.dtype != np.float16 or tokens.shape != expected:
        raise EngineError(
            f"{graph} gave {tokens.dtype} {list(tokens.shape)}, expected float16 {list(expected)}",
            hint="export the bundle again with `edje export`",
        )
    return np.asarray(tokens, dtype=np.float16)


def read_manifest(folder: Path) -> BundleManifest:
    """Return the bundle manifest of a bundle, or the one that an engine folder carries."""
    path = folder / ENGINE_MANIFEST
    if not path.is_file():
        if not (folder / MANIFEST).is_file():
            raise EngineError(
                f"{folder} is neither a model bundle ({MANIFEST}) nor an engine "
                f"folder ({ENGINE_MANIFEST})",
                hint="make a bundle with `edje export`, or an engine with `edje build`",
            )
        return BundleManifest.read(folder)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["bundle"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"cannot read {path}: {error!r}", hint="build the engine again with `edje build`"
        ) from error
    return BundleManifest.from_json(values, source=str(path))


def _open_model(model: Path, device: str) -> tuple[str, Run]:
    """Return what runs the graph (library, version, device) and a call input -> tokens."""
    if device not in DEVICES:
        raise RequestError(f"device is {device!r}, expected one of {', '.join(DEVICES)}")
    if device != "cpu":
        opened = _opened(_open_cuda, model)
        if not isinstance(opened, str):
            return opened
        if device == "cuda":
            raise EngineError(
                f"{model.name} cannot run on CUDA here: {opened}",
                hint="pip install 'edje-runtime[gpu-onnxruntime]' in place of onnxruntime; "
                "or --device cpu",
            )
    failed = []
    for opener in (_open_openvino, _open_onnxruntime):
        opened = _opened(opener, model)
        if not isinstance(opened, str):
            return opened
        failed.append(opened)
    raise EngineError(
        f"running {model.name} needs OpenVINO or ONNX Runtime; neither is installed",
        faults=failed,
        hint="pip install 'edje-runtime[cpu]'",
    )


class _NotHere(Exception):
    """A library is here, but the device is not."""


def _opened(opener: Callable[[Path], tuple[str, Run]], model: Path) -> tuple[str, Run] | str:
    """Return the opened model, or why this library cannot run here at all."""
    try:
        return opener(model)
    except (ImportError, _NotHere) as error:
        return str(error)
    except Exception as error:  # each library has exceptions of its own
        raise EngineError(
            f"cannot open {model}: {error}", hint="export the bundle again with `edje export`"
        ) from error


def _open_openvino(model: Path) -> tuple[str, Run]:
    import openvino

    from .openvino_core import DEVICE, openvino_core

    # float32 even where the CPU has bf16: stored tokens outlive every engine.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    limit = thread_limit(sees_affinity=True)
    if limit is not None:
        settings["INFERENCE_NUM_THREADS"] = str(limit)
    compiled = openvino_core().compile_model(model, DEVICE, settings)
    output = compiled.output(0)
    return f"openvino {openvino.__version__} cpu", lambda inputs: compiled([inputs])[output]


def _open_onnxruntime(model: Path) -> tuple[str, Run]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = thread_limit(sees_affinity=False) or 0  # 0: all cores
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return f"onnxruntime {onnxruntime.__version__} cpu", _running(session)


def _open_cuda(model: Path) -> tuple[str, Run]:
    import onnxruntime

    if _CUDA not in onnxruntime.get_available_providers():
        raise _NotHere(f"onnxruntime {onnxruntime.__version__} has no {_CUDA}")
    # Without TF32, for the same reason as float32 on the CPU.
    providers = [(_CUDA, {"use_tf32": "0"}), "CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(model), providers=providers)
    if session.get_providers()[0] != _CUDA:  # it falls back to the CPU in silence
        failure = f"onnxruntime {onnxruntime.__version__} cannot start {_CUDA}"
        raise _NotHere(f"{failure}: no GPU, or no CUDA libraries")
    return f"onnxruntime {onnxruntime.__version__} cuda", _running(session)


def _running(session: Any) -> Run:
    name = session.get_inputs()[0].name
    return lambda inputs: session.run(None, {name: inputs})[0]


def pixels_from_rgb(rgb: UInt8, spec: ImageSpec) -> Float32:
    """Return `pixels` float32 [..., 3, R, R], C-contiguous, of RGB uint8 [..., R, R, 3]."""
    pixels = np.empty((*rgb.shape[:-3], 3, *rgb.shape[-3:-1]), np.float32)
    for channel, table in enumerate(_pixel_values(spec)):
        pixels[..., channel, :, :] = table[rgb[..., channel]]
    return pixels


@lru_cache(maxsize=8)
def _pixel_values(spec: ImageSpec) -> Float32:
    """Return what each byte becomes in each channel: float32 [3, 256]."""
    # float64 first, then float32: the processor's own rounding.
    scaled = (np.arange(256).astype(np.float64) * spec.rescale_factor).astype(np.float32)
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    return np.asarray((scaled[None] - mean[:, None]) / std[:, None], np.float32)
