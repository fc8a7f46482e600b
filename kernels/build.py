"""Compile every kernel for every GPU architecture, without a GPU: `make kernels`.

Triton writes PTX, the `ptxas` of its wheel turns it into cubins. Triton asks for the features of
one exact chip (`sm_90a`), which these kernels do not use: they are assembled for the plain
architecture, so that they also run on later chips of the same major version.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import EdjeError, EngineError
from ..files import publish_folder
from .manifest import CUBINS, MANIFEST, Cubin, KernelEntry, KernelManifest, source_hash
from .variants import (
    COMPUTE_CAPABILITIES,
    MAX_REGISTERS,
    MAX_SHARED_BYTES,
    Parameter,
    Variant,
    all_variants,
)

# PTX 8.7 is that of CUDA 12.8: its assembler knows every architecture, and drivers from r570 on
# load what it writes.
OPTIONS: dict[str, int | bool] = {"ptx_version": 87, "enable_fp_fusion": True}
# Triton appends two addresses of scratch memory that these kernels do not use.
SCRATCH = (Parameter("global_scratch", "*i8"), Parameter("profile_scratch", "*i8"))
PTX_TYPES = {"i32": "u32", "i64": "u64", "fp32": "f32"}


@dataclass(frozen=True, slots=True)
class Compiled:
    """One cubin's bytes, the entry's name and what the assembler said of it."""

    symbol: str
    code: bytes
    record: Cubin


def build_all() -> tuple[KernelManifest, dict[str, bytes]]:
    """Compile everything; return the manifest and the files by name. Writes nothing.

    Raises:
        EngineError: triton is missing, or kernels do not keep the limits (all of them at once).
    """
    triton = _triton()
    kernels: dict[str, KernelEntry] = {}
    files: dict[str, bytes] = {}
    for variant in all_variants():
        compiled = [compile_variant(variant, capability) for capability in COMPUTE_CAPABILITIES]
        files |= {each.record.file: each.code for each in compiled}
        kernels[variant.name] = KernelEntry(
            compiled[0].symbol,
            variant.num_warps,
            (*variant.parameters, *SCRATCH),
            variant.constants,
            tuple(each.record for each in compiled),
        )
        print(f"{variant.name}: {sum(len(each.code) for each in compiled):,} bytes", flush=True)
    faults = [fault for variant in all_variants() for fault in limit_faults(variant, kernels)]
    if faults:
        raise EngineError("compiled kernels do not keep their limits", faults=faults)
    manifest = KernelManifest(source_hash(), triton.__version__, _ptxas_version(), OPTIONS, kernels)
    return manifest, files


def write(folder: Path, manifest: KernelManifest, files: dict[str, bytes]) -> None:
    """Replace `folder`, whole or not at all."""
    with publish_folder(folder, manifest=MANIFEST, overwrite=True) as staging:
        for name, code in files.items():
            (staging / name).write_bytes(code)
        (staging / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def differences(folder: Path, manifest: KernelManifest, files: dict[str, bytes]) -> list[str]:
    """Return which files of `folder` differ from what was built, those missing included."""
    expected = {**files, MANIFEST: manifest.to_json().encode()}
    found = {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}
    return sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Build into the package; with `--check` only compare. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m edje.kernels.build", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args(arguments).check
    try:
        manifest, files = build_all()
    except EdjeError as error:
        print(error, file=sys.stderr)
        return 1
    if check:
        different = differences(CUBINS, manifest, files)
        print("\n".join(f"differs: {name}" for name in different) or "every file is the same")
        return 1 if different else 0
    write(CUBINS, manifest, files)
    print(f"{len(files)} cubins, {sum(map(len, files.values())):,} bytes, in {CUBINS}")
    return 0


def _triton() -> Any:
    try:
        return import_module("triton")
    except ImportError as error:
        message = f"compiling kernels needs triton: {error}"
        raise EngineError(message, hint="pip install -e '.[kernels]' -c constraints.txt") from error


def compile_variant(variant: Variant, capability: str) -> Compiled:
    """Compile one kernel for one architecture.

    Raises:
        EngineError: the assembler refuses it, or it takes other arguments than launches give.
    """
    sm = capability.replace(".", "")
    with tempfile.TemporaryDirectory() as folder:
        compiled = _to_ptx(variant, int(sm), folder)
        ptx = re.sub(r"^\.target sm_\d+a?", f".target sm_{sm}", compiled.asm["ptx"], flags=re.M)
        check_parameters(variant, ptx)
        code, log = _assemble(ptx, sm, Path(folder))
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise EngineError(f"{variant.name} needs scratch memory, which launches do not give")
    record = Cubin(
        file=f"{variant.name}.sm_{sm}.cubin",
        compute_capability=capability,
        num_bytes=len(code),
        sha256=hashlib.sha256(code).hexdigest(),
        shared_bytes=metadata.shared,
        **read_resources(log),
    )
    return Compiled(metadata.name, code, record)


def _to_ptx(variant: Variant, sm: int, cache: str) -> Any:
    """Let Triton compile; every time anew, without the numbers of source lines."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(import_module(f".{variant.source}", __package__), variant.function)
    types = {parameter.name: parameter.type for parameter in variant.parameters}
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    attributes = {
        (function.arg_names.index(parameter.name),): [["tt.divisibility", parameter.multiple_of]]
        for parameter in variant.parameters
        if parameter.multiple_of > 1
    }
    source = ASTSource(function, signature, dict(variant.constants), attributes)
    options = {**OPTIONS, "num_warps": variant.num_warps}
    knobs = triton.knobs
    with knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = cache
        knobs.compilation.disable_line_info = True
        return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def check_parameters(variant: Variant, ptx: str) -> None:
    """Compare the entry's parameters in PTX with what the manifest will say.

    Raises:
        EngineError: they differ.
    """
    found = re.findall(r"^\s*\.param \.(\w+)[^;\n]*_param_\d+,?$", ptx, re.M)
    parameters = (*variant.parameters, *SCRATCH)
    expected = [PTX_TYPES.get(parameter.type, "u64") for parameter in parameters]
    if found != expected:
        raise EngineError(f"{variant.name} takes {found} in PTX, expected {expected}")


