"""Resident tokens through the GPU devices: pretended ones, and the real one where a GPU is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from copying_engine import CopyingEngine
from edje.engines.contract import Engine
from edje.engines.manifest import EngineManifest
from edje.kernels.device.contract import DeviceUsage
from edje.kernels.device.cuda_core import CudaCoreDevice
from edje.kernels.device.pycuda import PycudaDevice
from edje.runtime.opening import RunOptions
from edje.runtime.reranker import Reranker
from edje.runtime.residency import ResidencyOptions
from edje.runtime.store import TokenStore
from on_addresses import OnAddresses
from pretended_gpu import pretend_gpu
from toy_engine import FINGERPRINT, HIDDEN, NUM_TOKENS, toy_manifest, toy_tokenizer

DEVICES = {"cuda_core": CudaCoreDevice, "pycuda": PycudaDevice}
IDS = [f"img-{number}" for number in range(50)]
# Of 64 to 113 no two make the same bits, and none a NaN.
VALUES = np.arange(64, 64 + len(IDS)).astype(np.float16)
RECORD_BYTES = NUM_TOKENS * HIDDEN * 2


def bits_of(records: np.ndarray) -> np.ndarray:
    first = np.ascontiguousarray(records).reshape(len(records), -1).view(np.uint8)[:, :4]
    return np.ascontiguousarray(first).view(np.float32)[:, 0]


@pytest.fixture(params=["float16", "int8"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[TokenStore]:
    sizes = {"num_tokens": NUM_TOKENS, "hidden": HIDDEN, "fingerprint_encoder": FINGERPRINT}
    tokens = np.broadcast_to(VALUES[:, None, None], (len(IDS), NUM_TOKENS, HIDDEN))
    with TokenStore.create(tmp_path / "store", dtype=request.param, **sizes) as made:
        if request.param == "int8":
            scales = np.ones((len(IDS), NUM_TOKENS), np.float16)
            made.append(IDS, tokens.astype(np.int8), scales)
        else:
            made.append(IDS, tokens.copy())
    with TokenStore.open(tmp_path / "store") as opened:
        yield opened


def check(
    device: Any, engine: Callable[[EngineManifest], Engine], store: TokenStore, tmp_path: Path
) -> None:
    """Rank mixed batches for every policy; each image must get the score of its own bytes."""
    dtype = store.layout.dtype
    manifest = replace(toy_manifest(), token_dtype=dtype, device={"kind": "cuda"})
    expected = bits_of(np.broadcast_to(VALUES[:, None], (len(IDS), 8)).astype(dtype))
    score_of = dict(zip(IDS, expected.tolist(), strict=True))
    random = np.random.default_rng(0)
    wishes = [
        ResidencyOptions("disk"),
        ResidencyOptions("device"),
        ResidencyOptions("device", max_bytes=20 * RECORD_BYTES),
        ResidencyOptions("device", ids=IDS[10:25]),
        ResidencyOptions("auto"),
    ]
    for wish in wishes:
        runs = RunOptions(device=device, residency=wish)
        with Reranker(engine(manifest), toy_tokenizer(tmp_path), store, runs=runs) as reranker:
            reranker.warm_up()
            made = device.usage()
            for size in (8, 30, 50, 8, 30, 50):
                asked = [IDS[at] for at in random.permutation(len(IDS))[:size]]
                found = {hit.id: hit.score for hit in reranker.rank("red", asked)}
                assert found == {name: score_of[name] for name in asked}
            assert replace(device.usage(), num_graphs=0) == replace(made, num_graphs=0)


@pytest.mark.parametrize("kind", DEVICES)
def test_pretended_gpus_rank_by_resident_tokens(kind, store, tmp_path, monkeypatch):
    machine = pretend_gpu(monkeypatch)
    with closing(DEVICES[kind]()) as device:
        engine = partial(OnAddresses, score=lambda batch: bits_of(batch.visual_tokens))
        check(device, engine, store, tmp_path)
        symbols = len(machine.named("launch"))
        assert symbols > 20, "the kernels were not launched"
    assert device.usage() == DeviceUsage()
    assert not any(machine.alive.get(kind) for kind in ("pinned", "device", "stream", "event"))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", DEVICES)
def test_a_real_gpu_ranks_by_resident_tokens(kind, store, tmp_path):
    pytest.importorskip({"cuda_core": "cuda.core", "pycuda": "pycuda"}[kind])
    with closing(DEVICES[kind]()) as device:
        check(device, CopyingEngine, store, tmp_path)
    assert device.usage() == DeviceUsage()  # what it made is freed
