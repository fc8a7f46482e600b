"""`cuda/cubins/manifest.json`: what the cubins of CUDA C++ are; and all kernels by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from .cuda_variants import SOURCES, cuda_variants
from .manifest import CUBINS, FORMAT_VERSION, KernelEntry, read_as, read_manifest

FOLDER = Path(__file__).parent / "cuda"
CUDA_CUBINS = FOLDER / "cubins"


@dataclass(frozen=True, slots=True)
class CudaManifest:
    """Everything that was built at once.

    Attributes:
        source_hash: `cuda_source_hash()` when it was built.
        nvcc, ptxas: the versions that built it.
    """

    source_hash: str
    nvcc: str
    ptxas: str
    kernels: Mapping[str, KernelEntry]

    def to_json(self) -> str:
        """Return the file's text: the same manifest gives the same bytes."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"


def cuda_source_hash() -> str:
    """Return SHA-256 over the CUDA C++ sources and the list of what is built from them."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((FOLDER / name).read_bytes())
    variants = [asdict(variant) for variant in cuda_variants()]
    digest.update(json.dumps(variants, sort_keys=True).encode())
    return digest.hexdigest()


@cache
def read_cuda_manifest() -> CudaManifest:
    """Read the manifest of the cubins of CUDA C++.

    Raises:
        EngineError: it is missing, damaged, or of another format.
    """
    return read_as(CudaManifest, CUDA_CUBINS)


@cache
def all_kernels() -> Mapping[str, tuple[Path, KernelEntry]]:
    """Return every kernel of this package by name, with the folder of its cubins.

    Raises:
        EngineError: a manifest is missing, damaged, or of another format.
    """
    kernels = {name: (CUBINS, entry) for name, entry in read_manifest().kernels.items()}
    return kernels | {
        name: (CUDA_CUBINS, entry) for name, entry in read_cuda_manifest().kernels.items()
    }
