"""The compiled kernels are those of these sources, and keep to what a GPU has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edje.errors import EngineError
from edje.files import sha256_of
from edje.kernels import manifest as module
from edje.kernels.build import OPTIONS
from edje.kernels.manifest import CUBINS, MANIFEST, Cubin, read_manifest, source_hash
from edje.kernels.variant import MAX_REGISTERS, MAX_SHARED_BYTES, Parameter
from edje.kernels.variants import SOURCES, all_variants

ROOT = Path(__file__).parent.parent.parent
SCRATCH = (Parameter("global_scratch", "*i8"), Parameter("profile_scratch", "*i8"))


def all_cubins() -> list[Cubin]:
    return [cubin for entry in read_manifest().kernels.values() for cubin in entry.cubins]


def test_the_cubins_were_built_from_these_sources() -> None:
    assert read_manifest().source_hash == source_hash(), "the cubins are stale: run `make kernels`"


def test_every_triton_source_is_hashed_and_built() -> None:
    folder = ROOT / "kernels"
    sources = {path.name for path in folder.glob("*.py") if "@triton.jit" in path.read_text()}
    assert sources == set(SOURCES) == {f"{variant.source}.py" for variant in all_variants()}


def test_they_were_built_with_the_pinned_triton_and_these_options() -> None:
    assert read_manifest().options == OPTIONS
    pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert f"triton=={read_manifest().triton}" in pins


def test_every_variant_has_a_cubin_for_each_of_its_architectures() -> None:
    kernels = read_manifest().kernels
    assert kernels.keys() == {variant.name for variant in all_variants()}
    for variant in all_variants():
        entry = kernels[variant.name]
        assert entry.symbol == variant.function
        assert entry.num_warps == variant.num_warps
        assert entry.parameters == (*variant.parameters, *SCRATCH)
        assert dict(entry.constants) == dict(variant.constants)
        found = [(cubin.compute_capability, cubin.file) for cubin in entry.cubins]
        assert found == [
            (capability, f"{variant.name}.sm_{capability.replace('.', '')}.cubin")
            for capability in variant.capabilities
        ]
        maps = [item.name for item in variant.parameters if item.type.startswith("tensordesc")]
        for cubin in entry.cubins:
            assert [each.name for each in cubin.tensor_maps] == maps


def test_the_files_are_those_that_the_manifest_names() -> None:
    cubins = all_cubins()
    assert {path.name for path in CUBINS.iterdir()} == {MANIFEST, *(each.file for each in cubins)}
    for cubin in cubins:
        path = CUBINS / cubin.file
        assert (path.stat().st_size, sha256_of(path)) == (cubin.num_bytes, cubin.sha256)


def test_a_cubin_holds_its_own_kernel() -> None:
    for entry in read_manifest().kernels.values():
        for cubin in entry.cubins:
            code = (CUBINS / cubin.file).read_bytes()
            assert f".text.{entry.symbol}\0".encode() in code, cubin.file


def test_a_cubin_is_of_the_architecture_that_its_name_says() -> None:
    for cubin in all_cubins():
        header = (CUBINS / cubin.file).read_bytes()[:64]
        assert header[:4] == b"\x7fELF"
        assert int.from_bytes(header[18:20], "little") == 190  # EM_CUDA
        # The low byte of e_flags; the Blackwell ABI has it one byte higher.
        flags = int.from_bytes(header[48:52], "little")
        sm = int(cubin.compute_capability.replace(".", ""))
        assert sm in (flags & 0xFF, flags >> 8 & 0xFF), f"{cubin.file}: e_flags {flags:#x}"


def test_no_kernel_spills_or_asks_for_more_than_its_gpu_has() -> None:
    for cubin in all_cubins():
        assert (cubin.spill_bytes, cubin.stack_bytes) == (0, 0), cubin.file
        assert 0 < cubin.registers <= MAX_REGISTERS, cubin.file
        assert cubin.shared_bytes <= MAX_SHARED_BYTES[cubin.compute_capability], cubin.file


def test_a_block_fits_the_register_file() -> None:
    for entry in read_manifest().kernels.values():
        for cubin in entry.cubins:
            assert cubin.registers * 32 * entry.num_warps <= 65_536, cubin.file


def test_all_of_it_is_small_enough_for_the_repository() -> None:
    assert sum(path.stat().st_size for path in CUBINS.iterdir()) < 13 << 20


def test_what_is_written_is_read_again() -> None:
    assert read_manifest().to_json() == (CUBINS / MANIFEST).read_text("utf-8")


def test_a_changed_source_or_variant_changes_the_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = source_hash()
    monkeypatch.setattr(module, "COMPUTE_CAPABILITIES", ("8.0",))
    assert source_hash() != before
    monkeypatch.undo()
    monkeypatch.setattr(module, "all_variants", lambda: all_variants()[1:])
    assert source_hash() != before
    monkeypatch.undo()
    for name in SOURCES:
        (tmp_path / name).write_bytes((ROOT / "kernels" / name).read_bytes())
    monkeypatch.setattr(module, "__file__", str(tmp_path / "manifest.py"))
    assert source_hash() == before
    (tmp_path / "score.py").write_bytes(b"# changed")
    assert source_hash() != before


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (None, "missing or damaged"),
        ("{", "missing or damaged"),
        ("[]", "missing or damaged"),
        ('{"format_version": 2}', "missing or damaged"),
        ('{"format_version": 99}', "format 99, expected 2"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str | None, fault: str) -> None:
    if text is not None:
        (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(EngineError, match=fault) as raised:
        read_manifest(tmp_path)
    assert raised.value.hint == "make kernels"


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    content = json.loads(read_manifest().to_json())
    content["colour"] = "red"
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(EngineError, match="colour"):
        read_manifest(tmp_path)
