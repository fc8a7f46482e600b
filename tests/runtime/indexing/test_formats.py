"""Raster formats are opened; what starts programs or renders is not, and its name is said."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from edje.bundle import ImageSpec
from edje.runtime.indexing.decoders import DecoderPool
from edje.runtime.indexing.images import Unreadable, decode_entry
from edje.runtime.indexing.sources import ImageFile

SPEC = ImageSpec(8, 2, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SAVED = [
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG"),
    *("PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP"),
]


def saved(name: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 10, 10)).save(content, name)
    return content.getvalue()


def decoded(path: Path, content: bytes) -> object:
    """What comes of the bytes in a file whose name says nothing true."""
    path.write_bytes(content)
    from_file = decode_entry(ImageFile("cat.jpg", path), SPEC)
    from_memory = decode_entry(ImageFile("cat.jpg", path, content=content), SPEC)
    assert type(from_file) is type(from_memory)
    return from_file


@pytest.mark.parametrize("name", SAVED)
def test_raster_formats_are_read_whatever_the_name_says(tmp_path: Path, name: str) -> None:
    try:
        content = saved(name)
    except (OSError, KeyError) as error:
        pytest.skip(f"this Pillow does not write {name}: {error}")
    assert not isinstance(decoded(tmp_path / "cat.jpg", content), Unreadable)


WMF = b"\xd7\xcd\xc6\x9a\0\0" + bytes(10) + b"\x01\0\x09\0" + bytes(40)
EMF = b"\x01\0\0\0" + bytes(36) + b" EMF" + bytes(80)
NO_RASTER = [
    (saved("EPS"), "PostScript (EPS) is no raster image"),
    (b"\xc5\xd0\xd3\xc6" + bytes(60), "PostScript (EPS) is no raster image"),
    (b"%!FontType1", "PostScript (EPS) is no raster image"),
    (b"%PDF-1.7\n", "PDF is no raster image"),
    (WMF, "a Windows metafile (WMF or EMF) is no raster image"),
    (EMF, "a Windows metafile (WMF or EMF) is no raster image"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG is no raster image"),
    (b'<?xml version="1.0"?>\n<!-- made -->\n<svg width="4"/>', "SVG is no raster image"),
    (b"SIMPLE  =                    T" + bytes(50), "FITS is not among the formats"),
    (b"\n<!DOCTYPE HTML><title>404</title>", "is a web page (HTML), no image"),
    (b"\0\0\0\x18ftypheic" + bytes(16), "HEIF is read where an opener is registered"),
    (b"\0\0\0\x18ftypmp42" + bytes(16), "is a video (MP4 or QuickTime), no image"),
    (b"PK\3\4" + bytes(30), "is a zip archive, no image"),
    (b"a caption", "not an image of a known format"),
    (b"\xff", "not an image of a known format"),
]


@pytest.mark.parametrize(("content", "reason"), NO_RASTER)
def test_what_is_no_raster_image_is_called_by_its_name(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    found = decoded(tmp_path / "cat.jpg", content)
    assert isinstance(found, Unreadable)
    assert found.reason.startswith(reason)


def test_no_program_is_started_for_postscript(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, tools = tmp_path / "started", tmp_path / "bin"
    tools.mkdir()
    (tools / "gs").write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    (tools / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "cat.jpg").write_bytes(saved("EPS"))
    with DecoderPool(SPEC, 1) as pool:
        (found,) = pool.submit([ImageFile("cat.jpg", tmp_path / "cat.jpg")]).result()
    assert isinstance(found, Unreadable)
    assert not log.exists()
