"""The public faces: few names each, typed, documented, and examples that run as they stand."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

import edje

ROOT = Path(__file__).parent.parent
FACES = ("edje.engines", "edje.runtime.store", "edje.runtime.indexing")
MOST_NAMES = 8


def source_of(face: str) -> str:
    return ROOT.joinpath(*face.split(".")[1:], "__init__.py").read_text(encoding="utf-8")


@pytest.fixture(params=FACES)
def face(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


def test_a_face_has_few_names_and_all_of_them_are_there(face: ModuleType) -> None:
    assert 0 < len(face.__all__) <= MOST_NAMES
    assert list(face.__all__) == sorted(face.__all__)
    for name in face.__all__:
        assert getattr(face, name).__name__ == name


@pytest.mark.parametrize("name", FACES)
def test_a_face_types_every_name_and_hides_misspelt_ones(name: str) -> None:
    """A type checker reads the imports, not the `__getattr__`."""
    face, tree = importlib.import_module(name), ast.parse(source_of(name))
    typed = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(face.__all__) <= typed
    with pytest.raises(AttributeError, match="no_such_name"):
        face.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", FACES)
def test_importing_a_face_loads_no_heavy_library(name: str) -> None:
    heavy = ("torch", "transformers", "onnx", "onnxruntime", "openvino", "ray", "PIL")
    code = f"import sys, {name}; print([n for n in {heavy} if n in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def public() -> list[tuple[str, object]]:
    """Every public name with what it stands for, each once."""
    found = {}
    for module in (edje, *map(importlib.import_module, FACES)):
        for name in set(module.__all__) - {"__version__"}:
            found[name] = getattr(module, name)
    return sorted(found.items())


def test_every_public_name_and_method_is_documented() -> None:
    bare = []
    for name, value in public():
        members = inspect.getmembers(value, inspect.isfunction) if inspect.isclass(value) else []
        named = [(name, value), *((f"{name}.{member}", each) for member, each in members)]
        bare += [n for n, each in named if not (n.split(".")[-1][0] == "_" or inspect.getdoc(each))]
    assert bare == []


def test_every_public_function_says_what_it_raises() -> None:
    functions = [(n, each) for n, each in public() if inspect.isfunction(each)]
    assert len(functions) >= 6
    silent = [n for n, each in functions if "Raises:" not in (inspect.getdoc(each) or "")]
    assert set(silent) <= {"incoming_name", "read_skipped"}, "these raise nothing of their own"


@pytest.fixture
def folder(
    tmp_path: Path, official_tiny: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The current folder holds what the examples name, but for what they make."""
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoint_16.pth", "lm", "siglip"):
        (tmp_path / name).symlink_to(official_tiny / name)
    (tmp_path / "photos").mkdir()
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number, 90, 30)).save(f"photos/{number}.png")
    (tmp_path / "queries.tsv").write_text("a red kite\t3.png\na dog\n")
    return tmp_path


@pytest.mark.parametrize("name", ["edje", *FACES])
def test_the_examples_of_the_docstrings_run(name: str, folder: Path, tiny_bundle: Path) -> None:
    examples = doctest.DocTestParser().get_examples(importlib.import_module(name).__doc__ or "")
    if name != "edje":
        shutil.copytree(tiny_bundle, folder / "bundle")
    code = "".join(example.source for example in examples)
    names: dict[str, object] = {}
    exec(compile(code, name, "exec"), names)
    if name == "edje":
        assert [hit.id for hit in names["best"]]  # type: ignore[attr-defined]


def test_without_its_libraries_an_export_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("edje.export.export.LIBRARIES", ("torch", "no_such_library"))
    with pytest.raises(edje.EdjeError, match="exporting needs no_such_library") as caught:
        edje.export_bundle("checkpoint_16.pth", "lm", tmp_path / "bundle")
    assert caught.value.hint == "pip install 'edje-runtime[export]'"
    assert list(tmp_path.iterdir()) == []


def test_the_api_page_holds_every_public_name(tmp_path: Path) -> None:
    pytest.importorskip("pdoc", reason="pdoc is not installed: make setup")
    command = [sys.executable, str(ROOT / ".ci" / "api_docs.py"), str(tmp_path)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    for face in ("edje", *FACES):
        page = tmp_path.joinpath(*face.split(".")).with_suffix(".html").read_text("utf-8")
        names = set(importlib.import_module(face).__all__) - {"__version__"}
        assert [name for name in sorted(names) if f'id="{name}"' not in page] == []
