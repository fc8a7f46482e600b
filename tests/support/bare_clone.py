"""Run the package from a bare clone: found by its folder, unknown to `importlib.metadata`."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_bare(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run Python with every installed package but this one, which `folder` links to instead."""
    libraries = folder / "libraries"
    libraries.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(place).iterdir():
            if not path.name.startswith(("edje_runtime", "__editable__")):
                (libraries / path.name).symlink_to(path)
    (folder / "link").mkdir()
    (folder / "link" / "edje").symlink_to(ROOT)
    env = {**os.environ, "PYTHONPATH": f"{folder / 'link'}{os.pathsep}{libraries}"}
    command = [sys.executable, "-S", *args]  # -S: no .pth file brings the package back
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
