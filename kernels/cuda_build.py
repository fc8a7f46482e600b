"""Compile the CUDA C++ kernels, without a GPU: the second step of `make kernels`.

`nvcc` writes PTX; the assembler that made the other cubins turns it into these, so that the same
drivers load them all. Where there is no `nvcc`, the committed cubins stay as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ..errors import EngineError
from .build import (
    OPTIONS,
    Compiled,
    assemble_ptx,
    build_into,
    check_parameters,
    limit_faults,
    ptxas_version,
    read_resources,
)
from .cuda_manifest import CUDA_CUBINS, FOLDER, CudaManifest, cuda_source_hash
from .cuda_variants import CAPABILITY, cuda_variants, shared_bytes, tensor_maps
from .manifest import Cubin, KernelEntry
from .variant import Variant

TOOLKIT = "nvidia.cu13"  # where the wheel `nvidia-cuda-nvcc` puts its files
# No extra: 280 MB that only `make kernels` reads; CUDA builds of torch pin a runtime of their own.
INSTALL = "pip install nvidia-cuda-nvcc==13.0.88 nvidia-cuda-runtime==13.0.96"


def nvcc_path() -> Path | None:
    """Return where the wheel's compiler is, None where it is not installed."""
    try:
        spec = find_spec(TOOLKIT)
    except ModuleNotFoundError:
        return None
    folders = () if spec is None else spec.submodule_search_locations or ()
    paths = (Path(folder) / "bin" / "nvcc" for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def build_cuda() -> tuple[CudaManifest, dict[str, bytes]]:
    """Compile everything; return the manifest and the files by name. Writes nothing.

    Raises:
        EngineError: the compiler or Triton's assembler is missing, or kernels do not keep the
            limits (all of them at once).
    """
    compiled = [(variant, compile_cuda(variant)) for variant in cuda_variants()]
    kernels = {
        variant.name: KernelEntry(
            each.symbol,
            variant.num_warps,
            variant.parameters,
            variant.constants,
            (each.record,),
        )
        for variant, each in compiled
    }
    faults = [fault for variant, _ in compiled for fault in limit_faults(variant, kernels)]
    if faults:
        raise EngineError("compiled kernels do not keep their limits", faults=faults)
    versions = _nvcc_version(), ptxas_version()
    files = {each.record.file: each.code for _, each in compiled}
    return CudaManifest(cuda_source_hash(), *versions, kernels), files


def compile_cuda(variant: Variant) -> Compiled:
    """Compile one kernel.

    Raises:
        EngineError: a compiler refuses it, or it takes other arguments than launches give.
    """
    sm = CAPABILITY.replace(".", "")
    with tempfile.TemporaryDirectory() as folder:
        ptx = to_ptx(variant, Path(folder))
        check_parameters(variant, ptx, scratch=())
        is_exact, code, log = assemble_ptx(ptx, sm, Path(folder))
    record = Cubin(
        file=f"{variant.name}.sm_{sm}.cubin",
        compute_capability=CAPABILITY,
        exact=is_exact,
        num_bytes=len(code),
        sha256=hashlib.sha256(code).hexdigest(),
        shared_bytes=shared_bytes(),
        tensor_maps=tuple(tensor_maps("bfloat16" if variant.constants["BFLOAT16"] else "float16")),
        **read_resources(log),
    )
    return Compiled(variant.function, code, record)


def to_ptx(variant: Variant, folder: Path) -> str:
    """Let `nvcc` compile, for the version of PTX that the assembler knows.

    Raises:
        EngineError: it is missing, or refuses the source.
    """
    source, target = FOLDER / f"{variant.source}.cu", folder / "kernel.ptx"
    options = ["-ptx", f"-arch=sm_{CAPABILITY.replace('.', '')}a", "-O3", "-std=c++17"]
    definitions = [f"-D{name}={value}" for name, value in variant.constants.items()]
    command = [_nvcc(), *options, *definitions, str(source), "-o", str(target)]
    shown = subprocess.run(command, capture_output=True, text=True)
    if shown.returncode:
        raise EngineError(f"nvcc does not compile {source.name}: {shown.stderr.strip()}")
    major, minor = divmod(int(OPTIONS["ptx_version"]), 10)
    version = f".version {major}.{minor}"
    return re.sub(r"^\.version .*$", version, target.read_text("utf-8"), flags=re.M)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build into the package; with `--check` only compare. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m edje.kernels.cuda_build", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args(arguments).check
    if nvcc_path() is None:
        print(f"{CUDA_CUBINS} stays as it is: there is no nvcc here ({INSTALL})")
        return 1 if check else 0
    return build_into(CUDA_CUBINS, build_cuda, check=check)


def _nvcc() -> str:
    path = nvcc_path()
    if path is None:
        raise EngineError("compiling CUDA C++ needs nvcc", hint=INSTALL)
    return str(path)


def _nvcc_version() -> str:
    shown = subprocess.run([_nvcc(), "--version"], capture_output=True, text=True, check=True)
    return shown.stdout.split(", V")[1].split()[0]


if __name__ == "__main__":
    sys.exit(main())
