"""What the GPU at hand can do at best: copies, a large matrix product, and the model's own four.

Measured with PyTorch, or with CuPy where that is all there is (copies and fp16 products only).
Values are random: zeros run faster than any real data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ..errors import EdjeError
from .gpu_steps import Report
from .random_model import HIDDEN, INTERMEDIATE

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
        EdjeError: neither PyTorch with CUDA nor CuPy is here.
    """
    library = _library()
    report.put(library=type(library).__name__.removeprefix("_"))
    for probe in library.probes():
        if report.left_s <= 0:
            report.put(left_out="the time was up")
            return
        report.add("ceilings", measure_probe(library, probe))


def measure_probe(library: _Library, probe: Probe) -> dict[str, Any]:
    """Return a row of `ceilings`: the rate, or in `fault` what the probe raised."""
    row = {"name": probe.name, "key": probe.key, "unit": f"{probe.unit}/s"}
    try:
        seconds = library.least_seconds(probe.make())
    except Exception as error:  # one library or type less is a row, whatever it raises
        return {**row, "per_s": None, "fault": f"{type(error).__name__}: {error}"[:300]}
    return {**row, "per_s": probe.amount / seconds, "fault": None}


class _Library(ABC):
    """Times runs on the GPU by events; subclasses know how to allocate and multiply."""

    @abstractmethod
    def probes(self) -> Iterator[Probe]:
        """Yield everything to measure, the ceilings that others are shares of first."""

    @abstractmethod
    def timed(self, run: Run, times: int) -> float:
        """Return the seconds of `times` runs on the GPU."""

    def least_seconds(self, run: Run) -> float:
        """Return the least time of one run, warmed up."""
        one = self.timed(run, NUM_WARM) / NUM_WARM
        times = max(1, min(1000, round(ROUND_S / max(one, 1e-7))))
        return min(self.timed(run, times) for _ in range(NUM_ROUNDS)) / times


class _PyTorch(_Library):
    def __init__(self) -> None:
        self.torch: Any = import_module("torch")

    def probes(self) -> Iterator[Probe]:
        yield Probe("h2d", "h2d", "byte", H2D_BYTES, lambda: self._copy(True, False))
        yield Probe("d2h", None, "byte", H2D_BYTES, lambda: self._copy(False, True))
        yield Probe("memory", "memory", "byte", 2 * COPY_BYTES, lambda: self._copy(False, False))
        for precision in PRECISIONS:
            yield self._product("large", precision, precision, LARGE, LARGE, LARGE)
        for num_pairs in PAIRS:
            for precision in PRECISIONS:
                for name, k, n in SHAPES:
                    yield self._product(name, precision, None, num_pairs * SLOTS, k, n)

    def timed(self, run: Run, times: int) -> float:
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def _copy(self, from_host: bool, to_host: bool) -> Run:
        """Return a copy; bytes are random, the host's pinned."""
        torch = self.torch
        num_bytes = H2D_BYTES if from_host or to_host else COPY_BYTES
        source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        if from_host:
            source = source.cpu().pin_memory()
        if to_host:
            target = target.cpu().pin_memory()
        return lambda: target.copy_(source, non_blocking=True)

    def _product(self, name: str, precision: str, key: str | None, m: int, k: int, n: int) -> Probe:
        def make() -> Run:
            run: Run = getattr(self, f"_{precision}")(m, k, n)
            return run

        return Probe(f"{precision} {name} {m} x {k} x {n}", key, "flop", 2 * m * k * n, make)

    def _fp16(self, m: int, k: int, n: int) -> Run:
        a, b = self._normal(m, k).half(), self._normal(n, k).half().t()
        out = self.torch.empty(m, n, dtype=self.torch.float16, device="cuda")
        return lambda: self.torch.mm(a, b, out=out)

    def _int8(self, m: int, k: int, n: int) -> Run:
        torch = self.torch
        a, b = (
            torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")
            for shape in ((m, k), (n, k))
        )
        return lambda: torch._int_mm(a, b.t())

    def _fp8(self, m: int, k: int, n: int) -> Run:
        torch = self.torch
        a, b = (self._normal(*shape).to(torch.float8_e4m3fn) for shape in ((m, k), (n, k)))
        one = torch.ones((), device="cuda")
        return lambda: torch._scaled_mm(
            a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def _normal(self, rows: int, columns: int) -> Any:
        return self.torch.randn(rows, columns, device="cuda")


class _CuPy(_Library):
    def __init__(self) -> None:
        self.cupy: Any = import_module("cupy")

    def probes(self) -> Iterator[Probe]:
        yield Probe("h2d", "h2d", "byte", H2D_BYTES, self._from_host)
        yield Probe("memory", "memory", "byte", 2 * COPY_BYTES, self._on_device)
        yield self._probe("large", "fp16", LARGE, LARGE, LARGE)
        for num_pairs in PAIRS:
            for name, k, n in SHAPES:
                yield self._probe(name, None, num_pairs * SLOTS, k, n)

    def _probe(self, name: str, key: str | None, m: int, k: int, n: int) -> Probe:
        def make() -> Run:
            return self._product(m, k, n)

        return Probe(f"fp16 {name} {m} x {k} x {n}", key, "flop", 2 * m * k * n, make)

    def timed(self, run: Run, times: int) -> float:
        begin, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        begin.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return float(self.cupy.cuda.get_elapsed_time(begin, end)) / 1e3

    def _from_host(self) -> Run:
        import numpy as np

        pinned = self.cupy.cuda.alloc_pinned_memory(H2D_BYTES)
        source = np.frombuffer(pinned, np.uint8, H2D_BYTES)
        source[:] = np.random.default_rng(0).integers(0, 255, H2D_BYTES, np.uint8)
        target = self.cupy.empty(H2D_BYTES, "uint8")
        return lambda: target.set(source, stream=self.cupy.cuda.get_current_stream())

    def _on_device(self) -> Run:
        source = self.cupy.random.randint(0, 255, COPY_BYTES // 4, dtype="int32")
        target = self.cupy.empty_like(source)
        return lambda: self.cupy.copyto(target, source)

    def _product(self, m: int, k: int, n: int) -> Run:
        normal = self.cupy.random.standard_normal
        a, b = (normal(shape, dtype="float32").astype("float16") for shape in ((m, k), (k, n)))
        out = self.cupy.empty((m, n), "float16")
        return lambda: self.cupy.matmul(a, b, out=out)


def _library() -> _Library:
    reasons = []
    try:
        import torch

        if torch.cuda.is_available():
            return _PyTorch()
        reasons.append(f"PyTorch {torch.__version__} sees no GPU")
    except ImportError as error:
        reasons.append(str(error))
    try:
        return _CuPy()
    except ImportError as error:
        reasons.append(str(error))
    raise EdjeError(
        "no library here can measure the ceilings",
        faults=reasons,
        hint="pip install torch (its CUDA build) or cupy",
    )
