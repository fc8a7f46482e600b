"""Run Triton kernels on the CPU, in a process of their own.

Triton reads `TRITON_INTERPRET` when it is imported, and whoever imports it in the tests' own
process would decide for all: so `interpreter()` starts a process that has it set.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np

from edje.kernels.variants import all_variants

VARIANTS = {variant.name: variant for variant in all_variants()}
Run = Callable[[str, int, Mapping[str, Any]], dict[str, np.ndarray]]


@contextmanager
def interpreter() -> Iterator[Run]:
    """Yield `run(variant's name, number of programs, arguments)`, which returns the arrays."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(os.getpid).result()  # the process starts with the first work
            yield lambda *arguments: pool.submit(_run, *arguments).result()
    finally:
        os.environ.pop("TRITON_INTERPRET")
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def _run(name: str, num_programs: int, arguments: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Run one launch; bfloat16 arrays travel as uint16 under the parameter's own type."""
    import torch

    variant = VARIANTS[name]
    types = {parameter.name: parameter.type for parameter in variant.parameters}
    tensors = {
        key: torch.from_numpy(value).view(torch.bfloat16)
        if types[key] == "*bf16"
        else torch.from_numpy(value)
        for key, value in arguments.items()
        if isinstance(value, np.ndarray)
    }
    assert dict(arguments).keys() == types.keys(), f"{name} takes {list(types)}"
    function = getattr(import_module(f"edje.kernels.{variant.source}"), variant.function)
    # Warnings of NumPy that only masked-out lanes cause (inf - inf) are no faults.
    with np.errstate(all="ignore"):
        function[(num_programs,)](**{**arguments, **tensors, **variant.constants})
    return {key: arguments[key] for key in tensors}
