"""One image file: the raster formats that are opened, decoding, and the pixels an encoder takes."""

from __future__ import annotations

import errno
import pickle
import re
import stat
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ...arrays import Float32, UInt8
from ...bundle import ImageSpec
from ...engines.image import pixels_from_rgb
from ...errors import RequestError
from .sources import ImageFile

if TYPE_CHECKING:
    from PIL.Image import Image


# What Pillow itself decodes, in this process, from pixels. Not among them: what starts programs
# (EPS: Ghostscript), renders (WMF), opens whatever it finds inside (IPTC), or holds measurements
# and films (FITS, GRIB, HDF5, BUFR, MPEG).
RASTER = frozenset(
    (
        *("AVIF", "BMP", "CUR", "DCX", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000"),
        *("MPO", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP"),
        *("XBM", "XPM"),
    )
)
HEAD_BYTES = 512  # enough to tell what a file is

_ABSENCES = {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "no such file"),
    errno.ELOOP: "is a link in a ring of links, which leads to no file",
}
_NAMES = {"EPS": "PostScript (EPS)", "WMF": "a Windows metafile (WMF or EMF)"}
# How files begin that Pillow does not know.
_MARKS = (
    (b"%!", "PostScript (EPS) is no raster image"),
    (b"%PDF", "PDF is no raster image"),
    (b"PK\3\4", "is a zip archive, no image"),
    (b"\x1f\x8b", "is a gzip archive, no image"),
    (b"\x1a\x45\xdf\xa3", "is a video (Matroska or WebM), no image"),
    *(
        (mark, "JPEG XL is read where an opener is registered (as --plugin pillow_jxl does)")
        for mark in (b"\xff\x0a", b"\0\0\0\x0cJXL ")
    ),
)
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


def registered_openers(image_module: Any) -> dict[str, tuple[Any, Any]]:
    """Return (factory, accept) of the formats that somebody else than Pillow has registered."""
    return {
        name: opener for name, opener in image_module.OPEN.items() if not is_pillows_own(opener[0])
    }


def is_pillows_own(item: Any) -> bool:
    """Return whether a class or function is part of Pillow."""
    return str(getattr(item, "__module__", "")).partition(".")[0] == "PIL"


def opened_formats(image_module: Any) -> tuple[str, ...]:
    """Return the formats to open: those that were registered, then Pillow's raster formats."""
    registered = registered_openers(image_module)
    image_module.init()  # loads the plugins; it must not take back what was registered before
    for name, (factory, accept) in registered.items():
        image_module.register_open(name, factory, accept)
    own = (name for name in image_module.ID if name in RASTER and name not in registered)
    return (*registered, *own)


def why_not_opened(image_module: Any, head: bytes) -> str:
    """Return what a file is that no opened format takes, from its first `HEAD_BYTES`."""
    for start, reason in _MARKS:
        if head.startswith(start):
            return reason
    opened = opened_formats(image_module)
    for name in image_module.ID:
        if name not in opened and _accepts(image_module.OPEN[name][1], head):
            if name in _NAMES:
                return f"{_NAMES[name]} is no raster image"
            return f"{name} is not among the formats that are read"
    return _why_not_text(head) or _why_not_media(head) or "not an image of a known format"


def _accepts(accept: Any, head: bytes) -> bool:
    # Pillow hands them 16 bytes; some look at places that a shorter file does not have.
    return accept is not None and accept(head[:16].ljust(16, b"\0")) is True


def _why_not_text(head: bytes) -> str | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "is a web page (HTML), no image"
    is_xml = text.startswith((b"<?xml", b"<!--", b"<!doctype svg"))
    if text.startswith(b"<svg") or (is_xml and b"<svg" in text):
        return "SVG is no raster image"
    return None


def _why_not_media(head: bytes) -> str | None:
    if head[4:8] == b"ftyp":
        if head[8:12] in _HEIF_BRANDS:
            return (
                "HEIF is read where an opener is registered "
                "(as --plugin pillow_heif.HeifImagePlugin does)"
            )
        if head[8:12] not in (b"avif", b"avis"):
            return "is a video (MP4 or QuickTime), no image"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "is a video (AVI), no image"
    return None


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
    except image_module.DecompressionBombError as error:  # Pillow's own, at twice the limit
        count = re.search(r"\d+", str(error))
        size = f"{int(count[0]):,}" if count else "too many"
        return _too_large(size, image_module.MAX_IMAGE_PIXELS)
    # Damaged files make Pillow's decoders raise nearly anything; none may end a run of millions.
    except Exception as error:
        detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Unreadable(f"cannot be decoded: {detail}")


def _file_fault(entry: ImageFile) -> str | None:
    """Return why there is nothing to open: opening a pipe, for one, would wait for ever."""
    if entry.content is not None:
        return None if entry.content else "is empty"
    try:
        found = entry.path.stat()
    except OSError as error:
        return _ABSENCES.get(error.errno or 0) or f"cannot be opened: {error.strerror}"
    if not stat.S_ISREG(found.st_mode):
        return "is not a file"
    size = found.st_size if entry.start is None else entry.num_bytes
    return None if size else "is empty"


def _head_of(entry: ImageFile) -> bytes:
    opened = entry.open()
    with opened.open("rb") if isinstance(opened, Path) else opened as file:
        return file.read(HEAD_BYTES)


def _rgb(image_module: Any, opened: Path | BinaryIO, spec: ImageSpec) -> UInt8 | Unreadable:
    with image_module.open(opened, formats=opened_formats(image_module)) as image:
        width, height = image.size
        limit = image_module.MAX_IMAGE_PIXELS  # None: the user has lifted it
        if limit is not None and width * height > limit:
            return _too_large(f"{width:,} x {height:,}", limit)
        return rgb_from_image(image, spec)


def _too_large(size: str, limit: int) -> Unreadable:
    return Unreadable(
        f"has {size} pixels, more than the limit of {limit:,}; --max-pixels raises it"
    )


def rgb_from_image(image: Image, spec: ImageSpec) -> UInt8:
    """Return a Pillow image as RGB uint8 [R, R, 3], squashed to the model's size."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    resized = image.convert("RGB").resize((spec.size, spec.size), resample=spec.resample)
    return np.array(resized)


def import_pillow() -> Any:
    """Return the module `PIL.Image`; a RequestError says that it is not installed."""
    try:
        from PIL import Image as image_module
    except ImportError as error:
        raise RequestError(
            "reading images needs Pillow, which is not installed",
            hint="pip install 'edje-runtime[index]'",
        ) from error
    return image_module


# Module and name of what Pillow's documentation lets users set. A module that this process has
# not loaded holds its defaults, as it will elsewhere.
_ATTRIBUTES = (
    ("PIL.Image", "MAX_IMAGE_PIXELS"),
    ("PIL.ImageFile", "LOAD_TRUNCATED_IMAGES"),
    ("PIL.ImageFile", "MAXBLOCK"),
    ("PIL.ImageFile", "SAFEBLOCK"),
    ("PIL.GifImagePlugin", "LOADING_STRATEGY"),
    ("PIL.PngImagePlugin", "MAX_TEXT_CHUNK"),
    ("PIL.PngImagePlugin", "MAX_TEXT_MEMORY"),
    ("PIL.TiffImagePlugin", "READ_LIBTIFF"),
)


@dataclass(frozen=True, slots=True)
class PillowSettings:
    """Picklable, also where the plugins are not installed.

    Attributes:
        values: module, name and value of Pillow's settings.
        openers: name and pickled (factory, accept) of every format registered by others.
        decoders: name and pickled class of every decoder registered by others.
    """

    values: tuple[tuple[str, str, Any], ...] = ()
    openers: tuple[tuple[str, bytes], ...] = ()
    decoders: tuple[tuple[str, bytes], ...] = ()

    @classmethod
    def of_this_process(cls) -> PillowSettings:
        """Return what holds here and now.

        Raises:
            RequestError: an opener that no other process can import.
        """
        from PIL import Image

        values = tuple(
            (module, name, getattr(sys.modules[module], name))
            for module, name in _ATTRIBUTES
            if hasattr(sys.modules.get(module), name)
        )
        openers = registered_openers(Image)
        decoders: dict[str, Any] = {
            name: decoder
            for name, decoder in getattr(Image, "DECODERS", {}).items()
            if not is_pillows_own(decoder)
        }
        return cls(values, tuple(_pickled(openers)), tuple(_pickled(decoders)))

    def apply(self) -> None:
        """Make them hold in this process.

        Raises:
            RequestError: a plugin is not to be had here.
        """
        from PIL import Image

        Image.init()  # loads the plugins that the values belong to
        for module, name, value in self.values:
            setattr(import_module(module), name, value)
        for name, content in self.openers:
            Image.register_open(name, *_unpickled(name, content))
        for name, content in self.decoders:
            Image.register_decoder(name, _unpickled(name, content))


def registered_extensions() -> frozenset[str]:
    """Return the file name endings of the formats that others than Pillow have registered."""
    image_module = sys.modules.get("PIL.Image")
    if image_module is None:  # then nobody has registered anything
        return frozenset()
    openers = registered_openers(image_module)
    extensions = image_module.EXTENSION.items()
    return frozenset(end for end, name in extensions if name in openers)


@contextmanager
def pillow_set(max_pixels: int | None, plugins: Iterable[str]) -> Iterator[None]:
    """Set Pillow for the block: `max_pixels` (0: no limit; None: as it is), and load plugins.

    Args:
        plugins: `MODULE`, which registers its openers when imported, or `MODULE:FUNCTION`, which
            does when called. They stay.

    Raises:
        RequestError: a limit or a plugin that is none.
    """
    if max_pixels is not None and max_pixels < 0:
        raise RequestError(f"max_pixels is {max_pixels}, expected 1 or more, or 0 for no limit")
    for plugin in plugins:
        _load_plugin(plugin)
    if max_pixels is None:
        yield
        return
    from PIL import Image

    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels or None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _load_plugin(plugin: str) -> None:
    """Import a plugin and call its function; refuse one that changes nothing."""
    from PIL import Image

    for known, _ in _ATTRIBUTES:  # so that what the plugin itself imports is no change
        import_module(known)
    before = PillowSettings.of_this_process()
    module, _, function = plugin.partition(":")
    try:
        loaded = import_module(module)
        if function:
            getattr(loaded, function)()
    # Whatever a module does when it is imported, its user needs one sentence.
    except Exception as error:
        raise RequestError(
            f"the plugin {plugin} cannot be loaded: {type(error).__name__}: {error}",
            hint="name a module that Python can import (PYTHONPATH), or MODULE:FUNCTION",
        ) from error
    package = module.partition(".")[0]
    factories = (factory for factory, _ in registered_openers(Image).values())
    if PillowSettings.of_this_process() == before and not any(
        str(factory.__module__).partition(".")[0] == package for factory in factories
    ):
        raise RequestError(
            f"the plugin {plugin} registers no opener and sets nothing in Pillow",
            hint=f"name what does, as {module}:register_opener (its documentation says which)",
        )


def _pickled(items: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    for name, item in items.items():
        parts = item if isinstance(item, tuple) else (item,)
        try:
            if any(getattr(part, "__module__", None) == "__main__" for part in parts):
                raise pickle.PicklingError("it is defined in the script itself")
            yield name, pickle.dumps(item)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise RequestError(
                f"Pillow's opener of {name} cannot reach the decoder processes: {error}",
                hint="define it in a module that can be imported, at its top level",
            ) from error


def _unpickled(name: str, content: bytes) -> Any:
    try:
        return pickle.loads(content)
    # Importing a plugin runs its code, which may fail in any way.
    except Exception as error:
        raise RequestError(
            f"the opener of {name} cannot be loaded: {type(error).__name__}: {error}",
            hint="install the same plugins wherever images are decoded",
        ) from error
