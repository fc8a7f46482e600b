"""Compile every kernel for every GPU architecture, without a GPU: `make kernels`.

Triton writes PTX, the `ptxas` of its wheel turns it into cubins. Triton asks for the features of
one exact chip (`sm_90a`): where a kernel uses none of them it is assembled for the plain
architecture, so that it also runs on later chips of the same major version.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ..errors import EdjeError, EngineError
from ..files import publish_folder
from .manifest import (
    CUBINS,
    MANIFEST,
    Cubin,
    KernelEntry,
    KernelManifest,
    TensorMap,
    passed_types,
    source_hash,
)
from .variant import MAX_REGISTERS, MAX_SHARED_BYTES, Parameter, Variant
from .variants import all_variants

# PTX 8.7 is that of CUDA 12.8: its assembler knows every architecture, and drivers from r570 on
# load what it writes.
OPTIONS: dict[str, int | bool] = {"ptx_version": 87, "enable_fp_fusion": True}
# Triton appends two addresses of scratch memory that these kernels do not use.
SCRATCH = (Parameter("global_scratch", "*i8"), Parameter("profile_scratch", "*i8"))
PTX_TYPES = {"i32": "u32", "i64": "u64", "fp32": "f32", "map": "b8[128]"}
# Triton's numbers of element types that the driver numbers otherwise.
ELEMENT_NUMBERS = {8: 10, 9: 8, 10: 9}


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
    for variant, compiled in compile_variants(all_variants()):
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
    manifest = KernelManifest(source_hash(), triton.__version__, ptxas_version(), OPTIONS, kernels)
    return manifest, files


def compile_variants(
    variants: Sequence[Variant],
) -> Iterator[tuple[Variant, tuple[Compiled, ...]]]:
    """Compile for all their architectures, in a process a core; yield in the given order.

    Raises:
        EngineError: as `compile_variant`.
    """
    jobs = [(variant, capability) for variant in variants for capability in variant.capabilities]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        results = pool.map(compile_variant, *zip(*jobs, strict=True))
        for variant in variants:
            yield variant, tuple(next(results) for _ in variant.capabilities)


class Manifest(Protocol):
    """What lies beside cubins."""

    def to_json(self) -> str:
        """Return the file's text."""


