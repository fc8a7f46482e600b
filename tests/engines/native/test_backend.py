"""What the native backend says of a machine: GPU, driver, packages, tuning tables."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edje.bundle import BundleManifest
from edje.engines.build_options import BuildOptions
from edje.engines.contract import OpenOptions
from edje.engines.manifest import EngineManifest
from edje.engines.native import backend
from edje.engines.registry import open_engine, require_builder
from edje.errors import EngineError
from edje.kernels.tuning import serving_table, tuned_capabilities
from pretended_gpu import GPU_NAME, Machine, pretend_gpu


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return pretend_gpu(monkeypatch)


def test_without_a_gpu_it_builds_and_says_why_it_does_not_run(native_folder: Any) -> None:
    assert backend.why_not_build("fp16", BuildOptions()) is None
    reason = backend.why_not("fp16")
    assert reason is not None
    assert "NVIDIA" in reason
    with pytest.raises(EngineError, match=r"cannot run here: native fp16: .*NVIDIA"):
        open_engine(native_folder())


@pytest.mark.parametrize("capability", [(8, 0), (8, 7), (9, 0), (12, 1)])
def test_gpus_since_ampere_run_it(machine: Machine, capability: tuple[int, int]) -> None:
    machine.capability = capability
    assert backend.why_not("fp16") is None


def test_an_older_gpu_is_named(machine: Machine, native_folder: Any) -> None:
    machine.capability = (7, 5)
    reason = f"{GPU_NAME} has compute capability 7.5, the kernels are for 8.0"
    assert str(backend.why_not("fp16")).startswith(reason)
    (fault,) = backend.device_faults(EngineManifest.read(native_folder()))
    assert fault.startswith(f"device: {reason}")


def test_a_chip_that_the_kernels_do_not_serve_is_named(machine: Machine) -> None:
    machine.capability = (10, 3)
    assert "the products of this major version run on one chip only" in str(backend.why_not("fp16"))
    machine.capability = (10, 0)
    assert backend.why_not("fp16") is None


def test_fp8_needs_a_gpu_that_multiplies_it(machine: Machine, tiny_bundle: Path) -> None:
    machine.capability = (8, 6)
    assert backend.why_not("int8") is None
    reason = f"{GPU_NAME} has compute capability 8.6, the fp8 kernels are for 8.9, 9.0"
    assert str(backend.why_not("fp8")).startswith(reason)
    machine.capability = (8, 9)
    assert backend.why_not("fp8") is None
    (scales,) = backend.activation_scales("int8", BundleManifest.read(tiny_bundle).sizes)
    assert (scales.kind, scales.block, list(scales.never)) == ("dynamic", 128, ["attention_output"])


def test_an_older_driver_is_named(machine: Machine) -> None:
    sys.modules["cuda.bindings.driver"].cuDriverGetVersion = lambda: (0, 12040)
    assert "the driver serves CUDA 12.4, the kernels need 12.8" in str(backend.why_not("fp16"))


def test_another_tuning_table_makes_an_engine_stale(native_folder: Any) -> None:
    manifest = EngineManifest.read(native_folder())
    assert backend.device_faults(manifest) == []
    options = {**manifest.build_options, "tuning": {**manifest.build_options["tuning"], "9.0": "x"}}
    (fault,) = backend.device_faults(replace(manifest, build_options=options))
    assert fault.startswith("tuning table of 9.0: built with x, this edje has ")


def test_options_of_other_backends_and_unknown_gpus_are_refused() -> None:
    with pytest.raises(EngineError, match="no optimization_level") as raised:
        require_builder("native", "fp16", BuildOptions(optimization_level=3))
    assert "--optimization-level" in str(raised.value.hint)
    with pytest.raises(EngineError, match=r"no kernels for 7\.5, only for 8\.0"):
        require_builder("native", "fp16", BuildOptions(compute_capabilities=("7.5",)))
    with pytest.raises(EngineError, match="has no precision 'fp32', expected fp16"):
        require_builder("native", "fp32", BuildOptions())
    with pytest.raises(EngineError, match=r"no fp8 kernels for 8\.6, only for 8\.9, 9\.0"):
        require_builder("native", "fp8", BuildOptions(compute_capabilities=("8.6", "9.0")))


def test_settings_at_opening_are_refused(machine: Machine, native_folder: Any) -> None:
    options = OpenOptions(num_threads=2, backend_settings={"streams": "3"})
    with pytest.raises(EngineError, match="native cannot be opened so") as raised:
        open_engine(native_folder(), options)
    assert [fault.split(":")[0] for fault in raised.value.faults] == ["streams", "num_threads"]


def test_tables_serve_later_gpus_of_their_major_version() -> None:
    known = tuned_capabilities()
    assert known == ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
    asked = ("8.0", "8.7", "9.0", "10.3", "12.1", "7.5", "11.0", "13.0")
    found = [serving_table(each, known) for each in asked]
    assert found == ["8.0", "8.6", "9.0", "10.0", "12.0", None, None, None]


def test_running_an_engine_needs_neither_onnx_nor_the_precision_passes() -> None:
    code = (
        "import sys, edje.engines.native.backend\n"
        "names = ('onnx', 'torch', 'triton', 'edje.engines.precision')\n"
        "print([name for name in names if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
