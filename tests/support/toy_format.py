"""An image format of its own, as a plugin brings it: `TOY`, a width, a height, then grey bytes."""

from __future__ import annotations

from typing import BinaryIO

from PIL import Image, ImageFile

MAGIC = b"TOYIMAGE"


class ToyDecoder(ImageFile.PyDecoder):
    """Copies the bytes behind the header, inverted."""

    _pulls_fd = True

    def decode(self, buffer: object) -> tuple[int, int]:
        assert self.fd is not None
        self.set_as_raw(bytes(255 - value for value in self.fd.read()))
        return -1, 0


class ToyImageFile(ImageFile.ImageFile):
    """A file of the format."""

    format = "TOY"
    format_description = "for tests"

    def _open(self) -> None:
        head = self.fp.read(10)
        self._size = head[8], head[9]
        self._mode = "L"
        self.tile = [("toy", (0, 0, *self._size), 10, ())]


def accept(prefix: bytes) -> bool:
    return prefix.startswith(MAGIC)


def register() -> None:
    """Do what plugins do when they are imported or told to."""
    Image.register_open(ToyImageFile.format, ToyImageFile, accept)
    Image.register_extension(ToyImageFile.format, ".toy")
    Image.register_decoder("toy", ToyDecoder)


def unregister() -> None:
    """Take everything back."""
    Image.OPEN.pop("TOY", None)
    Image.DECODERS.pop("toy", None)
    Image.EXTENSION.pop(".toy", None)
    if "TOY" in Image.ID:
        Image.ID.remove("TOY")


def write_toy(file: BinaryIO, grey: int, size: tuple[int, int] = (4, 4)) -> None:
    """Write an image of one grey."""
    file.write(MAGIC + bytes(size) + bytes([255 - grey]) * (size[0] * size[1]))
