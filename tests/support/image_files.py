"""Images in files and tars, as tests of indexing need them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def png(colour: int = 0) -> bytes:
    return encoded(Image.new("RGB", (5, 5), (colour,) * 3))


def noise(mode: str = "RGB", width: int = 40, height: int = 30) -> Image.Image:
    """An image in any of Pillow's modes; another for every width."""
    values = np.random.default_rng(width).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(values, "RGBA").convert(mode)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], kind: str | None = None) -> Path:
    """Write a tar with these members, in order; `kind`: its compression, else by the name."""
    kind = ("gz" if path.suffix in (".gz", ".tgz") else "") if kind is None else kind
    with tarfile.open(path, f"w:{kind}") as tar:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
