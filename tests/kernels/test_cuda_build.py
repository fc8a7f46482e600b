"""The cubins of CUDA C++ are those of these sources, keep their limits, and use the chip."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from importlib import import_module

import pytest

from edje.errors import EngineError
from edje.files import sha256_of
from edje.kernels import cuda_build as build
from edje.kernels.build import limit_faults
from edje.kernels.cuda_manifest import (
    CUDA_CUBINS,
    FOLDER,
    all_kernels,
    cuda_source_hash,
    read_cuda_manifest,
)
from edje.kernels.cuda_variants import SOURCES, cuda_variants
from edje.kernels.manifest import MANIFEST, read_manifest

VARIANTS = {variant.name: variant for variant in cuda_variants()}
MANIFESTED = read_cuda_manifest().kernels
needs_nvcc = pytest.mark.skipif(build.nvcc_path() is None, reason=f"no nvcc: {build.INSTALL}")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Triton is made for Linux only")
# Three warpgroups share 65,536 registers; `setmaxnreg` moves them from one to the others.
REGISTERS_A_THREAD = 65_536 // 384 // 8 * 8


def test_the_cubins_were_built_from_these_sources() -> None:
    assert read_cuda_manifest().source_hash == cuda_source_hash(), "stale: run `make kernels`"
    assert set(SOURCES) == {path.name for path in FOLDER.glob("*.cu*") if path.is_file()}


def test_they_were_made_by_the_assembler_of_the_others() -> None:
    assert read_cuda_manifest().ptxas == read_manifest().ptxas


def test_the_files_are_those_that_the_manifest_names() -> None:
    assert MANIFESTED.keys() == VARIANTS.keys()
    cubins = [cubin for entry in MANIFESTED.values() for cubin in entry.cubins]
    assert {path.name for path in CUDA_CUBINS.iterdir()} == {
        MANIFEST,
        *(cubin.file for cubin in cubins),
    }
    for cubin in cubins:
        path = CUDA_CUBINS / cubin.file
        assert (path.stat().st_size, sha256_of(path)) == (cubin.num_bytes, cubin.sha256)
    assert sum(path.stat().st_size for path in CUDA_CUBINS.iterdir()) < 1 << 18
    assert read_cuda_manifest().to_json() == (CUDA_CUBINS / MANIFEST).read_text("utf-8")


def test_no_name_is_used_twice() -> None:
    assert not MANIFESTED.keys() & read_manifest().kernels.keys()
    assert all_kernels().keys() == {*MANIFESTED, *read_manifest().kernels}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_kernel_keeps_to_what_a_block_has(name: str) -> None:
    variant, entry = VARIANTS[name], MANIFESTED[name]
    assert list(limit_faults(variant, dict(MANIFESTED))) == []
    assert entry.parameters == variant.parameters
    assert dict(entry.constants) == dict(variant.constants)
    (cubin,) = entry.cubins
    assert (cubin.compute_capability, cubin.exact) == ("9.0", True)
    assert (cubin.spill_bytes, cubin.stack_bytes) == (0, 0)
    # Exactly as many: what the fetching warps give back must be what the others take.
    assert cubin.registers == REGISTERS_A_THREAD == 168
    assert entry.num_warps * 32 == 384


@linux_only
@pytest.mark.parametrize("name", VARIANTS)
def test_the_code_has_the_instructions_that_it_was_written_for(name: str) -> None:
    disassembler = import_module("triton").knobs.nvidia.nvdisasm.path
    (cubin,) = MANIFESTED[name].cubins
    command = [disassembler, "-c", str(CUDA_CUBINS / cubin.file)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    words = Counter(
        word for line in shown.splitlines() if "/*" in line for word in line.split()[1:4]
    )
    kind = ".BF16" if VARIANTS[name].constants["BFLOAT16"] else ""
    # 4 steps of 16 inputs times 2 halves of the columns; x, 2 x weight and 3 x residual.
    assert words[f"HGMMA.64x192x16.F32{kind}"] == 8
    assert words["UTMALDG.2D"] == 6
    assert words["USETMAXREG.DEALLOC.CTAPOOL"] == words["USETMAXREG.TRY_ALLOC.CTAPOOL"] == 1
    assert words["STG.E.128"] == 24  # 16 bytes at a time: 12 of each of a thread's two rows
    assert [word for word in words if word.startswith(("LDL", "STL", "ATOM", "RED."))] == []
    assert max(map(int, re.findall(r"\bR(\d+)\b", shown))) < 240  # what the readers take


@needs_nvcc
@linux_only
@pytest.mark.parametrize("name", VARIANTS)
def test_compiling_again_gives_the_committed_bytes(name: str) -> None:
    compiled = build.compile_cuda(VARIANTS[name])
    assert compiled.record in MANIFESTED[name].cubins
    assert compiled.code == (CUDA_CUBINS / compiled.record.file).read_bytes()


def test_without_nvcc_the_committed_cubins_stay(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.stat().st_mtime_ns for path in CUDA_CUBINS.iterdir())
    monkeypatch.setattr(build, "nvcc_path", lambda: None)
    assert build.main([]) == 0
    assert "stays as it is: there is no nvcc here (pip install" in capsys.readouterr().out
    assert build.main(["--check"]) == 1
    assert before == sorted(path.stat().st_mtime_ns for path in CUDA_CUBINS.iterdir())
    with pytest.raises(EngineError, match="needs nvcc"):
        build.build_cuda()
