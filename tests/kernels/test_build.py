"""The ahead-of-time build: the same bytes every time, limits that hold, nothing half written."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edje.errors import EngineError
from edje.kernels import build
from edje.kernels.manifest import CUBINS, MANIFEST, KernelEntry, read_manifest
from edje.kernels.variant import COMPUTE_CAPABILITIES, Variant
from edje.kernels.variants import all_variants

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Triton is made for Linux only")
VARIANTS = {variant.name: variant for variant in all_variants()}
LOG = """ptxas info    : Compiling entry function 'gather_tokens' for 'sm_90'
    0 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers
"""


def committed() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in CUBINS.glob("*.cubin")}


# Every Triton function once, every architecture once or twice: `--check` compiles them all.
SAMPLE = {
    "assemble_int8_to_bfloat16_512": "8.0",
    "gather_tokens_int8_by_int32": "8.6",
    "scatter_tokens_float16_by_int64": "10.0",
    "product_float16_none_64x64x64": "8.0",
    "product_tma_bfloat16_exact_64x64x64": "9.0",
    "attention_float16_32_q16_s128": "12.0",
    "add_norm_bfloat16_512": "9.0",
    "score_float16": "8.6",
    "shallow_score_bfloat16": "9.0",
    "product8_fp8_none_to_float16_64x128x128": "8.9",
    "product8_tma_int8_exact_to_int8_64x128x128": "9.0",
    "quantize_float16_to_int8": "8.0",
}


def test_the_sample_holds_every_function_and_architecture() -> None:
    functions = {variant.function for variant in all_variants()}
    assert {VARIANTS[name].function for name in SAMPLE} == functions
    assert set(SAMPLE.values()) == set(COMPUTE_CAPABILITIES)


@linux_only
@pytest.mark.parametrize("name", SAMPLE)
def test_compiling_again_gives_the_committed_bytes(name: str) -> None:
    compiled = build.compile_variant(VARIANTS[name], SAMPLE[name])
    assert compiled.code == committed()[compiled.record.file]
    assert compiled.record in read_manifest().kernels[name].cubins


@linux_only
@pytest.mark.parametrize(
    ("name", "sm", "instructions"),
    [
        ("product_tma_float16_none_128x64x64", 90, ["wgmma.mma_async", "cp.async.bulk.tensor.2d"]),
        ("product_float16_none_64x64x64", 80, ["mma.sync", "cp.async.cg"]),
    ],
)
def test_products_use_what_makes_their_architecture_fast(
    name: str, sm: int, instructions: list[str], tmp_path: Path
) -> None:
    code = build.to_ptx(VARIANTS[name], sm, str(tmp_path)).asm["ptx"]
    assert [each for each in instructions if each not in code] == []


def test_parameters_other_than_those_of_the_code_are_refused() -> None:
    variant = VARIANTS["gather_tokens_float16_by_int32"]
    types = ("u64 .ptr .global .align 1", "u32")
    lines = [f"\t.param .{types[place == 4]} gather_tokens_param_{place}," for place in range(7)]
    ptx = (
        "\n".join(lines).removesuffix(",") + "\n)\n\tld.param.b64 \t%rd1, [gather_tokens_param_0];"
    )
    build.check_parameters(variant, ptx)
    with pytest.raises(
        EngineError, match=r"gather_tokens_float16_by_int32 takes .* in PTX, expected"
    ):
        build.check_parameters(variant, ptx.replace("u32", "u64"))
    with pytest.raises(EngineError, match="expected"):
        build.check_parameters(variant, "\n".join(lines[:-1]))


def test_a_tensor_map_is_128_bytes_its_shape_and_strides() -> None:
    variant = VARIANTS["product_tma_float16_none_64x64x64"]
    # x, weight and bias, out, control and numbers, scratch.
    a_map = [".align 64 .b8 {}[128]", ".u32 {}", ".u32 {}", ".u64 {}", ".u64 {}"]
    address = [".u64 .ptr .global .align 1 {}"]
    params = [*a_map, *a_map, *address, *a_map, *address, *[".u32 {}"] * 3, *address, *address]
    lines = [f"\t.param {each.format(f'k_param_{n}')}" for n, each in enumerate(params)]
    build.check_parameters(variant, ",\n".join(lines) + "\n)")
    with pytest.raises(EngineError, match="expected"):
        build.check_parameters(variant, ",\n".join(lines[1:]) + "\n)")


def test_resources_are_read_from_what_ptxas_says() -> None:
    assert build.read_resources(LOG) == {"registers": 48, "spill_bytes": 20, "stack_bytes": 0}
    with pytest.raises(ValueError, match="unpack"):
        build.read_resources("ptxas info: nothing to tell")


def broken(variant: Variant, **changes: int) -> dict[str, KernelEntry]:
    entry = read_manifest().kernels[variant.name]
    first, *rest = entry.cubins
    return {variant.name: replace(entry, cubins=(replace(first, **changes), *rest))}


def test_limits_that_a_kernel_breaks_are_named() -> None:
    variant = VARIANTS["score_float16"]
    assert list(build.limit_faults(variant, dict(read_manifest().kernels))) == []
    kernels = broken(variant, spill_bytes=8, shared_bytes=163 * 1024 + 1, registers=256)
    assert list(build.limit_faults(variant, kernels)) == [
        "score_float16.sm_80.cubin: registers 256, at most 255",
        "score_float16.sm_80.cubin: shared_bytes 166913, at most 166912",
        "score_float16.sm_80.cubin: spill_bytes 8, at most 0",
    ]


def test_writing_replaces_everything(tmp_path: Path) -> None:
    folder = tmp_path / "cubins"
    folder.mkdir()
    (folder / "old.cubin").write_bytes(b"old")
    (folder / MANIFEST).write_text("{}")
    build.write(folder, read_manifest(), committed())
    assert build.differences(folder, read_manifest(), committed()) == []
    assert build.differences(CUBINS, read_manifest(), committed()) == []
    assert {path.name for path in folder.iterdir()} == {MANIFEST, *committed()}


def test_differences_are_named(tmp_path: Path) -> None:
    build.write(tmp_path / "cubins", read_manifest(), {"a": b"1", "b": b"2"})
    (tmp_path / "cubins" / "c").write_bytes(b"3")
    found = build.differences(
        tmp_path / "cubins", read_manifest(), {"a": b"1", "b": b"0", "d": b""}
    )
    assert found == ["b", "c", "d"]


def test_without_triton_the_build_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(name: str) -> object:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(build, "import_module", refuse)
    assert build.main(["--check"]) == 1
    assert "Hint: pip install -e '.[kernels]'" in capsys.readouterr().err
