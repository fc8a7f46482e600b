"""Pixels are those of transformers' SiglipImageProcessor; what is not opened gives a reason."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edje.bundle import ImageSpec
from edje.errors import RequestError
from edje.runtime.indexing.decoders import DecoderPool
from edje.runtime.indexing.images import Unreadable, decode_entry, decode_image
from edje.runtime.indexing.sources import ImageFile
from image_files import encoded, noise

SPEC = ImageSpec(24, 2, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BICUBIC = ImageSpec(17, 3, 1 / 255, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
MODES = ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "YCbCr"]


def official(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Return float32 [3, R, R]: the official datasets' conversion, then transformers' own."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    processor = SiglipImageProcessorPil(
        size={"height": spec.size, "width": spec.size},
        resample=spec.resample,
        rescale_factor=spec.rescale_factor,
        image_mean=list(spec.mean),
        image_std=list(spec.std),
    )
    return np.asarray(processor(image.convert("RGB"), return_tensors="np")["pixel_values"][0])


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # the official path's
@pytest.mark.parametrize("spec", [SPEC, BICUBIC], ids=["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(24, 24), (70, 31), (5, 90), (1, 1)])
@pytest.mark.parametrize("mode", MODES)
def test_pixels_equal_those_of_transformers(
    tmp_path: Path, mode: str, size: tuple[int, int], spec: ImageSpec
) -> None:
    path = tmp_path / ("image.tif" if mode in ("CMYK", "YCbCr") else "image.png")
    noise(mode, *size).save(path)
    got = decode_image(path, spec)
    assert not isinstance(got, Unreadable)
    assert got.dtype == np.float32
    assert got.shape == (3, spec.size, spec.size)
    assert got.flags.c_contiguous
    with Image.open(path) as image:
        assert np.abs(got - official(image, spec)).max() <= 1e-6


def test_transparency_is_dropped_as_the_official_code_does(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.save(tmp_path / "p.png", transparency=0)
    got = decode_image(tmp_path / "p.png", SPEC)
    assert not isinstance(got, Unreadable)
    assert (got[0] == 1).all()
    assert (got[1:] == -1).all()


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    got = decode_image(tmp_path / "a.gif", SPEC)
    assert not isinstance(got, Unreadable)
    assert (got == 1).all()


def test_unreadable_files_give_a_reason(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").touch()
    noise("RGB", 90, 90).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    expected = {
        "text.jpg": Unreadable("not an image of a known format"),
        "empty.png": Unreadable("is empty"),
        "cut.png": Unreadable("cannot be decoded: image file is truncated"),
        "folder.png": Unreadable("is not a file"),
        "pipe.png": Unreadable("is not a file"),
        "none.png": Unreadable("no such file"),
        "text.jpg/below.png": Unreadable("no such file"),
        "loop.png": Unreadable("is a link in a ring of links, which leads to no file"),
    }
    assert {name: decode_image(tmp_path / name, SPEC) for name in expected} == expected


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (300, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300 * 200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = decode_image(tmp_path / "bomb.png", SPEC)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        far_too_large = decode_image(tmp_path / "bomb.png", SPEC)
    rest = "--max-pixels raises it"
    assert got == Unreadable(f"has 300 x 300 pixels, more than the limit of 60,000; {rest}")
    assert far_too_large == Unreadable(f"has 90,000 pixels, more than the limit of 100; {rest}")


def test_missing_pillow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(RequestError, match=r"pip install 'edje-runtime\[index\]'"):
        decode_image(tmp_path / "a.png", SPEC)


SAVED = [
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG"),
    *("PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP"),
]


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
        content = encoded(Image.new("RGB", (16, 16), "red"), name)
    except (OSError, KeyError) as error:
        pytest.skip(f"this Pillow does not write {name}: {error}")
    assert not isinstance(decoded(tmp_path / "cat.jpg", content), Unreadable)


EPS = encoded(Image.new("RGB", (16, 16), "red"), "EPS")
WMF = b"\xd7\xcd\xc6\x9a\0\0" + bytes(10) + b"\x01\0\x09\0" + bytes(40)
EMF = b"\x01\0\0\0" + bytes(36) + b" EMF" + bytes(80)
NO_RASTER = [
    (EPS, "PostScript (EPS) is no raster image"),
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
    (tmp_path / "cat.jpg").write_bytes(EPS)
    with DecoderPool(SPEC, 1) as pool:
        (found,) = pool.submit([ImageFile("cat.jpg", tmp_path / "cat.jpg")]).result()
    assert isinstance(found, Unreadable)
    assert not log.exists()
