"""The house rules that tools do not hold: pins, versions, packages, targets, sizes, names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from typer.testing import CliRunner

import edje
from edje.runtime.cli.app import app

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
NAME = "edje-runtime"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
EXTRAS = {
    *("cpu", "gpu", "gpu-onnxruntime", "tensorrt", "rtx", "pycuda"),
    *("build", "kernels", "export", "index", "cluster", "cluster-serve", "serve", "dev", "perf"),
}
# What a package of an extra is imported as, where its own name with underscores is not it.
IMPORTED_AS = {
    "cuda-bindings": "cuda.bindings",
    "cuda-core": "cuda.core",
    "onnxruntime-gpu": "onnxruntime",
    "pillow": "PIL",
    "tensorrt-rtx-cu13-bindings": "tensorrt_rtx",
    "tensorrt-rtx-cu13-libs": "tensorrt_rtx",
}
# Folders that belong to the checkout and never travel in the wheel.
NOT_IN_THE_WHEEL = ("perf", "demo/training")
# torch's Linux build on PyPI names these itself, each with an exact version.
PINNED_BY_TORCH = re.compile(r"nvidia-|cuda-")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads(read("pyproject.toml"))


@pytest.fixture(scope="module")
def pins() -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in read("constraints.txt").splitlines())
    return [Requirement(line) for line in lines if line]


def pinned(pins: list[Requirement], name: str, python: str) -> list[Version]:
    """The versions that `pins` give a package under one Python."""
    where = {"python_version": python, "python_full_version": f"{python}.0"}
    return [
        Version(next(iter(pin.specifier)).version)
        for pin in pins
        if canonicalize_name(pin.name) == canonicalize_name(name)
        and (pin.marker is None or pin.marker.evaluate(where))
    ]


def declared(project: dict[str, Any]) -> list[Requirement]:
    extras = project["project"]["optional-dependencies"].values()
    lines = [*project["project"]["dependencies"], *(line for extra in extras for line in extra)]
    return [needed for line in lines if (needed := Requirement(line)).name != NAME]


def test_every_pin_is_exact(pins: list[Requirement]) -> None:
    assert [str(pin) for pin in pins if not re.fullmatch(r"==[^*,]+", str(pin.specifier))] == []


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_has_one_pin_in_its_range(
    project: dict[str, Any], pins: list[Requirement], python: str
) -> None:
    for needed in declared(project):
        (pin,) = pinned(pins, needed.name, python)
        assert needed.specifier.contains(pin), f"{needed} is pinned to {pin}"


def test_torch_has_the_pin_that_the_cpu_build_matches(pins: list[Requirement]) -> None:
    assert pinned(pins, "torch", "3.11") == [Version("2.13.0")]


def installed_closure(name: str, extras: frozenset[str], seen: set[str]) -> Iterator[str]:
    """Yield every installed package that `name[extras]` brings along."""
    for line in distribution(name).requires or []:
        needed = Requirement(line)
        marker = needed.marker
        wanted = marker is None or any(marker.evaluate({"extra": e}) for e in extras | {""})
        package = canonicalize_name(needed.name)
        key = f"{package}[{','.join(sorted(needed.extras))}]"
        if not wanted or key in seen:
            continue
        seen.add(key)
        if package != NAME:
            yield package
        yield from installed_closure(package, frozenset(needed.extras), seen)


def test_the_environment_is_the_pinned_one(pins: list[Requirement]) -> None:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    try:
        packages = sorted(set(installed_closure(NAME, frozenset({"dev"}), set())))
    except PackageNotFoundError as error:
        pytest.fail(f"{error} is not installed; run `make setup`")
    assert len(packages) > 40
    wrong = {
        package: (version(package), pinned(pins, package, python))
        for package in packages
        if not PINNED_BY_TORCH.match(package)
        and [Version(Version(version(package)).public)] != pinned(pins, package, python)
    }
    assert wrong == {}


def test_the_extras_are_the_documented_ones(project: dict[str, Any]) -> None:
    assert set(project["project"]["optional-dependencies"]) == EXTRAS


def test_every_package_of_an_extra_is_imported_somewhere(project: dict[str, Any]) -> None:
    """An import statement names it, or a string does: for `import_module`."""
    folders = ("export", "engines", "kernels", "runtime", "demo", "perf")
    source = "\n".join(p.read_text("utf-8") for f in folders for p in (ROOT / f).rglob("*.py"))
    extras = dict(project["project"]["optional-dependencies"])
    del extras["dev"]
    names = {Requirement(line).name for lines in extras.values() for line in lines} - {NAME}
    modules = {name: IMPORTED_AS.get(name, name.replace("-", "_")) for name in names}
    words = r"^ *(import|from) {0}\b|[\"']{0}[\"'.]"
    dead = [
        n for n, m in modules.items() if not re.search(words.format(re.escape(m)), source, re.M)
    ]
    assert dead == []


def test_the_listed_packages_are_the_folders_with_modules(project: dict[str, Any]) -> None:
    folders = ("export", "engines", "kernels", "runtime", "demo")
    modules = [p.relative_to(ROOT) for f in folders for p in (ROOT / f).rglob("*.py")]
    found = {".".join(("edje", *path.parent.parts)) for path in modules} | {"edje"}
    left_out = {f"edje.{folder.replace('/', '.')}" for folder in NOT_IN_THE_WHEEL}
    assert set(project["tool"]["setuptools"]["packages"]) == found - left_out


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The files of a wheel that was built from a copy of this tree, installing nothing."""
    folder = tmp_path_factory.mktemp("wheel")
    hidden = shutil.ignore_patterns(".*", "build", "dist", "demo-out", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, folder / "tree", ignore=hidden)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--wheel-dir", str(folder), str(folder / "tree")]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path).namelist()