def _ptxas() -> str:
    path: str = import_module("triton").knobs.nvidia.ptxas.path
    return path


def _ptxas_version() -> str:
    shown = subprocess.run([_ptxas(), "--version"], capture_output=True, text=True, check=True)
    return shown.stdout.split(", V")[1].split()[0]


def _assemble(ptx: str, sm: str, folder: Path) -> tuple[bytes, str]:
    """Return the cubin and what the assembler says of its resources."""
    source, target = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(ptx, encoding="utf-8")
    command = [_ptxas(), "-v", f"--gpu-name=sm_{sm}", "kernel.ptx", "-o", "kernel.cubin"]
    shown = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if shown.returncode != 0:
        raise EngineError(f"ptxas failed for sm_{sm}: {shown.stderr.strip()}")
    return target.read_bytes(), shown.stderr


def read_resources(log: str) -> dict[str, int]:
    """Read registers, spills and stack from what `ptxas -v` says; it must say all of them."""

    def number(pattern: str) -> int:
        (found,) = re.findall(pattern, log)
        return int(found)

    return {
        "registers": number(r"Used (\d+) registers"),
        "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "stack_bytes": number(r"(\d+) bytes stack frame"),
    }


def limit_faults(variant: Variant, kernels: dict[str, KernelEntry]) -> Iterator[str]:
    """Yield one sentence for every limit that a kernel's cubins break."""
    for cubin in kernels[variant.name].cubins:
        limits = {
            "registers": MAX_REGISTERS,
            "shared_bytes": MAX_SHARED_BYTES,
            "spill_bytes": 0,
            "stack_bytes": 0,
        }
        for name, most in limits.items():
            if getattr(cubin, name) > most:
                yield f"{cubin.file}: {name} {getattr(cubin, name)}, at most {most}"


if __name__ == "__main__":
    sys.exit(main())
