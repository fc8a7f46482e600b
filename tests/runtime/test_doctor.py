"""What the doctor says of this machine, and of one that lacks things."""

from __future__ import annotations

import json

import pytest

from edje.runtime import doctor
from edje.runtime.cli import main


def test_the_diagnosis_is_json_and_names_every_backend(capsys):
    assert main(["doctor", "--json"]) == 0
    diagnosis = json.loads(capsys.readouterr().out)
    backends = {status["name"]: status for status in diagnosis["backends"]}
    assert {"openvino", "onnxruntime"} <= backends.keys()
    assert "fp32" in backends["onnxruntime"]["usable"]
    assert diagnosis["num_cpus"] >= 1
    assert diagnosis["memory_bytes"] > 2**28


def test_the_table_says_why_a_precision_does_not_run(capsys, monkeypatch):
    status = doctor.BackendStatus("openvino", "1.0", {"fp32": None, "bf16": "no AMX here"})
    monkeypatch.setattr(doctor, "probe_backends", lambda: (status,))
    assert main(["doctor"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["openvino", "1.0", "fp32", "runs"] in lines
    assert ["openvino", "1.0", "bf16", "no", "AMX", "here"] in lines


@pytest.fixture
def installed(monkeypatch):
    versions = {"onnxruntime": "1.0", "pillow": "10.3"}
    monkeypatch.setattr(doctor, "_version", versions.get)


def test_missing_parts_come_with_the_command_that_installs_them(installed):
    requirements = [
        "numpy>=1.26",
        'onnxruntime>=1.20; extra == "cpu"',
        'openvino>=2025.0; extra == "cpu"',
        "pillow>=10.3; extra == 'index'",
        'edje-runtime[cpu]; extra == "dev"',
        'ruff; extra == "dev"',
    ]
    cpu, index = doctor._extras(requirements)
    assert (cpu.name, dict(cpu.installed), cpu.missing) == (
        "cpu",
        {"onnxruntime": "1.0"},
        ("openvino",),
    )
    assert cpu.command == "pip install 'edje-runtime[cpu]'"
    assert (index.name, index.missing) == ("index", ())


def test_the_driver_version_is_read(monkeypatch, tmp_path):
    driver = tmp_path / "version"
    monkeypatch.setattr(doctor, "_DRIVER", driver)
    assert doctor._nvidia_driver() is None
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5\n")
    assert doctor._nvidia_driver() == "550.54.15"
