"""What the calling process has set in Pillow, for the processes that decode for it."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ...errors import RequestError
from .images import is_pillows_own, registered_openers

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
