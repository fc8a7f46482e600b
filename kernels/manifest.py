"""`cubins/manifest.json`: what the compiled kernels are and what they need. One reader, one writer.

The source hash covers everything that decides a cubin: `source_hash()` of this checkout differs
from the manifest's where the cubins are stale.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from ..arguments import read_fields
from ..errors import EngineError
from .variant import COMPUTE_CAPABILITIES, Parameter
from .variants import SOURCES, all_variants

FORMAT_VERSION = 2
CUBINS = Path(__file__).parent / "cubins"
MANIFEST = "manifest.json"
# What a tensor map is to a launch: itself, the array's shape, its strides in elements.
TENSOR_MAP = ("map", "i32", "i32", "i64", "i64")


@dataclass(frozen=True, slots=True)
class TensorMap:
    """How the compiler wants a parameter's tensor map encoded, in the driver's numbers.

    Attributes:
        name: of the parameter.
        swizzle: a `CUtensorMapSwizzle`.
        element: a `CUtensorMapDataType`.
        element_bytes: size of one element.
        block: rows and columns that one copy takes.
    """

    name: str
    swizzle: int
    element: int
    element_bytes: int
    block: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cubin:
    """One kernel compiled for one GPU architecture.

    Attributes:
        file: its name in the folder.
        compute_capability: as `8.9`; runs on this one, and unless `exact` on later ones of the
            same major.
        exact: whether it uses features of this very chip.
        sha256: of the file, lower-case hex.
        registers: 32-bit registers of a thread.
        shared_bytes: dynamic shared memory that a launch must ask for.
        spill_bytes: what registers did not hold: stores and loads together.
        stack_bytes: of a thread.
        tensor_maps: one for each parameter that is one, in order.
    """

    file: str
    compute_capability: str
    exact: bool
    num_bytes: int
    sha256: str
    registers: int
    shared_bytes: int
    spill_bytes: int
    stack_bytes: int
    tensor_maps: tuple[TensorMap, ...] = ()


@dataclass(frozen=True, slots=True)
class KernelEntry:
    """One kernel: how to call it, and its cubins.

    Attributes:
        symbol: name of the entry in every cubin.
        parameters: what a launch passes, in order; the scratch addresses at the end are 0.
        constants: what is compiled in.
        num_warps: warps of a block: a block has 32 times as many threads, in x.
    """

    symbol: str
    num_warps: int
    parameters: tuple[Parameter, ...]
    constants: Mapping[str, int | None]
    cubins: tuple[Cubin, ...]

    def passed_types(self) -> tuple[str, ...]:
        """Return the types of what a launch passes: `*fp16`, `i32`, ..., and `map` of 128 bytes."""
        return passed_types(self.parameters)


@dataclass(frozen=True, slots=True)
class KernelManifest:
    """Everything that was built at once.

    Attributes:
        source_hash: `source_hash()` when it was built.
        triton, ptxas: the versions that built it.
        options: compiler options that hold for every kernel.
    """

    source_hash: str
    triton: str
    ptxas: str
    options: Mapping[str, int | bool]
    kernels: Mapping[str, KernelEntry]

    def to_json(self) -> str:
        """Return the file's text: the same manifest gives the same bytes."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"


def passed_types(parameters: Iterable[Parameter]) -> tuple[str, ...]:
    """Return the types of what a launch passes for these parameters, in order."""
    return tuple(
        kind
        for item in parameters
        for kind in (TENSOR_MAP if item.type.startswith("tensordesc") else (item.type,))
    )


def source_hash() -> str:
    """Return SHA-256 over the Triton sources and the list of what is built from them."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    variants = [asdict(variant) for variant in all_variants()]
    digest.update(json.dumps([variants, COMPUTE_CAPABILITIES], sort_keys=True).encode())
    return digest.hexdigest()


@cache
def read_manifest(folder: Path = CUBINS) -> KernelManifest:
    """Read what lies in `folder`; the package's own cubins by default.

    Raises:
        EngineError: it is missing, damaged, or of another format.
    """
    return read_as(KernelManifest, folder)


Kind = TypeVar("Kind")


def read_as(kind: type[Kind], folder: Path) -> Kind:
    """Read the manifest in `folder` as a dataclass.

    Raises:
        EngineError: it is missing, damaged, or of another format.
    """
    path, faults = folder / MANIFEST, []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("format_version")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        faults = [str(error)]
    else:
        if version != FORMAT_VERSION:
            message = f"{path} has format {version}, expected {FORMAT_VERSION}"
            raise EngineError(message, hint="make kernels")
        manifest = read_fields(kind, content, "", faults)
        if manifest is not None:
            return manifest
    message = f"the compiled kernels cannot be used: {path} is missing or damaged"
    raise EngineError(message, faults=faults, hint="make kernels")