def test_the_wheel_holds_the_product_and_nothing_else(wheel: list[str]) -> None:
    folders = {name.partition("/")[0] for name in wheel}
    assert sorted(folders) == ["edje", f"edje_runtime-{edje.__version__}.dist-info"]
    left_out = tuple(f"edje/{folder}/" for folder in (*NOT_IN_THE_WHEEL, "tests", "build"))
    assert [name for name in wheel if name.startswith(left_out)] == []


def test_the_wheel_holds_every_module_and_what_they_read(wheel: list[str]) -> None:
    folders = ("export", "engines", "kernels", "runtime", "demo")
    paths = [p for f in folders for p in (ROOT / f).rglob("*.py")] + list(ROOT.glob("*.py"))
    modules = {str(path.relative_to(ROOT)) for path in paths}
    modules = {name for name in modules if not name.startswith(NOT_IN_THE_WHEEL)}
    assert {f"edje/{name}" for name in modules | {"py.typed"}} <= set(wheel)
    cubins = {path.name for path in (ROOT / "kernels" / "cubins").iterdir()}
    assert {f"edje/kernels/cubins/{name}" for name in cubins} <= set(wheel)
    assert {"edje/demo/page.html", "edje/demo/model/model.safetensors"} <= set(wheel)
    page = {path.name for path in (ROOT / "runtime" / "server" / "page").iterdir()}
    assert {f"edje/runtime/server/page/{name}" for name in page} <= set(wheel)


def test_the_benchmarks_and_the_training_run_from_the_checkout() -> None:
    for module in ("edje.perf.harness", "edje.demo.training"):
        assert find_spec(module) is not None, f"{module} is not found by an editable install"


def test_every_package_has_an_init(project: dict[str, Any]) -> None:
    packages = project["tool"]["setuptools"]["packages"]
    folders = [ROOT.joinpath(*package.split(".")[1:]) for package in packages]
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_one_version_everywhere(project: dict[str, Any]) -> None:
    newest = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", read("CHANGELOG.md"), re.M)
    assert newest[0] == project["project"]["version"] == edje.__version__ == version(NAME)


def test_the_licence_is_whole(project: dict[str, Any]) -> None:
    assert project["project"]["license"] == "Apache-2.0"
    licence = read("LICENSE")
    assert "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", read("Makefile"), re.M))


def test_make_help_lists_real_targets() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = set(re.findall(r"^make ([a-z-]+) ", shown.stdout, re.M))
    assert {"demo", "test", "test-clients", "check", "bench", "clean"} <= listed <= targets()
    phony = re.search(r"^\.PHONY: (.*)$", read("Makefile"), re.M)
    assert phony is not None
    assert set(phony[1].split()) == targets()


def test_every_pin_of_the_clients_environments_is_exact() -> None:
    files = sorted((ROOT / "tests" / "clients").glob("*/requirements.txt"))
    assert [path.parent.name for path in files] == ["adapters", "cohere5", "fuzz", "newest", "ray"]
    for path in files:
        lines = [line for line in path.read_text("utf-8").splitlines() if line[0] != "#"]
        assert [line for line in lines if not re.fullmatch(r"[\w.\[\]-]+==[\w.]+", line)] == []


