"""What the doctor says of this machine, and of one that lacks things."""

from __future__ import annotations

import importlib.metadata
import json
import sys

import pytest

from edje.runtime.cli import doctor
from edje.runtime.cli.app import main
from pretended_gpu import GPU_NAME, pretend_gpu


def test_the_diagnosis_is_json_and_names_every_backend(capsys):
    assert main(["doctor", "--json"]) == 0
    diagnosis = json.loads(capsys.readouterr().out)
    backends = {status["name"]: status for status in diagnosis["backends"]}
    assert {"openvino", "onnxruntime"} <= backends.keys()
    assert "fp32" in backends["onnxruntime"]["usable"]
    assert diagnosis["num_cpus"] >= 1
    assert diagnosis["memory_bytes"] > 2**28


def test_the_table_says_what_builds_what_runs_and_why_not_the_rest(capsys, monkeypatch):
    statuses = (
        doctor.BackendStatus(
            "openvino",
            "1.0",
            runs={"fp32": None, "bf16": "no AMX here", "int8": "no VNNI here"},
            builds={"fp32": None, "bf16": "no AMX here", "int8": "no onnx here"},
        ),
        doctor.BackendStatus(
            "tensorrt-rtx",
            "2.0",
            runs=dict.fromkeys(("fp32", "fp16"), "no GPU here"),
            builds={"fp32": None, "fp16": None},
        ),
    )
    monkeypatch.setattr(doctor, "probe_backends", lambda: statuses)
    assert main(["doctor"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "backend version builds runs" in lines
    assert "openvino 1.0 fp32 fp32" in lines
    assert "tensorrt-rtx 2.0 fp32 fp16 none" in lines
    assert "openvino bf16 no AMX here" in lines
    assert {"openvino int8 no VNNI here", "openvino int8 no onnx here"} <= set(lines)
    assert "tensorrt-rtx fp32 fp16 no GPU here" in lines
    assert main(["doctor", "--json"]) == 0
    _, rtx = json.loads(capsys.readouterr().out)["backends"]
    assert (rtx["usable"], rtx["buildable"]) == ([], ["fp32", "fp16"])
    assert rtx["runs"] == {"fp32": "no GPU here", "fp16": "no GPU here"}
    assert rtx["builds"] == {"fp32": None, "fp16": None}


def test_missing_parts_come_with_the_command_that_installs_them(monkeypatch):
    requirements = [
        "numpy>=1.26",
        'onnxruntime>=1.20; extra == "cpu"',
        'openvino>=2025.0; extra == "cpu"',
        "pillow>=10.3; extra == 'index'",
        'edje-runtime[cpu]; extra == "dev"',
        'ruff; extra == "dev"',
    ]
    versions = {"onnxruntime": "1.0", "pillow": "10.3"}

    def version(package):
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(doctor, "probe_backends", lambda: ())
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: requirements)
    monkeypatch.setattr(importlib.metadata, "version", version)
    cpu, index = doctor.examine().extras
    assert (cpu.name, dict(cpu.installed), cpu.missing) == (
        "cpu",
        {"onnxruntime": "1.0"},
        ("openvino",),
    )
    assert cpu.command == "pip install 'edje-runtime[cpu]'"
    assert (index.name, index.missing) == ("index", ())


def test_the_driver_version_is_read(monkeypatch, tmp_path):
    driver = tmp_path / "version"
    monkeypatch.setattr(doctor, "probe_backends", lambda: ())
    monkeypatch.setattr(doctor, "DRIVER_VERSION", driver)
    assert doctor.examine().nvidia_driver is None
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5\n")
    assert doctor.examine().nvidia_driver == "550.54.15"


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU; the backends' libraries would look for a real one."""
    monkeypatch.setattr(doctor, "probe_backends", lambda: ())
    pretend_gpu(monkeypatch)


def test_the_gpu_is_named_with_the_speed_of_its_copies(capsys, gpu):
    assert main(["doctor", "--json"]) == 0
    gpu = json.loads(capsys.readouterr().out)["gpu"]
    assert gpu["name"] == GPU_NAME
    assert gpu["compute_capability"] == "compute capability 9.0"
    assert gpu["copies"]["gb_per_s"] > 0
    assert gpu["copies"]["blocks"] is True  # the stand-in copies while it is called
    assert main(["doctor"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"gpu {GPU_NAME}, compute capability 9.0" in shown
    assert "the call waits for the copy, as with pageable memory" in shown


def test_a_gpu_that_cannot_be_used_says_why(capsys, gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert main(["doctor"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "gpu not looked at: cuda.core cannot be imported" in shown
    assert "pip install 'edje-runtime[gpu]'" in shown


def test_without_a_driver_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr("edje.kernels.device.facts.DRIVER", "libno-such-driver.so.1")
    assert doctor.examine().gpu is None
