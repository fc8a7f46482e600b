"""An image file -> `pixels`, exactly as the official code and transformers' processor make them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..bundle import ImageSpec
from ..errors import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Why a file gave no pixels."""

    reason: str


def decode_image(path: Path, spec: ImageSpec) -> Float32 | Unreadable:
    """Return `pixels` float32 [3, R, R] of an image file, the caller's, or why there are none.

    As in the official code, transparency is dropped (the colours below it show), the rotation
    noted in EXIF is not applied, and of an animation the first frame counts.

    Raises:
        RequestError: Pillow is not installed.

    Source: EDJE `data/*_dataset.py` (`convert("RGB")`), then transformers' SiglipImageProcessor
    (PIL).
    """
    image_module = import_pillow()
    if not path.is_file():  # opening a pipe would wait for ever
        return Unreadable("is not a file" if path.exists() else "no such file")
    try:
        with image_module.open(path) as image:
            return pixels_from_image(image, spec)
    except image_module.UnidentifiedImageError:
        return Unreadable("not an image of a known format")
    # Damaged files make Pillow's decoders raise nearly anything; none may end a run of millions.
    except Exception as error:
        detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Unreadable(f"cannot be decoded: {detail}")


def pixels_from_image(image: Image, spec: ImageSpec) -> Float32:
    """Return `pixels` float32 [3, R, R] of a Pillow image: RGB, squashed, scaled, normalised."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    resized = image.convert("RGB").resize((spec.size, spec.size), resample=spec.resample)
    # float64 first, then float32: the processor's own rounding.
    scaled = (np.asarray(resized).astype(np.float64) * spec.rescale_factor).astype(np.float32)
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1))


def import_pillow() -> Any:
    """Return the module `PIL.Image`.

    Raises:
        RequestError: Pillow is not installed.
    """
    try:
        from PIL import Image as image_module
    except ImportError as error:
        raise RequestError(
            "reading images needs Pillow, which is not installed",
            hint="pip install 'edje-runtime[index]'",
        ) from error
    return image_module
