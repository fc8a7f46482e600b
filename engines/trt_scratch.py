"""Scratch memory for TensorRT contexts that bring none: those of captured forwards share it."""

from __future__ import annotations

from .cuda_memory import allocate, free

_LEAST_BYTES = 1 << 20


class Scratch:
    """Memory of the current GPU, by stream. It grows, but never moves: graphs hold its addresses.

    Contexts of one stream run one after the other, so they may write into the same memory.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, dict[int, int]] = {}  # stream -> bytes -> address

    def block(self, handle: int, num_bytes: int) -> tuple[int, int]:
        """Return address and size of at least `num_bytes` for contexts of the stream `handle`.

        Sizes are powers of two, so that what was outgrown is together smaller than the last.

        Raises:
            EngineError: the GPU's memory is full.
        """
        blocks = self._blocks.setdefault(handle, {})
        size = max(_LEAST_BYTES, 1 << max(num_bytes - 1, 0).bit_length())
        found = min((each for each in blocks if each >= size), default=None)
        if found is None:
            blocks[size] = allocate(size)
            found = size
        return blocks[found], found

    def close(self) -> None:
        """Free all of it; no graph over it is launched any more. May be called twice."""
        while self._blocks:
            _, blocks = self._blocks.popitem()
            for address in blocks.values():
                free(address)
