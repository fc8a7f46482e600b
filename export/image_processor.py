"""The SigLIP folder's image processor: how an image becomes the pixels that the tower was fed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bundle import ImageSpec
from ..errors import CheckpointError


def read_settings(path: Path, option: str) -> dict[str, Any]:
    """Return the object that a JSON file holds; `option` of the command line named its folder.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error}",
            hint=f"pass {option} a Hugging Face model folder (config.json and its files)",
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} holds {type(values).__name__}, expected an object",
            hint=f"pass {option} a Hugging Face model folder as transformers saves it",
        )
    return values


PROCESSOR = "processor_config.json"  # transformers 5: every part of a processor, nested
IMAGE_PROCESSOR = "preprocessor_config.json"  # transformers 4, and an image processor alone
OPTION = "--vision-model"
TYPES = ("SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil")
# Source: transformers' SiglipImageProcessor. A setting that is absent or null is this.
DEFAULTS: Mapping[str, Any] = {
    "image_processor_type": TYPES[0],
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_center_crop": False,
    "do_pad": False,
    "size": {"height": 224, "width": 224},
    "resample": 3,  # Pillow's bicubic
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
LAST_RESAMPLE = 5  # Pillow's numbers: 0 nearest to 5 Hamming


def read_image_processor(folder: Path) -> dict[str, Any]:
    """Return every setting of the folder's image processor, defaults included.

    Where both files have them, those nested in `processor_config.json` win, as in transformers 5.

    Raises:
        CheckpointError: neither file has them, or one cannot be read.
    """
    values: Any = None
    if (folder / PROCESSOR).exists():
        values = read_settings(folder / PROCESSOR, OPTION).get("image_processor")
    if values is None and (folder / IMAGE_PROCESSOR).exists():
        values = read_settings(folder / IMAGE_PROCESSOR, OPTION)
    if not isinstance(values, Mapping):
        raise CheckpointError(
            f"{folder} has no settings of an image processor: expected {IMAGE_PROCESSOR}, or "
            f"{PROCESSOR} with `image_processor` in it",
            hint=f"pass {OPTION} the SigLIP folder as transformers saves it",
        )
    return {**DEFAULTS, **{name: value for name, value in values.items() if value is not None}}


def image_spec(settings: Mapping[str, Any], image_size: int, faults: list[str]) -> ImageSpec | None:
    """Return the preprocessing that `settings` ask for; what we do not do goes to `faults`.

    Args:
        settings: those of `read_image_processor`.
        image_size: R, the side of the square that the tower takes.
    """
    wrong = list(_step_faults(settings))
    side = settings["size"]
    sides = {side.get("height"), side.get("width")} if isinstance(side, dict) else {side}
    if sides != {image_size}:
        wrong.append(f"size: got {side}, expected {image_size} squared")
    resample = settings["resample"]
    if not _is_number(resample) or resample not in range(LAST_RESAMPLE + 1):
        wrong.append(f"resample: got {resample!r}, expected 0 to {LAST_RESAMPLE}, as in Pillow")
    factor = settings["rescale_factor"] if settings["do_rescale"] else 1.0
    if not _is_number(factor) or not factor > 0:
        wrong.append(f"rescale_factor: got {factor!r}, expected a number above 0")
    mean = _three(settings["image_mean"]) if settings["do_normalize"] else (0.0, 0.0, 0.0)
    std = _three(settings["image_std"]) if settings["do_normalize"] else (1.0, 1.0, 1.0)
    if mean is None:
        wrong.append(f"image_mean: got {settings['image_mean']!r}, expected three numbers")
    if std is None or 0.0 in std:
        wrong.append(f"image_std: got {settings['image_std']!r}, expected three numbers but 0")
    faults += [f"image processor {fault}" for fault in wrong]
    if wrong or mean is None or std is None:
        return None
    return ImageSpec(image_size, int(resample), float(factor), mean, std)


def _step_faults(settings: Mapping[str, Any]) -> list[str]:
    """Name what another kind of processor would do: an image is squashed to the square here."""
    faults = []
    kind = settings["image_processor_type"]
    if kind not in TYPES:
        faults.append(f"image_processor_type: got {kind!r}, expected {TYPES[0]!r}")
    for name, expected in (("do_resize", True), ("do_center_crop", False), ("do_pad", False)):
        if bool(settings[name]) != expected:
            faults.append(f"{name}: got {settings[name]!r}, expected {expected}")
    return faults


def _three(value: Any) -> tuple[float, float, float] | None:
    """Return one number a channel; a single number is all three."""
    numbers = [value] * 3 if _is_number(value) else value
    if not isinstance(numbers, list) or len(numbers) != 3 or not all(map(_is_number, numbers)):
        return None
    return float(numbers[0]), float(numbers[1]), float(numbers[2])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
