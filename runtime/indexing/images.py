"""An image file -> `pixels`, exactly as the official code and transformers' processor make them.

In two steps, so that little travels between processes: a decoder gives RGB bytes of the model's
size, and `pixels_from_rgb` scales and normalises them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ...bundle import ImageSpec
from ...errors import RequestError
from .formats import HEAD_BYTES, opened_formats, why_not_opened
from .sources import ImageFile

if TYPE_CHECKING:
    from PIL.Image import Image

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]


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
    rgb = decode_entry(ImageFile(path.name, path), spec)
    return rgb if isinstance(rgb, Unreadable) else pixels_from_rgb(rgb, spec)


def decode_entry(entry: ImageFile, spec: ImageSpec) -> UInt8 | Unreadable:
    """Return the image as RGB uint8 [R, R, 3], the caller's, or why there is none.

    `decode_image` in its first step, for the files of folders and the members of tars.

    Raises:
        RequestError: Pillow is not installed.
    """
    image_module = import_pillow()
    fault = _file_fault(entry)
    if fault:
        return Unreadable(fault)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes that `_rgb` refuses
            return _rgb(image_module, entry.open(), spec)
    except image_module.UnidentifiedImageError:
        return Unreadable(why_not_opened(image_module, _head_of(entry)))
    # Damaged files make Pillow's decoders raise nearly anything; none may end a run of millions.
    except Exception as error:
        detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Unreadable(f"cannot be decoded: {detail}")


def _file_fault(entry: ImageFile) -> str | None:
    """Return why there is nothing to open: opening a pipe, for one, would wait for ever."""
    if entry.content is not None:
        return None if entry.content else "is empty"
    if not entry.path.is_file():
        return "is not a file" if entry.path.exists() else "no such file"
    size = entry.path.stat().st_size if entry.start is None else entry.num_bytes
    return None if size else "is empty"


def _head_of(entry: ImageFile) -> bytes:
    opened = entry.open()
    if isinstance(opened, Path):
        with opened.open("rb") as file:
            return file.read(HEAD_BYTES)
    return opened.read(HEAD_BYTES)


def _rgb(image_module: Any, opened: Path | BinaryIO, spec: ImageSpec) -> UInt8 | Unreadable:
    with image_module.open(opened, formats=opened_formats(image_module)) as image:
        width, height = image.size
        limit = image_module.MAX_IMAGE_PIXELS  # None: the user has lifted it
        if limit is not None and width * height > limit:
            return Unreadable(
                f"has {width:,} x {height:,} pixels; more than {limit:,} exceeds limit"
            )
        return rgb_from_image(image, spec)


def rgb_from_image(image: Image, spec: ImageSpec) -> UInt8:
    """Return a Pillow image as RGB uint8 [R, R, 3], squashed to the model's size."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    resized = image.convert("RGB").resize((spec.size, spec.size), resample=spec.resample)
    return np.array(resized)


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
