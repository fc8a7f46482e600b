"""Features from .npy, folders and safetensors go through the adapter; bad ones give a reason."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from edje.engines.image import FeatureEncoder
from edje.errors import EngineError, RequestError
from edje.runtime.indexing.index import IndexReport, index_features
from edje.runtime.store import TokenStore
from mean_bundle import FEATURE_DIM, HIDDEN, NUM_TOKENS, make_bundle, scale_of

NUM_PATCHES = 7


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> FeatureEncoder:
    """A tiny adapter: tokens are mean features times constants."""
    return FeatureEncoder.open(make_bundle(tmp_path_factory.mktemp("encoder") / "bundle"))


@pytest.fixture
def features() -> np.ndarray:
    """Float32 [10, N, D]."""
    values = np.random.default_rng(0).standard_normal((10, NUM_PATCHES, FEATURE_DIM))
    return values.astype(np.float32)


IDS = [f"image-{number}" for number in range(10)]


def expect(store: Path, ids: list[str], features: np.ndarray) -> None:
    with TokenStore.open(store) as opened:
        assert opened.ids() == ids
        out = np.empty((len(ids), NUM_TOKENS, HIDDEN), np.float16)
        opened.read(opened.rows(ids), out)
    expected = features.astype(np.float32).mean(axis=1) @ scale_of(FEATURE_DIM)
    np.testing.assert_allclose(out.reshape(len(ids), -1), expected, rtol=2e-3, atol=2e-3)


def reasons(report: IndexReport) -> dict[str, str]:
    return {entry.id: entry.reason for entry in report.skipped}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_one_npy_with_a_list_of_ids(
    tmp_path: Path, encoder: FeatureEncoder, features: np.ndarray, dtype: type
) -> None:
    np.save(tmp_path / "f.npy", features.astype(dtype))
    (tmp_path / "ids.txt").write_text("\n".join(IDS))
    calls: list[tuple[int, int]] = []
    report = index_features(
        encoder,
        tmp_path / "f.npy",
        tmp_path / "s",
        batch_size=4,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert (report.indexed, report.num_skipped) == (10, 0)
    assert calls == [(0, 10), (4, 10), (8, 10), (10, 10)]
    expect(tmp_path / "s", IDS, features.astype(dtype))
    (tmp_path / "named.txt").write_text("\n".join(IDS[:9]))
    with pytest.raises(RequestError, match="got 9 ids for 10 images"):
        index_features(encoder, tmp_path / "f.npy", tmp_path / "t", ids=tmp_path / "named.txt")
    (tmp_path / "named.txt").write_text("\n".join([*IDS[:9], IDS[0]]))
    with pytest.raises(RequestError, match="1 ids come twice: 'image-0'"):
        index_features(encoder, tmp_path / "f.npy", tmp_path / "t", ids=tmp_path / "named.txt")
    assert not (tmp_path / "t").exists()


def test_a_folder_of_npy_files_and_of_shards(
    tmp_path: Path, encoder: FeatureEncoder, features: np.ndarray
) -> None:
    folder = tmp_path / "features"
    (folder / "deep").mkdir(parents=True)
    names = ["a.v2", "b", "deep/c"]
    for name, values in zip(names, features, strict=False):
        np.save(folder / f"{name}.npy", values)
    save_file({"s2": features[4], "s1": features[3]}, folder / "one.safetensors")
    save_file({"s3": features[5]}, folder / "two.safetensors")
    index_features(encoder, folder, tmp_path / "s")
    expect(tmp_path / "s", [*names, "s1", "s2", "s3"], features[:6])
    again = index_features(encoder, folder, tmp_path / "s")
    assert (again.indexed, again.already_present) == (0, 6)
    save_file({"b": features[5]}, folder / "two.safetensors")
    with pytest.raises(RequestError, match="1 ids come twice: 'b'"):
        index_features(encoder, folder, tmp_path / "s")


def test_features_that_cannot_be_used_are_skipped_with_the_reason(
    tmp_path: Path, encoder: FeatureEncoder, features: np.ndarray
) -> None:
    features[1, 2, 3] = np.nan
    features[2] = np.inf
    features[3] = 60_000  # finite tokens would not fit float16
    wrong = {
        "ints": np.zeros((NUM_PATCHES, FEATURE_DIM), np.int64),
        "narrow": np.zeros((NUM_PATCHES, FEATURE_DIM - 1), np.float32),
        "none": np.zeros((0, FEATURE_DIM), np.float32),
    }
    folder = tmp_path / "features"
    folder.mkdir()
    for name, values in {**dict(zip(IDS, features, strict=True)), **wrong}.items():
        np.save(folder / f"{name}.npy", values)
    (folder / "cut.npy").write_bytes((folder / "image-0.npy").read_bytes()[:200])
    np.save(folder / "object.npy", np.array([{"a": 1}], object), allow_pickle=True)
    report = index_features(encoder, folder, tmp_path / "s")
    assert report.indexed == 7
    found = reasons(report)
    assert found.pop("cut").startswith("cannot be read: ")
    assert found.pop("object").startswith("cannot be read: Object arrays")
    expected = f"expected float16 or float32 [N, {FEATURE_DIM}]"
    assert found == {
        "image-1": "its features hold NaN or infinity",
        "image-2": "its features hold NaN or infinity",
        "image-3": "its tokens hold NaN or infinity",
        "ints": f"holds int64 [{NUM_PATCHES}, {FEATURE_DIM}], {expected}",
        "narrow": f"holds float32 [{NUM_PATCHES}, {FEATURE_DIM - 1}], {expected}",
        "none": f"holds float32 [0, {FEATURE_DIM}], {expected}",
    }


def test_images_with_other_numbers_of_patches_stand_in_one_source(
    tmp_path: Path, encoder: FeatureEncoder, features: np.ndarray
) -> None:
    cut = {name: features[n, : 3 + n % 2].copy() for n, name in enumerate(IDS)}
    save_file(cut, tmp_path / "f.safetensors")
    assert index_features(encoder, tmp_path / "f.safetensors", tmp_path / "s").indexed == 10
    with TokenStore.open(tmp_path / "s") as store:
        out = np.empty((10, NUM_TOKENS, HIDDEN), np.float16)
        store.read(store.rows(IDS), out)
    expected = np.stack([cut[name].mean(axis=0) @ scale_of(FEATURE_DIM) for name in IDS])
    np.testing.assert_allclose(out.reshape(10, -1), expected, rtol=2e-3, atol=2e-3)


def test_what_holds_no_features_is_an_error(
    tmp_path: Path, encoder: FeatureEncoder, features: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ids.txt").write_text("\n".join(IDS))
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "column.npy", np.asfortranarray(features))
    np.save(tmp_path / "flat.npy", features[:, 0])
    np.save(tmp_path / "whole.npy", features)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:1000])
    (tmp_path / "text.npy").write_text("no numbers")
    (tmp_path / "text.safetensors").write_text("no numbers")
    faults = {
        "empty": "holds no features",
        "missing.npy": "there is no",
        "ids.txt": "holds no features that can be read",
        "column.npy": "column by column",
        "flat.npy": r"got float32 \[10, 5\]",
        "cut.npy": "the file is cut off: 1,000 of 1,528 bytes",
        "text.npy": "is no .npy",
        "text.safetensors": r"is no \.safetensors",
    }
    for name, fault in faults.items():
        with pytest.raises(RequestError, match=fault):
            index_features(encoder, tmp_path / name, tmp_path / "s")
    with pytest.raises(RequestError, match="only a single"):
        index_features(encoder, tmp_path / "empty", tmp_path / "s", ids=tmp_path / "ids.txt")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(RequestError, match=r"edje-runtime\[index\]"):
        index_features(encoder, tmp_path / "text.safetensors", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_an_engine_folder_carries_no_adapter(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "adapter.onnx").unlink()
    with pytest.raises(EngineError, match=r"holds no adapter \(adapter\.onnx\)"):
        FeatureEncoder.open(bundle)


def test_a_real_adapter_gives_the_official_tokens(
    tmp_path: Path, tiny_bundle: Path, official_tiny: Path
) -> None:
    expected = np.load(official_tiny / "expected.npz")
    np.save(tmp_path / "f.npy", expected["vision_tokens"])
    ids = [f"{number:03}" for number in range(len(expected["vision_tokens"]))]
    (tmp_path / "ids.txt").write_text("\n".join(ids))
    index_features(FeatureEncoder.open(tiny_bundle), tmp_path / "f.npy", tmp_path / "s")
    out = np.empty_like(expected["compressed_tokens"], dtype=np.float16)
    with TokenStore.open(tmp_path / "s") as store:
        store.read(store.rows(store.ids()), out)
    difference = np.abs(out.astype(np.float32) - expected["compressed_tokens"])
    half = np.abs(expected["compressed_tokens"]) * 2.0**-10
    assert (difference <= 1e-4 + half).all()
