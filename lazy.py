"""Names that are imported when they are first asked for: public ones, and old ones of modules."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package that hands out names of modules below it.

    Hide it from type checkers (`if not TYPE_CHECKING`): one that sees it takes every misspelt
    name for a public one.

    Args:
        package: its `__name__`.
        homes: each name's module, relative to the package: `{"Reranker": ".runtime.reranker"}`.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    return get


# Modules that moved; they answer to these names until the next minor version.
MOVED = {
    "engines.auto": "engines.builder.auto",
    "engines.backends": "engines.registry",
    "engines.build": "engines.builder.build",
    "engines.cache": "engines.builder.cache",
    "engines.int8_tokens": "tokens",
    "engines.open": "engines.registry",
    "engines.ort": "engines.onnxruntime",
    "engines.ov": "engines.openvino",
    "engines.precision.quantize": "engines.precision.lower",
    "engines.tensorrt.report": "engines.tensorrt.build",
    "engines.tensorrt_rtx": "engines.tensorrt.rtx",
    "export.convert": "export.export",
    "export.hub": "export.sources",
    "export.image_processor": "export.configs",
    "export.parity": "export.reference",
    "kernels.device.copies": "kernels.device.measuring",
    "notes": "show",
    "runtime.device": "kernels.device",
    "runtime.device.cuda_core": "kernels.device.cuda_core",
    "runtime.device.host": "kernels.device.host",
    "runtime.device.protocol": "kernels.device.contract",
    "runtime.device.pycuda": "kernels.device.pycuda",
    "runtime.doctor": "runtime.cli.doctor",
    "runtime.id_list": "arguments",
    "runtime.indexing.image_encoder": "engines.image",
    "runtime.indexing.names": "runtime.indexing.sources",
    "runtime.indexing.pillow_settings": "runtime.indexing.images",
    "runtime.indexing.skipped": "runtime.indexing.flow",
    "runtime.measure": "runtime.residency",
    "runtime.store.batches": "runtime.store.records",
    "runtime.store.compact": "runtime.store.writer",
    "runtime.store.folder": "runtime.store.disk",
    "runtime.store.pins": "runtime.store.disk",
    "runtime.store.shard_header": "runtime.store.shard",
    "runtime.store.structure": "runtime.store.verify",
    "runtime.store.threads": "arrays",
    "runtime.verify": "engines.verify",
}


class OldNames(MetaPathFinder, Loader):
    """Imports the module that stands where an old name did."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return how to import an old name; None for every other."""
        old = name.removeprefix(f"{__package__}.")
        return ModuleSpec(name, self) if old in MOVED and old != name else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module under its new name."""
        new = f"{__package__}.{MOVED[spec.name.removeprefix(f'{__package__}.')]}"
        warnings.warn(f"{spec.name} is {new} now", DeprecationWarning, stacklevel=2)
        module = import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back: it has run already."""
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state


def keep_old_names() -> None:
    """Let old names of this package's modules be imported; the first call counts."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, OldNames())  # before files are looked for in moved folders