def write(folder: Path, manifest: Manifest, files: dict[str, bytes]) -> None:
    """Replace `folder`, whole or not at all."""
    with publish_folder(folder, manifest=MANIFEST, overwrite=True) as staging:
        for name, code in files.items():
            (staging / name).write_bytes(code)
        (staging / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def differences(folder: Path, manifest: Manifest, files: dict[str, bytes]) -> list[str]:
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
    return build_into(CUBINS, build_all, check=check)


def build_into(
    folder: Path, build: Callable[[], tuple[Manifest, dict[str, bytes]]], *, check: bool
) -> int:
    """Build into `folder`, or compare with what lies there; return the exit status."""
    try:
        manifest, files = build()
    except EdjeError as error:
        print(error, file=sys.stderr)
        return 1
    if check:
        different = differences(folder, manifest, files)
        print("\n".join(f"differs: {name}" for name in different) or "every file is the same")
        return 1 if different else 0
    write(folder, manifest, files)
    print(f"{len(files)} cubins, {sum(map(len, files.values())):,} bytes, in {folder}")
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
        compiled = to_ptx(variant, int(sm), folder)
        check_parameters(variant, compiled.asm["ptx"])
        is_exact, code, log = assemble_ptx(compiled.asm["ptx"], sm, Path(folder))
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise EngineError(f"{variant.name} needs scratch memory, which launches do not give")
    record = Cubin(
        file=f"{variant.name}.sm_{sm}.cubin",
        compute_capability=capability,
        exact=is_exact,
        num_bytes=len(code),
        sha256=hashlib.sha256(code).hexdigest(),
        shared_bytes=metadata.shared,
        tensor_maps=tuple(_tensor_maps(variant, metadata.tensordesc_meta)),
        **read_resources(log),
    )
    return Compiled(metadata.name, code, record)


def to_ptx(variant: Variant, sm: int, cache: str) -> Any:
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
    options = {**OPTIONS, "num_warps": variant.num_warps, "num_stages": variant.num_stages}
    knobs = triton.knobs
    with knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = cache
        knobs.compilation.disable_line_info = True
        return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def check_parameters(variant: Variant, ptx: str, scratch: tuple[Parameter, ...] = SCRATCH) -> None:
    """Compare the entry's parameters in PTX with what the manifest will say.

    Args:
        scratch: what the compiler appends to the variant's own.

    Raises:
        EngineError: they differ.
    """
    pattern = r"^\s*\.param (?:\.align \d+ )?\.(\w+)[^;\n]*_param_\d+(\[\d+\])?,?$"
    found = ["".join(parts) for parts in re.findall(pattern, ptx, re.M)]
    parameters = (*variant.parameters, *scratch)
    expected = [PTX_TYPES.get(kind, "u64") for kind in passed_types(parameters)]
    if found != expected:
        raise EngineError(f"{variant.name} takes {found} in PTX, expected {expected}")


def _ptxas() -> str:
    path: str = import_module("triton").knobs.nvidia.ptxas.path
    return path


def ptxas_version() -> str:
    """Return the version of the assembler."""
    shown = subprocess.run([_ptxas(), "--version"], capture_output=True, text=True, check=True)
    return shown.stdout.split(", V")[1].split()[0]


def _tensor_maps(variant: Variant, found: Sequence[Mapping[str, Any]]) -> Iterator[TensorMap]:
    """Yield what launches must encode; Triton says it in the parameters' order."""
    names = [item.name for item in variant.parameters if item.type.startswith("tensordesc")]
    for name, each in zip(names, found or (), strict=True):
        element = int(each["elem_type"])
        yield TensorMap(
            name,
            int(each["swizzle"]),
            ELEMENT_NUMBERS.get(element, element),
            int(each["elem_size"]),
            tuple(map(int, each["block_size"])),
        )


@cache
def _fixed_addresses() -> tuple[str, ...]:
    """Return what runs a program without address randomisation, where that is allowed.

    `ptxas` schedules some of what it makes for 10.0 in the order of addresses.
    """
    prefix = ("setarch", "-R")
    try:
        subprocess.run([*prefix, "true"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ()
    return prefix


def assemble_ptx(ptx: str, sm: str, folder: Path) -> tuple[bool, bytes, str]:
    """Assemble for the plain architecture, or where that has not what is used, for the chip.

    Returns:
        Whether it is for the very chip, the cubin, and what the assembler says of its resources.

    Raises:
        EngineError: neither takes it.
    """
    source, target = folder / "kernel.ptx", folder / "kernel.cubin"
    for is_exact in (False, True):
        name = f"sm_{sm}a" if is_exact else f"sm_{sm}"
        text = re.sub(r"^\.target sm_\d+a?", f".target {name}", ptx, flags=re.M)
        source.write_text(text, encoding="utf-8")
        command = [_ptxas(), "-v", f"--gpu-name={name}", "kernel.ptx", "-o", "kernel.cubin"]
        command = [*_fixed_addresses(), *command]
        shown = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if shown.returncode == 0:
            return is_exact, target.read_bytes(), shown.stderr
    raise EngineError(f"ptxas failed for sm_{sm}: {shown.stderr.strip()}")


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
        limits: dict[str, int] = {
            "registers": MAX_REGISTERS,
            "shared_bytes": MAX_SHARED_BYTES[cubin.compute_capability],
            "spill_bytes": 0,
            "stack_bytes": 0,
        }
        for name, most in limits.items():
            if getattr(cubin, name) > most:
                yield f"{cubin.file}: {name} {getattr(cubin, name)}, at most {most}"


if __name__ == "__main__":
    sys.exit(main())
