"""The image encoder of a bundle or an engine folder: `pixels` -> visual tokens, on the CPU."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..bundle import IMAGE_ENCODER, MANIFEST, BundleManifest, ImageSpec
from ..engines.manifest import MANIFEST as ENGINE_MANIFEST
from ..errors import EngineError

Float16 = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]
Run = Callable[[Float32], npt.NDArray[np.generic]]


class ImageEncoder:
    """`image_encoder.onnx` of a bundle or an engine folder, on the CPU in float32.

    Attributes:
        manifest: of the bundle.
        image: how image files become `pixels`.
        name: the library that runs it, with its version.
    """

    def __init__(
        self,
        manifest: BundleManifest,
        image: ImageSpec,
        name: str,
        run: Run,
    ):
        self.manifest = manifest
        self.image = image
        self.name = name
        self._run = run

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> ImageEncoder:
        """Open the image encoder of a bundle or an engine folder: OpenVINO, else ONNX Runtime.

        Raises:
            EngineError: no such folder, one without image encoder, or neither library installed.
            CheckpointError: a damaged bundle manifest.
        """
        manifest = _read_manifest(Path(folder))
        model = Path(folder) / IMAGE_ENCODER
        if manifest.image is None or not model.is_file():
            raise EngineError(
                f"{folder} holds no image encoder ({IMAGE_ENCODER})",
                hint="export with --vision-model DIR; for an engine, build with --image-encoder",
            )
        name, run = _open_model(model)
        return cls(manifest, manifest.image, name, run)

    def encode(self, pixels: Float32) -> Float16:
        """Return the visual tokens float16 [B, m, H], the caller's, of a batch of images.

        Args:
            pixels: float32 [B, 3, R, R], host.

        Raises:
            EngineError: the graph gives another dtype or shape than the manifest says.
        """
        tokens = self._run(pixels)
        sizes = self.manifest.sizes
        expected = (len(pixels), sizes.num_tokens, sizes.hidden)
        if tokens.dtype != np.float16 or tokens.shape != expected:
            raise EngineError(
                f"{IMAGE_ENCODER} gave {tokens.dtype} {list(tokens.shape)}, "
                f"expected float16 {list(expected)}",
                hint="export the bundle again with `edje export`",
            )
        return np.asarray(tokens, dtype=np.float16)


def _read_manifest(folder: Path) -> BundleManifest:
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


def _open_model(model: Path) -> tuple[str, Run]:
    """Return the library's name and version, and a call `pixels` -> `visual_tokens`."""
    failed = []
    for opener in (_open_openvino, _open_onnxruntime):
        try:
            return opener(model)
        except ImportError as error:
            failed.append(str(error))
        except Exception as error:  # each library has exceptions of its own
            raise EngineError(
                f"cannot open {model}: {error}",
                hint="export the bundle again with `edje export`",
            ) from error
    raise EngineError(
        "running an image encoder needs OpenVINO or ONNX Runtime; neither is installed",
        faults=failed,
        hint="pip install 'edje-runtime[cpu]'",
    )


def _open_openvino(model: Path) -> tuple[str, Run]:
    import openvino

    # float32 even where the CPU has bf16: stored tokens outlive every engine.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    output = compiled.output(0)
    return f"openvino {openvino.__version__}", lambda pixels: compiled([pixels])[output]


def _open_onnxruntime(model: Path) -> tuple[str, Run]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    version = f"onnxruntime {onnxruntime.__version__}"
    return version, lambda pixels: session.run(None, {name: pixels})[0]
