"""What the GPU at hand can do at best, and how many pairs/s that allows.

Measured with PyTorch: copies, a large matrix product, and the model's own four. Values are random:
zeros run faster than any real data. What a pair costs is pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..bundle import ModelSizes
from ..errors import EdjeError
from .gpu_steps import Report
from .random_model import HIDDEN, INTERMEDIATE

FLOAT16_BYTES = 2
LARGE = 8192
COPY_BYTES = 1 << 30
H2D_BYTES = 1 << 28
SLOTS = 79  # of a query of 12 wordpieces
PAIRS = (64, 256, 1024)
# Name, K and N of the matrix products of a layer.
SHAPES = (
    ("qkv", HIDDEN, 3 * HIDDEN),
    ("attention output", HIDDEN, HIDDEN),
    ("ffn1", HIDDEN, INTERMEDIATE),
    ("ffn2", INTERMEDIATE, HIDDEN),
)
PRECISIONS = ("fp16", "int8", "fp8")
NUM_WARM, NUM_ROUNDS = 3, 5
ROUND_S = 0.02  # long enough for the clock's resolution, short enough for a hundred of them

Run = Callable[[], object]


def slots_of(num_wordpieces: int, sizes: ModelSizes) -> int:
    """Return the slots of a sequence: CLS, wordpieces, SEP, visual tokens, SEP."""
    return num_wordpieces + 3 + sizes.num_tokens


def flops_per_pair(slots: int, sizes: ModelSizes, *, cls_only: bool = True) -> int:
    """Return the floating-point operations of one forward: matrix products and attention.

    Args:
        cls_only: the last layer computes the CLS row only, beside all keys and values, as our
            graph does; False: every row, as the official code does (less its vocabulary head).
    """
    d, f = sizes.hidden, sizes.intermediate
    layer = slots * 2 * (4 * d * d + 2 * d * f) + 4 * slots * slots * d
    last = slots * 2 * 2 * d * d + 2 * (2 * d * d + 2 * d * f) + 4 * slots * d
    return sizes.num_layers * layer if not cls_only else (sizes.num_layers - 1) * layer + last


def activation_bytes_per_pair(slots: int, sizes: ModelSizes) -> int:
    """Return the bytes that a chain of fused kernels moves through device memory, float16.

    Five kernels a layer (QKV; attention; output with residual and norm; FFN1 with activation;
    FFN2 with residual and norm), each reading its inputs and writing its output once.
    """
    d, f = sizes.hidden, sizes.intermediate
    per_slot = (d + 3 * d) + (3 * d + d) + (2 * d + d) + (d + f) + (f + d + d)
    return sizes.num_layers * slots * per_slot * FLOAT16_BYTES


def token_bytes_per_pair(sizes: ModelSizes) -> int:
    """Return the bytes of one image's visual tokens, float16."""
    return sizes.num_tokens * sizes.hidden * FLOAT16_BYTES


def roofs(slots: int, sizes: ModelSizes, ceilings: Mapping[str, float]) -> dict[str, float]:
    """Return pairs/s that each measured ceiling allows, by the ceiling's name.

    Args:
        ceilings: of `fp16`, `int8`, `fp8` (operations/s of a large matrix product), `memory`
            (bytes/s of a device-to-device copy, read and written) and `h2d` (bytes/s) those
            that were measured.
    """
    work: dict[str, int] = {
        **dict.fromkeys(PRECISIONS, flops_per_pair(slots, sizes)),
        "memory": activation_bytes_per_pair(slots, sizes),
        "h2d": token_bytes_per_pair(sizes),
    }
    return {name: ceilings[name] / amount for name, amount in work.items() if name in ceilings}


@dataclass(frozen=True, slots=True)
class Probe:
    """One thing to measure.

    Attributes:
        name: `h2d`, `memory`, or a precision with its product: `fp16 8192 x 8192 x 8192`.
        key: the ceiling it sets; None for what only informs.
        unit: `byte` or `flop`, of `amount`.
        amount: of them in one run.
        make: allocates and returns the run; fails where the machine cannot.
    """

    name: str
    key: str | None
    unit: str
    amount: int
    make: Callable[[], Run]


