"""Imports run down the folders, without circles; the online path never meets an offline library."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from imports import (
    PACKAGE,
    Import,
    circles,
    find_imports,
    folder_of,
    packages_of,
    reached,
    read_package,
)

ROOT = Path(__file__).parent.parent

GROUND = "root"
ENGINES = {GROUND, "kernels", "kernels.device", "engines"}
ONLINE_PATH = {*ENGINES, "runtime.store", "runtime"}
OFFLINE = {"engines.precision", "engines.builder", "export"}
# Each folder, and those it may import from besides itself: all of them stand below it.
MAY_IMPORT = {
    GROUND: set(),
    "kernels.device": {GROUND},
    "runtime.store": {GROUND},
    "kernels": {GROUND, "kernels.device"},
    "engines": ENGINES,
    "engines.precision": ENGINES,
    "engines.tensorrt": ENGINES,
    "engines.shallow": {*ENGINES, "engines.precision"},
    "engines.native": {*ENGINES, "engines.precision", "engines.shallow"},
    "engines.builder": {*ENGINES, "engines.precision", "engines.shallow"},
    "export": {GROUND},
    "runtime": ONLINE_PATH,
    "runtime.indexing": ONLINE_PATH,
    "runtime.server": ONLINE_PATH,
    "runtime.server.adapters": ONLINE_PATH,
    "runtime.server.route": {*ONLINE_PATH, "runtime.server"},
    "demo": {*ONLINE_PATH, *OFFLINE, "runtime.indexing"},
    "demo.training": {*ONLINE_PATH, *OFFLINE, "runtime.indexing", "demo"},
    "runtime.cli": {
        *ONLINE_PATH,
        *OFFLINE,
        "runtime.indexing",
        "runtime.server",
        "runtime.server.route",
        "demo",
    },
    "perf": {
        *ONLINE_PATH,
        *OFFLINE,
        "runtime.indexing",
        "runtime.server",
        "runtime.cli",
        "demo",
        "engines.native",
    },
}
MAY_IMPORT["perf.peers"] = MAY_IMPORT["perf"] | {"perf"}
ONLINE = MAY_IMPORT.keys() - {"export", "demo", "demo.training", "perf", "perf.peers"}
# Packages that hand out names of the folders below them, once they are asked for.
FRONT_DOORS = {PACKAGE, f"{PACKAGE}.engines", f"{PACKAGE}.perf.cli"}
MOST_UNDER_RERANKER = 36
OFFLINE_LIBRARIES = {"torch", "transformers", "onnx", "onnxscript"}
# What changes graphs when an engine is built, and imports onnx then.
PASSES = tuple(f"{PACKAGE}.engines.{name}" for name in ("precision", "shallow", "onnxruntime_int8"))
# `ScoringService` and what it stands on: embedding it needs no HTTP library.
SERVICE = {
    f"{PACKAGE}.runtime.server{name}"
    for name in ("", ".service", ".worker", ".scheduler", ".answers", ".limits")
}
# What a base install holds: all that the online layers may import before it is asked for.
BASE_LIBRARIES = {"ftfy", "numpy", "rich", "tokenizers", "typer", "xxhash"}


class Tree:
    """The package's modules, their imports, and the folders that these lie in."""

    def __init__(self, sources: Mapping[str, str]):
        self.modules = set(sources)
        self.packages = packages_of(sources)
        self.imports = [found for found in find_imports(sources) if found.module in sources]

    def folder(self, module: str) -> str:
        return folder_of(module, self.packages)

    def own(self) -> Iterator[Import]:
        """Yield the imports of the package's own modules."""
        return (found for found in self.imports if found.target.split(".")[0] == PACKAGE)

    def layer_faults(self) -> Iterator[str]:
        """Imports of folders that do not lie below, and of the package by its full name."""
        for found in self.own():
            if not found.relative:
                yield f"{found}: write it relative"
            folder, target = self.folder(found.module), self.folder(found.target)
            allowed = MAY_IMPORT[folder] | {folder}
            if target not in allowed and not _is_front_door(found):
                yield f"{found}: {folder} may not import {target}"

    def circles(self) -> Iterator[str]:
        """Folders, and files, that import each other in a circle."""
        for what, edges in (("folders", self.folder_edges()), ("files", self.eager_edges())):
            for group in circles(edges):
                yield f"a circle of {what}: {', '.join(sorted(group))}"

    def folder_edges(self) -> dict[str, set[str]]:
        edges: dict[str, set[str]] = {}
        for found in self.own():
            folder, target = self.folder(found.module), self.folder(found.target)
            if folder != target and not _is_front_door(found):
                edges.setdefault(folder, set()).add(target)
        return edges

    def eager_edges(self) -> dict[str, set[str]]:
        """Which modules importing a module loads, those of `edje` itself left out."""
        edges: dict[str, set[str]] = {}
        for found in self.own():
            if found.eager and found.target in self.modules - {PACKAGE}:
                edges.setdefault(found.module, set()).add(found.target)
        return edges

    def offline_faults(self) -> Iterator[str]:
        """Offline libraries anywhere in the online folders, even inside a function.

        Building changes graphs: its passes may import onnx, inside functions.
        """
        for found in self.imports:
            library = found.target.split(".")[0]
            if self.folder(found.module) not in ONLINE or library not in OFFLINE_LIBRARIES:
                continue
            if not (found.module.startswith(PASSES) and library == "onnx" and not found.eager):
                yield f"{found}: the online path never does"

    def eager_faults(self) -> Iterator[str]:
        """Heavy libraries that load before they are asked for.

        An online module may import one at its top (a backend does), but then every online module
        imports *that* module inside a function. The server's HTTP half may among itself; what
        embeds the service (`SERVICE`) may not.
        """
        online = [f for f in self.imports if self.folder(f.module) in ONLINE and f.eager]
        heavy = {found.module: found for found in online if _is_heavy(found.target)}
        for found in online:
            both = self.folder(found.module), self.folder(found.target)
            among = all(f"{folder}.".startswith("runtime.server.") for folder in both)
            if among and found.module not in SERVICE:
                continue
            if found.target in heavy and found.module not in heavy:
                yield f"{found} at its top, and {heavy[found.target]}: import it in a function"
        front = {PACKAGE, f"{PACKAGE}.runtime.cli", f"{PACKAGE}.runtime.cli.app", *SERVICE}
        for module in front & heavy.keys():
            yield f"{heavy[module]} at its top"

    def faults(self) -> list[str]:
        return [
            *self.layer_faults(), *self.circles(), *self.offline_faults(), *self.eager_faults()
        ]  # fmt: skip


