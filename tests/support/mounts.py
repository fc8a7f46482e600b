"""Code under test in a mount namespace of its own, where it may mount what it likes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest


@cache
def _why_no_mounts() -> str | None:
    """Return why this process cannot mount, None where it can."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return "there is no unshare (util-linux)"
    with tempfile.TemporaryDirectory() as folder:
        command = [*_namespace(), "mount", "-t", "tmpfs", "none", folder]
        ran = subprocess.run(command, capture_output=True, text=True)
    return None if ran.returncode == 0 else f"this process may not mount: {ran.stderr.strip()}"


def _namespace() -> list[str]:
    return ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]


def run_with_mounts(mounts: str, code: str, folder: Path) -> str:
    """Run shell lines that mount below `folder`, then Python code there; return its stdout.

    Skips the test, with the reason, where the system lets nobody mount.
    """
    why = _why_no_mounts()
    if why is not None:
        pytest.skip(why)
    script = f'set -e; cd "$0"; {mounts}\nexec "$1" -c "$2"'
    command = [*_namespace(), "sh", "-c", script, str(folder), sys.executable, code]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