def measure_ceilings(report: Report) -> None:
    """Report a row of `ceilings` for every probe; what fails has its reason in `fault`.

    Raises:
        EdjeError: PyTorch is not here, or sees no GPU.
    """
    try:
        import torch
    except ImportError as error:
        raise EdjeError("PyTorch measures the ceilings", faults=[str(error)]) from error
    if not torch.cuda.is_available():
        raise EdjeError(f"PyTorch {torch.__version__} sees no GPU", hint="install its CUDA build")
    report.put(library="PyTorch")
    for probe in probes(torch):
        if report.left_s <= 0:
            report.put(left_out="the time was up")
            return
        report.add("ceilings", measure_probe(probe, partial(timed, torch)))


def measure_probe(probe: Probe, timed: Callable[[Run, int], float]) -> dict[str, Any]:
    """Return a row of `ceilings`: the best rate of a few rounds, or in `fault` what was raised.

    Args:
        timed: returns the seconds of so many runs.
    """
    row = {"name": probe.name, "key": probe.key, "unit": f"{probe.unit}/s"}
    try:
        run = probe.make()
        one = timed(run, NUM_WARM) / NUM_WARM
        times = max(1, min(1000, round(ROUND_S / max(one, 1e-7))))
        seconds = min(timed(run, times) for _ in range(NUM_ROUNDS)) / times
    except Exception as error:  # one type less is a row, whatever it raises
        return {**row, "per_s": None, "fault": f"{type(error).__name__}: {error}"[:300]}
    return {**row, "per_s": probe.amount / seconds, "fault": None}


def timed(torch: Any, run: Run, times: int) -> float:
    """Return the seconds of `times` runs on the GPU, by its events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def probes(torch: Any) -> Iterator[Probe]:
    """Yield everything to measure, the ceilings that others are shares of first."""
    copy = partial(_copy, torch)
    yield Probe("h2d", "h2d", "byte", H2D_BYTES, partial(copy, H2D_BYTES, from_host=True))
    yield Probe("d2h", None, "byte", H2D_BYTES, partial(copy, H2D_BYTES, to_host=True))
    yield Probe("memory", "memory", "byte", 2 * COPY_BYTES, partial(copy, COPY_BYTES))
    large = [("large", precision, precision, LARGE, LARGE, LARGE) for precision in PRECISIONS]
    small = [
        (name, precision, None, num_pairs * SLOTS, k, n)
        for num_pairs in PAIRS
        for precision in PRECISIONS
        for name, k, n in SHAPES
    ]
    for name, precision, key, m, k, n in [*large, *small]:
        make = partial(_PRODUCTS[precision], torch, m, k, n)
        yield Probe(f"{precision} {name} {m} x {k} x {n}", key, "flop", 2 * m * k * n, make)


def _copy(torch: Any, num_bytes: int, *, from_host: bool = False, to_host: bool = False) -> Run:
    """Return a copy; bytes are random, the host's pinned."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    if from_host:
        source = source.cpu().pin_memory()
    if to_host:
        target = target.cpu().pin_memory()
    return lambda: target.copy_(source, non_blocking=True)


def _fp16(torch: Any, m: int, k: int, n: int) -> Run:
    a, b = (torch.randn(*shape, device="cuda").half() for shape in ((m, k), (n, k)))
    out = torch.empty(m, n, dtype=torch.float16, device="cuda")
    return lambda: torch.mm(a, b.t(), out=out)


def _int8(torch: Any, m: int, k: int, n: int) -> Run:
    a, b = (
        torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")
        for shape in ((m, k), (n, k))
    )
    return lambda: torch._int_mm(a, b.t())


def _fp8(torch: Any, m: int, k: int, n: int) -> Run:
    a, b = (
        torch.randn(*shape, device="cuda").to(torch.float8_e4m3fn) for shape in ((m, k), (n, k))
    )
    one = torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(
        a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


_PRODUCTS = {"fp16": _fp16, "int8": _int8, "fp8": _fp8}
