"""Run kernels on the CPU: Triton's in a process of their own that shares memory with the tests.

Triton reads `TRITON_INTERPRET` when it is imported, and whoever imports it in the tests' own
process would decide for all: so `interpreter()` starts a process that has it set. Arrays lie in an
arena that both have at the same addresses, and only a launch's numbers travel.

Those of CUDA C++ run in the tests' process, as `emulated_kernels` runs them.

A launch fails where an address points to no array, where a kernel wrote beside an array, or into
one that it does not say it writes.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import xxhash

import emulated_kernels
from edje.kernels.variant import Variant
from interpreted_numbers import repair_numbers
from launches import DESCRIPTOR, VARIANTS, TensorMap, bind, block_of, pointed
from shared_arena import Arena, Block, free_addresses, map_at

# One thread: sums come in the same order, and tiles are too small to share.
ENVIRONMENT = {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
NUMPY = {"i32": np.int32, "i64": np.int64, "fp32": np.float32}


class Interpreter:
    """Runs one launch at a time, in the order of the calls; any thread may call."""

    by_address = True

    def __init__(self) -> None:
        """Start the process, at the first place for the arena that both have free."""
        for address in free_addresses():
            try:
                self.arena = Arena(address)
            except OSError:
                continue
            if self._start():
                return
            self.close()
        raise MemoryError("no address is free in both processes")

    def close(self) -> None:
        """End the process; arrays stay as long as anybody has them."""
        self._pool.shutdown()
        self.arena.close()

    def memory(self, num_elements: int, dtype: Any, name: str = "an array") -> np.ndarray:
        """Return new memory that kernels reach, its values undefined."""
        return self.arena.array(num_elements, dtype, name)

    def copy_of(self, array: np.ndarray, name: str = "an array") -> np.ndarray:
        """Return a copy that kernels reach."""
        held = self.memory(array.size, array.dtype, name).reshape(array.shape)
        held[...] = array
        return held

    def launch(
        self,
        kernel: str | Variant,
        grid: tuple[int, ...],
        arguments: Sequence[np.generic],
        **constants: int,
    ) -> None:
        """Run a kernel; returns when it has run.

        Args:
            kernel: a variant, or the name of one.
            grid: programs in x, or in x, y, z.
            arguments: what a real launch passes: addresses, numbers, maps of pretended devices.
            constants: those that shall differ from the variant's.
        """
        variant = kernel if isinstance(kernel, Variant) else VARIANTS[kernel]
        self._run(variant, grid, bind(variant, arguments), constants)

    def work(
        self, name: str, grid: tuple[int, ...], arguments: Sequence[np.generic]
    ) -> Callable[[], None]:
        """Return what runs a launch."""
        return partial(self.launch, name, grid, arguments)

    def run(
        self, kernel: str | Variant, num_programs: int, values: Mapping[str, Any], **constants: int
    ) -> dict[str, np.ndarray]:
        """Run a kernel on copies of arrays and return these by name, as the kernel left them.

        Args:
            kernel, constants: as `launch` takes them.
            values: every parameter by name: arrays (bfloat16 as uint16; 2-D for descriptors) and
                numbers.
        """
        variant = kernel if isinstance(kernel, Variant) else VARIANTS[kernel]
        types = {parameter.name: parameter.type for parameter in variant.parameters}
        assert values.keys() == types.keys(), f"{variant.name} takes {list(types)}"
        arrays = {
            name: self.copy_of(value, name)
            for name, value in values.items()
            if isinstance(value, np.ndarray)
        }
        passed = {name: _pointer(types[name], array) for name, array in arrays.items()}
        self._run(variant, (num_programs,), {**values, **passed}, constants)
        return arrays

    def _run(
        self, variant: Variant, grid: tuple[int, ...], values: Mapping[str, Any], constants: Any
    ) -> None:
        read = self._only_read(variant, values)
        before = list(map(_hash, read))
        try:
            if variant.name in emulated_kernels.NAMES:
                emulated_kernels.run(variant, grid, values)
            else:
                self._pool.submit(_interpret, variant, grid, values, constants).result()
        except BrokenProcessPool:
            assert self._start(), "the interpreter cannot be started again"
            raise AssertionError(f"{variant.name} touched memory that is nobody's") from None
        damaged = self.arena.written_beside()
        assert not damaged, f"{variant.name} wrote beside {', '.join(damaged)}"
        changed = [
            block.name for block, old in zip(read, before, strict=True) if _hash(block) != old
        ]
        assert not changed, f"{variant.name} wrote to {', '.join(changed)}, which it only reads"

    def _only_read(self, variant: Variant, values: Mapping[str, Any]) -> list[Block]:
        """Return the arrays that the kernel says it leaves as they are."""
        read, written = set(), set()
        for parameter, address in pointed(variant, values):
            block = self.arena.block_at(address)
            told = f"{variant.name}: {parameter.name} points to no array: {address:#x}"
            assert block is not None, told
            (written if parameter.written else read).add(block)
        return list(read - written)

    def _start(self) -> bool:
        """Start the process with the interpreter on; return whether the arena has a place there."""
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        with pytest.MonkeyPatch.context() as patch:
            for name, value in ENVIRONMENT.items():
                patch.setenv(name, value)
            return self._pool.submit(_attach, self.arena.path, self.arena.address).result()


@contextmanager
def interpreter() -> Iterator[Interpreter]:
    """Yield what runs kernels; Linux only."""
    started = Interpreter()
    try:
        yield started
    finally:
        started.close()


def _hash(block: Block) -> bytes:
    return xxhash.xxh3_64_digest(block.content())


def _attach(path: str, address: int) -> bool:
    """Map the arena into this process; return whether its place is free."""
    file = os.open(path, os.O_RDWR)
    try:
        map_at(file, address)
    except OSError:
        return False
    finally:
        os.close(file)
    _patch_the_language_once()
    repair_numbers()
    return True


def _patch_the_language_once() -> None:
    """Let a kernel's calls of a function be plain ones, from the second on.

    Triton makes its language the interpreter's at every call: half a millisecond each, most of
    what small programs take. It is so by then, and stays so for the modules that calls change.
    """
    from triton.runtime.interpreter import InterpretedFunction

    first_call, called = InterpretedFunction.__call__, set()

    def call(function: Any, *arguments: Any, **named: Any) -> Any:
        if function in called:
            return function.rewrite()(*arguments, **named)
        called.add(function)
        return first_call(function, *arguments, **named)

    InterpretedFunction.__call__ = call


def _pointer(type_name: str, array: np.ndarray) -> int | TensorMap:
    """Return what a launch says of an array."""
    address = array.ctypes.data
    if not type_name.startswith(DESCRIPTOR):
        return address
    rows, columns = array.shape
    size = array.itemsize
    return TensorMap(address, (rows, columns), (columns, 1), block_of(type_name), size, 0, 0)


def _interpret(
    variant: Variant, grid: tuple[int, ...], values: Mapping[str, Any], constants: Any
) -> None:
    """Run one launch in the other process."""
    function = getattr(_module(variant.source), variant.function)
    types = {parameter.name: parameter.type for parameter in variant.parameters}
    given = {name: _value(types[name], value) for name, value in values.items()}
    # NumPy warns of lanes that are masked out (0 / 0, inf - inf): no faults of the kernel.
    with np.errstate(all="ignore"):
        function[grid](**{**variant.constants, **given, **constants})


def _module(source: str) -> ModuleType:
    """Import a source of the package, or of the tests' own."""
    ours = f"edje.kernels.{source}"
    return import_module(source if find_spec(ours) is None else ours)


def _value(type_name: str, value: Any) -> Any:
    """Return an argument as the interpreter has it, of the type that the kernel is compiled for."""
    from triton import language as tl

    if not isinstance(value, TensorMap):
        return _scalar(type_name, value)
    from triton.runtime.interpreter import interpreter_semantic

    element = type_name.removeprefix(DESCRIPTOR).partition("[")[0]
    return interpreter_semantic.make_tensor_descriptor(
        _scalar(f"*{element}", value.address),
        [_scalar("i32", size) for size in value.shape],
        [_scalar("i64", value.strides[0]), tl.constexpr(1)],
        [tl.constexpr(size) for size in value.block],
    )


def _scalar(type_name: str, value: float) -> Any:
    from triton import language as tl
    from triton.runtime.interpreter import TensorHandle

    kind = tl.str_to_ty(type_name, None)
    return tl.tensor(TensorHandle(np.array([value], NUMPY.get(type_name, np.uint64)), kind), kind)
