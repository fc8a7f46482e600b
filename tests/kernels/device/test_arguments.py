"""Arguments lie where the driver looks for them, of their sizes and on their boundaries."""

from __future__ import annotations

import ctypes

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edje.kernels.device.arguments import ArgumentBlock

BYTES = st.binary(min_size=128, max_size=128)
SCALARS = st.one_of(
    BYTES.map(np.void),
    st.integers(0, 2**64 - 1).map(np.uint64),
    st.integers(-(2**31), 2**31 - 1).map(np.int32),
    st.floats(width=32, allow_nan=False).map(np.float32),
)


@given(st.lists(SCALARS, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_every_value_is_read_back_at_its_address(arguments, random):
    block = ArgumentBlock([argument.dtype for argument in arguments])
    for _ in range(2):  # the second time over the first
        random.shuffle(same := [each for each in arguments if each.dtype == arguments[0].dtype])
        given = iter(same)
        passed = [next(given) if each.dtype == arguments[0].dtype else each for each in arguments]
        block.write(passed)
        addresses = (ctypes.c_uint64 * len(passed)).from_address(block.address)
        for argument, address in zip(passed, addresses, strict=True):
            assert ctypes.string_at(address, argument.nbytes) == argument.tobytes()
            assert address % (64 if isinstance(argument, np.void) else argument.nbytes) == 0
