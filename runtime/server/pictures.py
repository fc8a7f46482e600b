"""The pictures of ids, below one folder: found safely, made small where Pillow is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate, parsedate_to_datetime
from functools import lru_cache
from io import BytesIO
from os import stat_result
from pathlib import Path

# What a browser shows. No SVG: it can hold a script.
IMAGE_TYPES = {
    ".avif": "image/avif",
    ".bmp": "image/bmp",
    ".gif": "image/gif",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
}
WIDTHS = (160, 320, 640, 1280)  # few, so that few are made and kept
THUMBNAIL_TYPE = "image/webp"
MAX_PIXELS = 64_000_000  # a larger picture is sent as it is: decoding takes 3 bytes a pixel
MAX_THUMBNAILS = 512  # kept in memory: some 5 MB of 320 pixels
CACHE_S = 3600


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture file; `stat` was taken when it was found."""

    path: Path
    media_type: str
    stat: stat_result

    def headers(self, width: int | None, *, private: bool) -> dict[str, str]:
        """Return what lets a browser keep it: for an hour, and ask again after that.

        Args:
            width: of the thumbnail that is sent; None: the file itself.
            private: no cache but the browser's own may keep it.
        """
        tag = f"{self.stat.st_mtime_ns:x}-{self.stat.st_size:x}-{width or 0}"
        return {
            "etag": f'"{tag}"',
            "last-modified": formatdate(self.stat.st_mtime, usegmt=True),
            "cache-control": f"{'private' if private else 'public'}, max-age={CACHE_S}",
            "x-content-type-options": "nosniff",
            "content-security-policy": "default-src 'none'",
        }


class Pictures:
    """The pictures below `folder`. Safe from any thread."""

    def __init__(self, folder: Path):
        self._folder = folder.resolve()
        self._small = lru_cache(MAX_THUMBNAILS)(_thumbnail)

    def find(self, image_id: str) -> Picture | None:
        """Return the picture of an id, which may lack the file's extension; None: there is none.

        Only files whose path, with all links followed, lies below the folder are found.
        """
        for name in (image_id, *(image_id + suffix for suffix in IMAGE_TYPES)):
            media_type = IMAGE_TYPES.get(Path(name).suffix.lower())
            if media_type is None:
                continue
            try:
                path = (self._folder / name).resolve()
                if path.is_relative_to(self._folder) and path.is_file():
                    return Picture(path, media_type, path.stat())
            except (OSError, RuntimeError, ValueError):  # too long, a circle of links, a zero byte
                return None
        return None

    def small(self, picture: Picture, width: int) -> bytes | None:
        """Return the picture as WebP at most `width` wide and high; None: it must be sent as it is.

        Args:
            width: one of `WIDTHS`.
        """
        found = picture.stat
        return self._small(picture.path, width, found.st_mtime_ns, found.st_size)


def width_for(asked: int) -> int:
    """Return the smallest width of `WIDTHS` that is no less than `asked`; the largest at most."""
    return next((width for width in WIDTHS if width >= asked), WIDTHS[-1])


def is_unchanged(headers: Mapping[str, str], mine: Mapping[str, str]) -> bool:
    """Return whether a browser has what `mine` describes. Source: RFC 9110, section 13.2.2."""
    tags = headers.get("if-none-match")
    if tags is not None:
        weak = [tag.strip().removeprefix("W/") for tag in tags.split(",")]
        return "*" in weak or mine["etag"] in weak
    since = headers.get("if-modified-since")
    if since is None or "last-modified" not in mine:
        return False
    try:
        return parsedate_to_datetime(mine["last-modified"]) <= parsedate_to_datetime(since)
    except (TypeError, ValueError):  # no date, or one without a zone
        return False


def _thumbnail(path: Path, width: int, *_: int) -> bytes | None:
    """Return a small WebP, upright; None where Pillow is missing or cannot read the file.

    Args:
        _: time and size of the file, which the cache tells versions apart by.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        return None
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                return None
            profile = picture.info.get("icc_profile") if picture.mode in ("RGB", "RGBA") else None
            picture.draft("RGB", (2 * width, 2 * width))  # a JPEG is decoded smaller
            upright = ImageOps.exif_transpose(picture)
            small = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
            small.thumbnail((width, width), Image.Resampling.LANCZOS, reducing_gap=2.0)
            out = BytesIO()
            small.save(out, "WEBP", quality=82, method=3, icc_profile=profile)
    except (OSError, ValueError, SyntaxError, KeyError, Image.DecompressionBombError):
        return None
    return out.getvalue()
