"""Runs Python on a CPU with AVX2 and without VNNI: this one, or the one that QEMU makes of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

import pytest

from edje.engines.cpu import why_no_vnni
from edje.machine import cpu_features, hidden_features

FEATURES = "avx2,fma"
# A Haswell without what QEMU does not emulate, about which it would warn.
_EMULATED = "Haswell,-tsc-deadline,-hle,-rtm,-invpcid,-pcid,-x2apic"


def run_on_avx2(arguments: Sequence[str]) -> str:
    """Run `python *arguments` there; return what it printed.

    Skips the test where neither this CPU is one nor QEMU's user emulation is installed.
    """
    lacks_vnni = why_no_vnni() is not None and not hidden_features()
    emulator = shutil.which("qemu-x86_64")
    if lacks_vnni and "avx2" in cpu_features():
        command = [sys.executable]
    elif emulator is not None:
        command = [emulator, "-cpu", _EMULATED, sys.executable]
    else:
        pytest.skip("this CPU is not one with AVX2 only, nor is qemu-x86_64 (qemu-user) installed")
    environment = {**os.environ, "EDJE_CPU_FEATURES": FEATURES, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
