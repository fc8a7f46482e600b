"""Old names of modules: they give the very module that stands elsewhere now, and say so."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edje.lazy import MOVED

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
