"""Modules that moved answer to their old names, with a warning, until the next minor version."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

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
    "runtime.device": "kernels.device",
    "runtime.device.cuda_core": "kernels.device.cuda_core",
    "runtime.device.host": "kernels.device.host",
    "runtime.device.protocol": "kernels.device.contract",
    "runtime.device.pycuda": "kernels.device.pycuda",
    "runtime.doctor": "runtime.cli.doctor",
    "runtime.indexing.image_encoder": "engines.image",
    "runtime.verify": "engines.verify",
}


class OldNames(MetaPathFinder, Loader):
    """Imports the module that stands where an old name did."""

    def __init__(self, package: str):
        self._package = package
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return how to import an old name; None for every other."""
        known = name.startswith(f"{self._package}.") and name[len(self._package) + 1 :] in MOVED
        return ModuleSpec(name, self) if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module under its new name."""
        new = f"{self._package}.{MOVED[spec.name[len(self._package) + 1 :]]}"
        warnings.warn(f"{spec.name} is {new} now", DeprecationWarning, stacklevel=2)
        module = import_module(new)
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back: it has run already."""
        spec = module.__spec__
        if spec is not None:
            module.__spec__ = self._specs[spec.name]


def keep_old_names(package: str) -> None:
    """Let the old names below `package` be imported; the first call counts."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, OldNames(package))  # before files are looked for in moved folders