def _is_front_door(found: Import) -> bool:
    """Whether a package hands out a public name, or the command line runs a verb, when asked.

    `python -m edje` is the command line and nothing else.
    """
    if found.module == f"{PACKAGE}.__main__":
        return found.target.startswith(f"{PACKAGE}.runtime.cli")
    return not found.eager and found.module in FRONT_DOORS


def _is_heavy(target: str) -> bool:
    library = target.split(".")[0]
    return library not in {PACKAGE, *BASE_LIBRARIES, *sys.stdlib_module_names}


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree(read_package(ROOT))


def test_every_folder_has_its_place(tree: Tree) -> None:
    assert {tree.folder(module) for module in tree.modules} == set(MAY_IMPORT)


def test_imports_run_down_the_folders(tree: Tree) -> None:
    assert list(tree.layer_faults()) == []


def test_there_are_no_circles_of_folders_or_files(tree: Tree) -> None:
    assert list(tree.circles()) == []


def test_the_online_path_never_imports_offline_libraries(tree: Tree) -> None:
    assert list(tree.offline_faults()) == []


def test_heavy_libraries_wait_until_they_are_asked_for(tree: Tree) -> None:
    assert list(tree.eager_faults()) == []


def test_few_files_lie_beneath_the_reranker(tree: Tree) -> None:
    beneath = reached(tree.eager_edges(), f"{PACKAGE}.runtime.reranker")
    assert len(beneath) <= MOST_UNDER_RERANKER, sorted(beneath)
    folders = {tree.folder(module) for module in beneath}
    assert not folders & {
        "engines.precision",
        "engines.shallow",
        "engines.builder",
        "export",
        "runtime.indexing",
    }
    only_gpus_need = {f"{PACKAGE}.runtime.{name}" for name in ("pool", "resident_map", "graphs")}
    assert "kernels" not in folders
    assert not beneath & only_gpus_need


GOOD = {
    "edje": "def __getattr__(name):\n    from .runtime import store",
    "edje.errors": "import json",
    "edje.bundle": "from .errors import EdjeError",
    "edje.engines.openvino": "import openvino\nfrom ..errors import EdjeError",
    "edje.engines.precision.lower": "def f():\n    import onnx",
    "edje.engines.registry": "def load():\n    from . import openvino",
    "edje.runtime.cli.app": "import typer\ndef export():\n    from ..export import run",
    "edje.runtime.indexing.images": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import PIL"
    ),
    "edje.export.run": "import torch\nfrom ..errors import EdjeError",
    "edje.demo.guide": "import torch\nfrom ..export import run",
    "edje.perf.run": "import json",
    "edje.engines.builder.build": "from ..precision import lower",
}


def test_the_rules_accept_a_good_tree() -> None:
    assert Tree(GOOD).faults() == []


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("edje.engines.bad", "from ..runtime import cli", "engines may not import runtime"),
        ("edje.engines.bad", "def f():\n    from ..runtime import cli", "engines may not"),
        ("edje.export.bad", "from ..engines import openvino", "export may not import engines"),
        ("edje.runtime.bad", "def f():\n    from ..export import run", "runtime may not"),
        ("edje.runtime.cli.app", "from ...perf import run", "runtime.cli may not import perf"),
        ("edje.engines.precision.bad", "from ..builder import build", "may not import engines.b"),
        ("edje.errors", "from .bundle import read", "a circle of files: edje.bundle, edje.errors"),
        ("edje.errors", "from .engines import backends", "root may not import engines"),
        ("edje.__main__", "from .engines import backends", "root may not import engines"),
        ("edje.demo.bad", "import edje.export.run", "write it relative"),
        ("edje.demo.bad", "from edje.errors import EdjeError", "write it relative"),
        ("edje.engines.bad", "def f():\n    import onnx.helper", "the online path never"),
        ("edje.engines.precision.bad", "def f():\n    import torch", "the online path never"),
        ("edje.runtime.bad", "def f():\n    import_module('torch')", "the online path never"),
        ("edje.runtime.bad", "import_module('..export.run', __package__)", "runtime may not"),
        ("edje.engines.registry", "from . import openvino", "import it in a function"),
        ("edje.engines.registry", "from .openvino import build", "import it in a function"),
        (
            "edje.runtime.bad",
            "class A:\n    from ..engines import openvino",
            "import it in a function",
        ),
        ("edje.runtime.cli.app", "import openvino", "imports openvino at its top"),
    ],
)
def test_the_rules_find_a_bad_import(module: str, source: str, fault: str) -> None:
    first, *circles = Tree({**GOOD, module: source}).faults()
    assert fault in first
    assert all("a circle of folders" in each for each in circles)
