"""Imports run down the layers only, and the online path never meets an offline library."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from imports import PACKAGE, Import, find_imports, layer_of, read_package

ROOT = Path(__file__).parent.parent

MAY_IMPORT = {
    "root": {"root"},
    "kernels": {"root", "kernels"},
    "engines": {"root", "kernels", "engines"},
    "runtime": {"root", "kernels", "engines", "runtime"},
    "export": {"root", "export"},
    "perf": {"root", "kernels", "engines", "runtime", "export", "perf", "demo"},
    "demo": {"root", "kernels", "engines", "runtime", "export", "perf", "demo"},
}
ONLINE = {"root", "kernels", "engines", "runtime"}
OFFLINE_LIBRARIES = {"torch", "transformers", "onnx", "onnxscript"}
PASSES = f"{PACKAGE}.engines.precision"
# What a base install holds: all that the online layers may import before it is asked for.
BASE_LIBRARIES = {"ftfy", "numpy", "rich", "tokenizers", "typer", "xxhash"}


def layer_faults(imports: list[Import]) -> Iterator[str]:
    """Imports that run up the layers, and imports of the package by its full name."""
    for found in imports:
        if found.target.split(".")[0] != PACKAGE:
            continue
        if not found.relative:
            yield f"{found}: write it relative"
        layer, target = layer_of(found.module), layer_of(found.target)
        if target not in MAY_IMPORT[layer] and not _is_front_door(found):
            yield f"{found}: {layer} may not import {target}"


def _is_front_door(found: Import) -> bool:
    """Whether `edje` hands out a public name, or the command line runs a verb, when asked.

    `python -m edje` is the command line and nothing else.
    """
    is_command_line = found.module.startswith(f"{PACKAGE}.runtime.cli")
    if found.module == f"{PACKAGE}.__main__":
        return found.target == f"{PACKAGE}.runtime.cli"
    return not found.eager and (found.module == PACKAGE or is_command_line)


def offline_faults(imports: list[Import]) -> Iterator[str]:
    """Offline libraries anywhere in the online layers, even inside a function.

    Building changes graphs: its precision passes may import onnx, inside functions.
    """
    for found in imports:
        library = found.target.split(".")[0]
        if layer_of(found.module) not in ONLINE or library not in OFFLINE_LIBRARIES:
            continue
        if not (found.module.startswith(PASSES) and library == "onnx" and not found.eager):
            yield f"{found}: the online path never does"


def eager_faults(imports: list[Import]) -> Iterator[str]:
    """Heavy libraries that load before they are asked for.

    An online module may import one at its top (a backend does), but then every online module
    imports *that* module inside a function.
    """
    online = [found for found in imports if layer_of(found.module) in ONLINE and found.eager]
    heavy = {found.module: found for found in online if _is_heavy(found.target)}
    for found in online:
        if found.target in heavy and found.module not in heavy:
            yield f"{found} at its top, and {heavy[found.target]}: import it in a function"
    front = {PACKAGE, f"{PACKAGE}.runtime.cli"}
    for module in front & heavy.keys():
        yield f"{heavy[module]} at its top"


def _is_heavy(target: str) -> bool:
    library = target.split(".")[0]
    return library not in {PACKAGE, *BASE_LIBRARIES, *sys.stdlib_module_names}


def all_faults(sources: Mapping[str, str]) -> list[str]:
    imports = find_imports(sources)
    return [*layer_faults(imports), *offline_faults(imports), *eager_faults(imports)]


@pytest.fixture(scope="module")
def package() -> dict[str, str]:
    return read_package(ROOT)


def test_every_layer_is_read(package: dict[str, str]) -> None:
    expected = {"root", "export", "engines", "runtime", "demo"}
    assert expected <= {layer_of(module) for module in package}
    assert f"{PACKAGE}.runtime.cli" in package


def test_imports_run_down_the_layers(package: dict[str, str]) -> None:
    assert list(layer_faults(find_imports(package))) == []


def test_the_online_path_never_imports_offline_libraries(package: dict[str, str]) -> None:
    assert list(offline_faults(find_imports(package))) == []


def test_heavy_libraries_wait_until_they_are_asked_for(package: dict[str, str]) -> None:
    assert list(eager_faults(find_imports(package))) == []


GOOD = {
    "edje": "def __getattr__(name):\n    from .runtime import store",
    "edje.errors": "import json",
    "edje.engines.ov": "import openvino\nfrom ..errors import EdjeError",
    "edje.engines.precision.lower": "def f():\n    import onnx",
    "edje.engines.backends": "def load():\n    from . import ov",
    "edje.runtime.cli": "import typer\ndef export():\n    from ..export import run",
    "edje.runtime.indexing.images": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import PIL"
    ),
    "edje.export.run": "import torch\nfrom ..errors import EdjeError",
    "edje.demo.guide": "import torch\nfrom ..export import run",
}


def test_the_rules_accept_a_good_tree() -> None:
    assert all_faults(GOOD) == []


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("edje.engines.bad", "from ..runtime import cli", "engines may not import runtime"),
        ("edje.engines.bad", "def f():\n    from ..runtime import cli", "engines may not"),
        ("edje.export.bad", "from ..engines import ov", "export may not import engines"),
        ("edje.runtime.bad", "def f():\n    from ..export import run", "runtime may not"),
        ("edje.runtime.cli", "from ..export import run", "runtime may not import export"),
        ("edje.errors", "from .engines import backends", "root may not import engines"),
        ("edje.__main__", "from .engines import backends", "root may not import engines"),
        ("edje.demo.bad", "import edje.export.run", "write it relative"),
        ("edje.demo.bad", "from edje.errors import EdjeError", "write it relative"),
        ("edje.engines.bad", "def f():\n    import onnx.helper", "the online path never"),
        ("edje.engines.precision.bad", "def f():\n    import torch", "the online path never"),
        ("edje.runtime.bad", "def f():\n    import_module('torch')", "the online path never"),
        ("edje.runtime.bad", "import_module('..export.run', __package__)", "runtime may not"),
        ("edje.engines.backends", "from . import ov", "import it in a function"),
        ("edje.engines.backends", "from .ov import build", "import it in a function"),
        ("edje.runtime.bad", "class A:\n    from ..engines import ov", "import it in a function"),
        ("edje.runtime.cli", "import openvino", "imports openvino at its top"),
    ],
)
def test_the_rules_find_a_bad_import(module: str, source: str, fault: str) -> None:
    (found,) = all_faults({**GOOD, module: source})
    assert fault in found
