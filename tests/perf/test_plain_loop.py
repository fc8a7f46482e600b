"""The plain loop that the store is compared with verifies as the store does."""

from pathlib import Path

import numpy as np
import pytest

from edje.errors import EdjeError
from edje.perf.plain_loop import PlainLoop
from edje.runtime.store import TokenStore


def test_a_plain_loop_finds_a_wrong_record(tmp_path: Path) -> None:
    sizes = {"num_tokens": 2, "hidden": 8, "fingerprint_encoder": "bench"}
    with TokenStore.create(tmp_path / "s", **sizes) as store:
        store.append(["a", "b", "c"], np.ones((3, 2, 8), np.float16))
    with TokenStore.open(tmp_path / "s") as store:
        loop, out = PlainLoop(store), np.empty((2, 2, 8), np.float16)
        loop.read(np.array([2, 0]), out)
        [file] = (tmp_path / "s/segments").iterdir()
        content = bytearray(file.read_bytes())
        content[store.layout.offset(2)] ^= 1
        file.write_bytes(content)
        with pytest.raises(EdjeError, match="record 2 is not whole"):
            loop.read(np.array([2, 0]), out)
