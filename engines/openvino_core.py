"""The one `openvino.Core` of this process, which takes no thread's signal stack with it.

OpenVINO's CPU plugin gives the thread that loads it another stack for signals (a C library older
than glibc 2.34 has none that holds AMX's registers), and frees that memory when the plugin goes.
A plugin goes with its `Core` and its last model: a thread that opened one model after another, or
that closes another thread's, was left with freed memory as its stack, and the next signal that it
took ended the process. So a process loads the plugin once, on a thread that ends, and keeps it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache

import openvino as ov

DEVICE = "CPU"


@cache
def openvino_core() -> ov.Core:
    """Return the process's core, its CPU plugin loaded where there is one."""
    with ThreadPoolExecutor(1, "edje-openvino") as loader:
        return loader.submit(_load).result()


def _load() -> ov.Core:
    core = ov.Core()
    with suppress(RuntimeError):  # no such plugin: who compiles for it is told
        core.get_versions(DEVICE)
    return core
