"""The libraries below send nothing home, unless the environment asks for it.

ONNX Runtime (from 1.29) and OpenVINO report their use to their makers and leave an id of the
machine in HOME, both as soon as they are imported. `edje/__init__.py` calls `switch_off`: that
runs before any module of this package, in every process, so none can import them first.
"""

from __future__ import annotations

import os
import sys

SWITCH = "EDJE_TELEMETRY"  # 1: leave the libraries as their makers ship them


def switch_off() -> None:
    """Turn the telemetry of ONNX Runtime and OpenVINO off, for this process and its children.

    A user's own value of ORT_DISABLE_TELEMETRY stays; with EDJE_TELEMETRY=1 nothing is changed.
    What was imported before this package has reported already.
    """
    if os.environ.get(SWITCH) == "1":
        return
    if not os.environ.get("ORT_DISABLE_TELEMETRY"):
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    # OpenVINO has no variable of its own. It reports through this package where it can import it;
    # None says that it cannot, and OpenVINO goes on without, as where it is not installed.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
