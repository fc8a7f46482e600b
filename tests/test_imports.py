"""What importing and serving must not pull in, and what `import edje` may cost."""

from __future__ import annotations

import subprocess
import sys

import pytest

import edje

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


@pytest.mark.parametrize("name", edje.__all__)
def test_every_public_name_is_there(name):
    assert getattr(edje, name) is not None
    assert name in dir(edje)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Rerankr"):
        edje.Rerankr  # noqa: B018
