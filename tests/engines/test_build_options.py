"""Build options that cannot be: all named as `edje build` spells them, with a hint that helps."""

import pytest

from edje.engines.build_options import BuildOptions
from edje.engines.registry import REGISTRY, require_builder
from edje.errors import EngineError
from edje.runtime.cli.app import main

GIVEN = {
    "--workspace-mb": {"workspace_bytes": 1 << 20},
    "--optimization-level": {"optimization_level": 3},
    "--compute-capability": {"compute_capabilities": ("8.9",)},
    "--hardware-compatible": {"hardware_compatible": True},
    "--version-compatible": {"version_compatible": True},
    "--report": {"report": True},
}


def refused(backend: str, options: BuildOptions, precision: str = "fp32") -> EngineError:
    with pytest.raises(EngineError) as caught:
        require_builder(backend, precision, options)
    return caught.value


@pytest.mark.parametrize("flag", GIVEN)
def test_an_option_of_another_backend_is_to_be_left_out(flag):
    for backend in ("openvino", "onnxruntime"):
        error = refused(backend, BuildOptions(**GIVEN[flag]))
        assert error.hint == f"leave out or change {flag}: see `edje build --help`"


def test_all_options_that_do_not_fit_are_named_and_no_other():
    pytest.importorskip("edje.engines.tensorrt.rtx", reason="needs the extra rtx")
    both = BuildOptions(report=True, hardware_compatible=True, version_compatible=True)
    hint = refused("tensorrt-rtx", both).hint
    assert "--hardware-compatible, --version-compatible:" in hint
    assert "--report" not in hint


def test_a_gpu_that_a_backend_cannot_build_for_is_told_from_those_that_it_can():
    rtx = pytest.importorskip("edje.engines.tensorrt.rtx", reason="needs the extra rtx")
    error = refused("tensorrt-rtx", BuildOptions(compute_capabilities=("5.0",)))
    assert "--compute-capability" in error.hint
    assert "7.5" not in error.message, "fp32 cannot be built for it"
    for capability in rtx.known_capabilities()[1:]:
        assert capability in error.message
        require_builder("tensorrt-rtx", "fp32", BuildOptions(compute_capabilities=(capability,)))


def test_where_the_machine_is_at_fault_the_hint_is_not_about_options(monkeypatch):
    from edje.engines import openvino as ov

    monkeypatch.setattr(ov, "why_not", lambda precision: "no units")
    assert "--report" not in refused("openvino", BuildOptions(report=True)).hint


@pytest.mark.parametrize("backend", REGISTRY)
def test_values_that_no_backend_takes_are_refused_all_at_once(backend):
    wrong = BuildOptions(-1 << 20, 9, ("8.9", "new", "90"))
    assert refused(backend, wrong).faults == (
        "--optimization-level: got 9, expected 0 (fast build) to 5",
        "--workspace-mb: got -1, expected 1 or more",
        "--compute-capability: got 'new', expected major and minor, as 8.9",
        "--compute-capability: got '90', expected major and minor, as 8.9",
    )


def test_options_of_one_backend_do_not_go_with_auto(tiny_bundle, tmp_path, capsys):
    common = ["build", str(tiny_bundle), "--out", str(tmp_path / "engine")]
    assert main([*common, "--workspace-mb", "64", "--report"]) == 2
    told = capsys.readouterr().err
    assert "--workspace-mb: it belongs to one backend; name that in place of auto" in told
    assert "--report: it belongs to one backend" in told
    assert not (tmp_path / "engine").exists()


def test_the_help_says_which_backend_takes_an_option(capsys):
    assert main(["build", "--help"]) == 0
    told = capsys.readouterr().out.split("Options:")[1]
    for flag in GIVEN:
        assert "tensorrt" in told.split(flag)[1].split("  --")[0], flag