# Stands in for Python, pip and what they install: writes down how it was called.
RECORDER = """#!/bin/sh
echo "$(basename "$0") $*" >> calls
case "$*" in *"-m venv"*)
    mkdir -p .venv/bin && for name in python pip edje pytest; do cp "$0" .venv/bin/$name; done
esac
"""


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], list[str]]:
    """Run a target of the Makefile in a folder of its own; return what was called."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "recorder").write_text(RECORDER)
    (tmp_path / "recorder").chmod(0o755)

    def run(target: str) -> list[str]:
        calls = tmp_path / "calls"
        calls.write_text("")
        command = ["make", target, "PYTHON=./recorder"]
        subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
        return calls.read_text().splitlines()

    return run


def installs(calls: list[str]) -> list[str]:
    """The extras that were installed."""
    return [found[1] for call in calls if (found := re.search(r" -e \.\[(.*?)\] ", call))]


def test_make_demo_installs_what_the_demo_needs_and_make_test_the_rest(make, tmp_path) -> None:
    first = make("demo")
    assert installs(first) == ["cpu,build,export,index"]
    assert first[-1] == "edje demo"
    assert make("demo") == ["edje demo"]
    second = make("test")
    assert installs(second) == ["dev"]
    assert not any("venv" in call for call in second), "both share one .venv"
    assert make("demo") == ["edje demo"]
    assert installs(make("test")) == []


def test_after_make_test_the_demo_installs_nothing(make) -> None:
    assert installs(make("test")) == ["dev"]
    assert make("demo") == ["edje demo"]


@pytest.mark.parametrize("target", ["demo", "test"])
def test_changed_pins_are_installed_again(make, tmp_path, target) -> None:
    before = installs(make(target))
    for stamp in (tmp_path / ".venv").glob(".installed*"):
        os.utime(stamp, (1, 1))
    assert installs(make(target)) == before
    assert installs(make(target)) == []


def code_of(markdown: str) -> str:
    """The code blocks and code spans of a Markdown page, one a line."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", markdown, re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S))
    return "\n".join([*blocks, *spans])


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "tests/README.md"])
def test_the_make_commands_of_the_pages_exist(page: str) -> None:
    named = set(re.findall(r"^(?:\$ )?make ([a-z-]+)", code_of(read(page)), re.M))
    assert named <= targets()
    assert "test" in named


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "tests/README.md", "tests/clients/README.md"]
)
def test_the_local_links_of_the_pages_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", read(page))
    links += re.findall(r'(?:src|href)="(?!https?:|#)([^"#]+)"', read(page))
    folder = (ROOT / page).parent
    assert [link for link in links if not (folder / link).exists()] == []


def test_the_readme_has_a_row_for_every_folder(project: dict[str, Any]) -> None:
    table = read("README.md").partition("## Folders")[2]
    named = set(re.findall(r"\[`([a-z/]+)/`\]\([a-z/]+\)", table))
    packages = set(project["tool"]["setuptools"]["packages"]) - {"edje"}
    folders = {"/".join(package.split(".")[1:]) for package in packages}
    short = {name: f"engines/{name}" for name in ("native", "tensorrt")}
    assert {short.get(name, name) for name in named} == folders | {"perf", "tests"}


def test_the_readme_names_verbs_that_exist() -> None:
    code = code_of(read("README.md"))
    verbs = set(re.findall(r"^(?:\$ )?edje ([a-z]+)\b", code, re.M))
    assert {"export", "build", "index", "rerank"} <= verbs
    for verb in sorted(verbs):
        shown = CliRunner().invoke(app, [verb, "--help"])
        assert shown.exit_code == 0, f"edje {verb} --help: {shown.output}"


def test_ci_runs_check_then_the_readmes_test_command() -> None:
    commands = re.findall(r"^make .*$", read(".ci/run"), re.M)
    assert commands == ["make check", "make test"]


def test_only_edje_is_importable(tmp_path: Path) -> None:
    probe = (
        "from importlib.util import find_spec\n"
        "import edje.errors, edje.engines.manifest\n"
        "names = ['export', 'engines', 'kernels', 'runtime', 'perf', 'demo', 'bundle', 'errors']\n"
        "print([name for name in names if find_spec(name)])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "[]"
