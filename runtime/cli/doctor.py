"""`edje doctor`: what this machine can run, and why not the rest."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ... import __version__
from ...engines.registry import BackendStatus, by_reason, probe_backends
from ...errors import EdjeError
from ...kernels.device import GPU_DEVICES, open_gpu
from ...kernels.device.facts import driver_fault
from ...kernels.device.measuring import CopySpeed, measure_copies
from ...machine import cpu_features, cpu_model, memory_bytes, usable_cores
from ...show import print_facts, print_table

DISTRIBUTION = "edje-runtime"
# "openvino>=2025.0; extra == "cpu"" -> openvino, cpu
_EXTRA = re.compile(r"^([\w.-]+)[^;]*;.*\bextra\s*==\s*[\"']([\w-]+)[\"']")
DRIVER_VERSION = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Extra:
    """One optional part of the installation: what is there, what is missing, how to get it."""

    name: str
    installed: Mapping[str, str]
    missing: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command that installs it."""
        return f"pip install '{DISTRIBUTION}[{self.name}]'"


@dataclass(frozen=True, slots=True)
class GpuDiagnosis:
    """The first GPU.

    Attributes:
        copies: how fast pinned memory is copied to it; None where it could not be measured.
        fault: why not.
    """

    name: str
    compute_capability: str
    copies: CopySpeed | None
    fault: str | None

    def describe(self) -> str:
        """Return it in one line."""
        rest = self.fault if self.copies is None else self.copies.describe()
        return ", ".join(filter(None, (self.name, self.compute_capability, rest)))


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What `examine` found.

    Attributes:
        cpu_features: instruction sets that matter to some precision.
        num_cpus: CPUs this process may use, by its affinity and its container's quota.
        memory_bytes: main memory of the machine, or what its container may take of it.
        nvidia_driver: its version, or None where there is none.
        gpu: the first GPU and its copies, measured now; None without a driver.
    """

    edje: str
    python: str
    system: str
    cpu_model: str
    cpu_features: tuple[str, ...]
    num_cpus: int
    memory_bytes: int
    nvidia_driver: str | None
    gpu: GpuDiagnosis | None
    backends: tuple[BackendStatus, ...]
    extras: tuple[Extra, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the diagnosis as plain JSON values."""
        extras = [{**asdict(extra), "command": extra.command} for extra in self.extras]
        backends = [
            {**asdict(backend), "usable": backend.usable, "buildable": backend.buildable}
            for backend in self.backends
        ]
        gpu = None if self.gpu is None else asdict(self.gpu)
        if gpu is not None and self.gpu is not None and self.gpu.copies is not None:
            gpu["copies"]["blocks"] = self.gpu.copies.blocks
        return {**asdict(self), "extras": extras, "backends": backends, "gpu": gpu}


def examine() -> Diagnosis:
    """Look at this machine: CPU, backends and their precisions, optional parts."""
    return Diagnosis(
        edje=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu_model=cpu_model(),
        cpu_features=cpu_features(),
        num_cpus=usable_cores(),
        memory_bytes=memory_bytes(),
        nvidia_driver=_nvidia_driver(),
        gpu=_gpu(),
        backends=probe_backends(),
        extras=tuple(_extras(_requirements())),
    )


def _requirements() -> list[str]:
    """Return what the installed package asks for; nothing where it runs from a bare checkout."""
    try:
        return importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _extras(requirements: Iterable[str]) -> list[Extra]:
    """Sort the optional requirements by extra and look up which are installed."""
    members: dict[str, list[str]] = {}
    for requirement in requirements:
        found = _EXTRA.match(requirement)
        if found and found[1] != DISTRIBUTION and found[2] != "dev":
            members.setdefault(found[2], []).append(found[1])
    return [_extra(name, packages) for name, packages in members.items()]


def _extra(name: str, packages: Iterable[str]) -> Extra:
    versions = {package: _version(package) for package in packages}
    installed = {package: version for package, version in versions.items() if version}
    return Extra(name, installed, tuple(p for p in versions if p not in installed))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> GpuDiagnosis | None:
    """Open the first GPU as the runtime does and copy to it; a second or so, CUDA's start."""
    if driver_fault() is not None:
        return None
    try:
        device = open_gpu(GPU_DEVICES[0])
    except EdjeError as error:
        hint = "" if error.hint is None else f" ({error.hint})"
        return GpuDiagnosis("", "", None, f"not looked at: {error.message}{hint}")
    capability = "compute capability {}.{}".format(*(device.compute_capability or "??"))
    try:
        return GpuDiagnosis(device.name, capability, measure_copies(device), None)
    except EdjeError as error:
        return GpuDiagnosis(device.name, capability, None, f"copies not measured: {error.message}")
    finally:
        device.close()


def _nvidia_driver() -> str | None:
    """Return the version of the kernel's NVIDIA driver, if one is loaded."""
    try:
        found = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", DRIVER_VERSION.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[1] if found else None


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Write what this machine can run, and why not the rest."""
    print_facts(
        "machine",
        {
            "edje": f"{diagnosis.edje} on Python {diagnosis.python}, {diagnosis.system}",
            "cpu": f"{diagnosis.cpu_model} ({diagnosis.num_cpus} usable)",
            "features": " ".join(diagnosis.cpu_features) or "none that matter",
            "memory": f"{diagnosis.memory_bytes / 2**30:.1f} GiB",
            "nvidia driver": diagnosis.nvidia_driver or "none",
            **({} if diagnosis.gpu is None else {"gpu": diagnosis.gpu.describe()}),
        },
    )
    backends = [
        (s.name, s.version or "-", _listed(s.buildable), _listed(s.usable))
        for s in diagnosis.backends
    ]
    print_table("backends", ("backend", "version", "builds", "runs"), backends)
    reasons = [row for status in diagnosis.backends for row in _why_not(status)]
    if reasons:
        print_table("why not", ("", ""), reasons)
    extras = [
        (extra.name, extra.command if extra.missing else "installed", ", ".join(extra.missing))
        for extra in diagnosis.extras
    ]
    print_table("optional parts", ("extra", "state or mend", "missing"), extras)


def _why_not(status: BackendStatus) -> Iterator[tuple[str, str]]:
    """Yield each reason for which a backend does not build or run, with its precisions."""
    verdicts = [*status.runs.items(), *status.builds.items()]
    for reason, precisions in by_reason(verdicts).items():
        yield f"{status.name} {_listed(precisions)}", reason


def _listed(precisions: Sequence[str]) -> str:
    return " ".join(precisions) or "none"
