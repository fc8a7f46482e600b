"""The public faces: few names each, typed, documented, cheap to import; old names answer too."""

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
from edje.lazy import MOVED

ROOT = Path(__file__).parent.parent
FACES = (*("edje.engines", "edje.runtime.store", "edje.runtime.indexing", "edje.runtime.server"),)
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


HEAVY = ("torch", "transformers", "onnx", "onnxscript", "safetensors")


def run_python(code: str, *args: str) -> str:
    """Run `code` in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_after(code: str, *args: str) -> set[str]:
    """Return the names of all modules that are loaded after `code` ran."""
    loaded = "[name for name, module in sys.modules.items() if module is not None]"
    return set(run_python(f"{code}\nimport sys; print(*{loaded})", *args).split())


def test_import_edje_loads_only_the_standard_library():
    before, after = loaded_after("pass"), loaded_after("import edje")
    roots = {name.partition(".")[0] for name in after - before}
    assert roots - set(sys.stdlib_module_names) == {"edje"}
    assert sorted(name for name in after if name.startswith("edje.")) == [
        "edje.lazy",
    ]


def test_import_edje_takes_less_than_300_ms_of_cpu():
    code = "import time; t = time.process_time(); import edje; print(time.process_time() - t)"
    assert min(float(run_python(code)) for _ in range(3)) < 0.3


def test_the_online_path_never_imports_training_libraries():
    code = """
from edje import *
import edje.engines.builder.build, edje.engines.onnxruntime, edje.engines.openvino
import edje.runtime.cli.app, edje.runtime.cli.doctor
import edje.runtime.indexing.index, edje.engines.image
edje.runtime.cli.doctor.examine()
"""
    assert not loaded_after(code) & set(HEAVY)


def test_the_command_line_shows_help_without_numpy_or_rich():
    code = "from edje.runtime.cli.app import main; main(['--help'])"
    assert not loaded_after(code) & {*HEAVY, "numpy", "rich", "openvino", "onnxruntime"}


# TensorRT-RTX may be missing; its module cannot be imported then, under no name.
NAMES = [name for name in MOVED if "tensorrt" not in name and "pycuda" not in name]


def test_old_names_give_the_moved_modules_with_a_warning() -> None:
    program = f"""
import importlib, sys, warnings, edje.lazy
for old in {NAMES!r}:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = importlib.import_module(f"edje.{{old}}")
    new = sys.modules["edje." + edje.lazy.MOVED[old]]
    assert module is new and module.__spec__.name == new.__name__, old
    assert any("now" in str(each.message) for each in caught), old
from edje.runtime.doctor import examine
from edje.engines.cpu import usable_cores
assert examine().num_cpus == usable_cores()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_name_that_never_was_is_no_module() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"edje\.runtime\.doctors"):
        __import__("edje.runtime.doctors")


SNIPPET = """
import edje
from edje import Reranker, StoppedError, TokenStore

def stopped(error: StoppedError) -> tuple[int, int]:
    return error.num_scored, error.num_asked

def opened(path: str) -> TokenStore:
    return TokenStore.open(path)

edje.Rerankr
from edje import TokenStor
opened(3)
"""


def test_a_misspelt_name_is_an_error_to_a_type_checker_and_a_right_one_is_not(
    tmp_path: Path,
) -> None:
    """The package stands in for its modules' types: mypy reads them, and no library, anew."""
    (tmp_path / "snippet.py").write_text(SNIPPET, encoding="utf-8")
    (tmp_path / "edje").symlink_to(ROOT)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    command += ["--ignore-missing-imports", "--no-incremental", "snippet.py"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = [line for line in shown.stdout.splitlines() if line.startswith("snippet.py:")]
    assert len(found) == 3, shown.stdout + shown.stderr
    assert 'has no attribute "Rerankr"' in found[0]
    assert 'has no attribute "TokenStor"' in found[1]
    assert 'incompatible type "int"' in found[2]


def test_every_public_name_is_typed_where_it_is_handed_out() -> None:
    source = (ROOT / "__init__.py").read_text(encoding="utf-8")
    typed = source.partition("if TYPE_CHECKING:")[2].partition("__version__")[0]
    assert [name for name in edje.__all__ if name != "__version__" and name not in typed] == []
