"""Run `kernels/cuda/product_norm.cu` on the CPU: the source itself, on a machine of threads.

`emulated_hopper.h` stands where `hopper.cuh` has instructions of the GPU; a C++ compiler of the
host makes a library of both.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from edje.kernels.cuda_manifest import FOLDER
from edje.kernels.cuda_variants import cuda_variants, shared_bytes
from edje.kernels.variant import Variant
from launches import TensorMap

HERE = Path(__file__).parent
NAMES = {variant.name for variant in cuda_variants()}
PATIENCE_S = 60
FLAGS = ("-std=c++20", "-O2", "-w", "-shared", "-fPIC", "-pthread")


class MachineFault(AssertionError):
    """What no program for the machine may do."""


class Map(ctypes.Structure):
    """A tensor map as the machine reads it."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        *((name, ctypes.c_longlong) for name in ("num_rows", "num_columns", "row_stride")),
        *((name, ctypes.c_int) for name in ("box_rows", "box_columns", "swizzle", "element")),
        ("rest", ctypes.c_char * 80),
    )


class Arguments(ctypes.Structure):
    """What a launch passes."""

    _fields_ = (
        *((name, Map) for name in ("x", "weight", "residual")),
        *((name, ctypes.c_void_p) for name in ("bias", "norm_weight", "norm_bias")),
        *((name, ctypes.c_void_p) for name in ("out", "control")),
        *((name, ctypes.c_int) for name in ("rows_per_pair", "num_in")),
        ("epsilon", ctypes.c_float),
        ("rest", ctypes.c_char * 12),  # C++ rounds its size up to the maps' 64 bytes
    )


def run(variant: Variant, grid: tuple[int, ...], values: Mapping[str, Any], seed: int = 0) -> None:
    """Run one launch, as `launches.bind` has its arguments; raise what went wrong."""
    run_with(library(variant.name), grid, values, seed)


def run_with(
    machine: ctypes.CDLL, grid: tuple[int, ...], values: Mapping[str, Any], seed: int
) -> None:
    """Run one launch of a library of `compiled`."""
    given = {name: _encoded(value) for name, value in values.items()}
    fault = ctypes.create_string_buffer(200)
    machine.run_product_norm(grid[0], shared_bytes(), seed, ctypes.byref(Arguments(**given)), fault)
    if fault.value:
        raise MachineFault(fault.value.decode())


@cache
def library(name: str) -> ctypes.CDLL:
    """Return the library of a variant, compiled at the first call."""
    return compiled(next(each for each in cuda_variants() if each.name == name))


def compiled(
    variant: Variant, changes: Mapping[str, str] | None = None, patience_s: int = PATIENCE_S
) -> ctypes.CDLL:
    """Compile a variant for the machine of threads.

    Args:
        changes: text of the sources -> what stands there instead; each must be found once.
        patience_s: how long a wait may take before it is a fault.
    """
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    folder = Path(tempfile.mkdtemp(prefix="edje-emulated-"))
    try:
        found = dict.fromkeys(changes or {}, 0)
        for path in FOLDER.glob("*.cu*"):
            if path.is_file():
                text = path.read_text("utf-8")
                for old, new in (changes or {}).items():
                    found[old] += text.count(old)
                    text = text.replace(old, new)
                (folder / path.name).write_text(text, "utf-8")
        assert set(found.values()) <= {1}, f"not once in the sources: {found}"
        constants = {**variant.constants, "PATIENCE_S": patience_s}
        definitions = [f"-D{name}={value}" for name, value in constants.items()]
        places = [f"-I{HERE}", f"-I{folder}", str(HERE / "emulated_product_norm.cpp")]
        target = folder / "kernel.so"
        command = [compiler, *FLAGS, *definitions, *places, "-o", str(target)]
        shown = subprocess.run(command, capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        machine = ctypes.CDLL(str(target))
    finally:
        shutil.rmtree(folder)
    machine.descriptor_of.restype = ctypes.c_ulonglong
    return machine


def _encoded(value: Any) -> Any:
    if not isinstance(value, TensorMap):
        return value
    assert value.strides[1] == 1
    rows = value.address, *value.shape, value.strides[0]
    return Map(*rows, *value.block, value.swizzle, value.element)
