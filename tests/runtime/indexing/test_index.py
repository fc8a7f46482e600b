"""Indexing: every readable image becomes one record, everything else a line with the reason."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edje.engines.image import ImageEncoder
from edje.errors import EdjeError, EngineError, RequestError, StoreError
from edje.runtime.indexing.index import index_images
from edje.runtime.indexing.sources import open_source
from edje.runtime.store import TokenStore
from mean_bundle import HIDDEN, NUM_TOKENS, SIZE, make_bundle, scale_of


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> ImageEncoder:
    """A tiny image encoder on this machine's preferred library."""
    return ImageEncoder.open(make_bundle(tmp_path_factory.mktemp("encoder") / "bundle"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of five one-coloured images, one of them two folders down."""
    folder = tmp_path / "photos"
    (folder / "deep/er").mkdir(parents=True)
    names = ["a.png", "b.jpg", "c.webp", "d.png", "deep/er/e.png"]
    for number, name in enumerate(names):
        Image.new("RGB", (20 + number, 9), (50 * number,) * 3).save(folder / name)
    return folder


def test_every_image_becomes_one_record(
    tmp_path: Path, photos: Path, encoder: ImageEncoder
) -> None:
    calls: list[tuple[int, int]] = []
    report = index_images(
        encoder,
        photos,
        tmp_path / "s",
        batch_size=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert (report.indexed, report.already_present, report.skipped) == (5, 0, ())
    assert report.images_per_s == pytest.approx(5 / report.seconds)
    assert report.encoder.startswith("openvino ")
    assert calls == [(0, 5), (2, 5), (4, 5), (5, 5)]
    with TokenStore.open(tmp_path / "s") as store:
        assert store.ids() == ["a.png", "b.jpg", "c.webp", "d.png", "deep/er/e.png"]
        assert store.fingerprint_encoder == "tower-1"
        out = np.empty((2, NUM_TOKENS, HIDDEN), np.float16)
        store.read(store.rows(["deep/er/e.png", "a.png"]), out)
    scale = scale_of(3).sum(axis=0)
    for row, colour in zip(out, (200, 0), strict=True):
        expected = (colour / 255 - 0.5) / 0.5 * scale
        np.testing.assert_allclose(row.ravel(), expected, rtol=2e-3)


def test_running_again_continues(tmp_path: Path, photos: Path, encoder: ImageEncoder) -> None:
    first = ["a.png\t" + str(photos / "a.png"), "d.png\t" + str(photos / "d.png")]
    (tmp_path / "first.tsv").write_text("\n".join(first))
    index_images(encoder, tmp_path / "first.tsv", tmp_path / "s")
    report = index_images(encoder, photos, tmp_path / "s")
    assert (report.indexed, report.already_present) == (3, 2)
    report = index_images(encoder, photos, tmp_path / "s")
    assert (report.indexed, report.already_present) == (0, 5)
    with TokenStore.open(tmp_path / "s") as store:
        assert sorted(store.ids()) == ["a.png", "b.jpg", "c.webp", "d.png", "deep/er/e.png"]


def test_an_interrupted_run_keeps_whole_batches(
    tmp_path: Path, photos: Path, encoder: ImageEncoder
) -> None:
    for number in range(20):
        shutil.copy(photos / "a.png", photos / f"more-{number:02}.png")

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_images(encoder, photos, tmp_path / "s", batch_size=2, progress=interrupt)
    with TokenStore.open(tmp_path / "s") as store:
        kept = store.ids()
    assert len(kept) in (2, 4, 6), "whole batches: two more may have been under way"
    assert kept == list(open_source(photos).ids())[: len(kept)]
    report = index_images(encoder, photos, tmp_path / "s", batch_size=2)
    assert (report.indexed, report.already_present) == (25 - len(kept), len(kept))


def test_what_is_no_image_is_skipped_with_the_reason(
    tmp_path: Path, photos: Path, encoder: ImageEncoder
) -> None:
    (photos / "notes.txt").write_text("no image")
    (photos / "cut.jpg").write_bytes((photos / "b.jpg").read_bytes()[:200])
    Path(os.fsdecode(bytes(photos) + b"/bad\xff.png")).write_bytes((photos / "a.png").read_bytes())
    report = index_images(encoder, photos, tmp_path / "s", batch_size=3)
    assert report.indexed == 5
    reasons = {entry.id: entry.reason for entry in report.skipped}
    assert sorted(reasons) == ["bad\\udcff.png", "cut.jpg", "notes.txt"]
    assert reasons["notes.txt"] == "not an image of a known format"
    assert "has no UTF-8 form" in reasons["bad\\udcff.png"]
    with TokenStore.open(tmp_path / "s") as store:
        assert len(store) == 5


def test_tokens_that_are_not_finite_are_skipped(
    tmp_path: Path, photos: Path, encoder: ImageEncoder
) -> None:
    def encode(pixels: np.ndarray) -> np.ndarray:
        tokens = np.ones((len(pixels), NUM_TOKENS, HIDDEN), np.float16)
        tokens[1, 2, 3] = np.nan
        return tokens

    broken = ImageEncoder(encoder.manifest, encoder.image, "broken", encode)
    report = index_images(broken, photos, tmp_path / "s", batch_size=5)
    assert report.skipped == (("b.jpg", "its tokens hold NaN or infinity", str(photos)),)
    assert report.indexed == 4


def test_a_list_file_names_its_own_ids(tmp_path: Path, photos: Path, encoder: ImageEncoder) -> None:
    (photos / "list.tsv").write_bytes(b"first\td.png\r\nno such\tmissing.png\n\nsecond id\ta.png\n")
    report = index_images(encoder, photos / "list.tsv", tmp_path / "s")
    assert report.indexed == 2
    assert report.skipped == (("no such", "no such file", str(photos / "list.tsv")),)
    with TokenStore.open(tmp_path / "s") as store:
        assert store.ids() == ["first", "second id"]


def test_an_empty_folder_becomes_the_store(
    tmp_path: Path, photos: Path, encoder: ImageEncoder
) -> None:
    (tmp_path / "volume").mkdir()
    assert index_images(encoder, photos, tmp_path / "volume").indexed == 5
    assert index_images(encoder, photos, tmp_path / "volume").already_present == 5


def test_a_folder_of_other_files_is_no_store_and_said_so(
    tmp_path: Path, photos: Path, encoder: ImageEncoder
) -> None:
    with pytest.raises(StoreError, match="there is no token store") as caught:
        index_images(encoder, photos, photos)
    assert "holds other files" in str(caught.value)
    assert "edje index" not in str(caught.value), "that is what the user does"
    index_images(encoder, photos, tmp_path / "s")
    (tmp_path / "s/store.json").unlink()
    with pytest.raises(StoreError, match="edje store verify --repair"):
        index_images(encoder, photos, tmp_path / "s")


def test_nothing_to_index_is_an_error(tmp_path: Path, encoder: ImageEncoder) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="holds no files"):
        index_images(encoder, tmp_path / "empty", tmp_path / "s")
    with pytest.raises(RequestError, match="there is no"):
        index_images(encoder, tmp_path / "missing", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_the_store_inside_the_folder_is_not_indexed(photos: Path, encoder: ImageEncoder) -> None:
    assert index_images(encoder, photos, photos / "deep/s").indexed == 5
    report = index_images(encoder, photos, photos / "deep/s")
    assert (report.already_present, report.skipped) == (5, ())


def test_a_store_of_another_encoder_is_refused_with_both_fingerprints(
    tmp_path: Path, photos: Path, encoder: ImageEncoder
) -> None:
    index_images(encoder, photos, tmp_path / "s")
    other = ImageEncoder.open(make_bundle(tmp_path / "other", fingerprint="tower-2"))
    with pytest.raises(StoreError, match="another image encoder") as caught:
        index_images(other, photos, tmp_path / "s")
    assert caught.value.faults == ("store: tower-1", "this encoder: tower-2")
    with TokenStore.open(tmp_path / "s", mode="a") as store:
        assert len(store) == 5, "the lock was released, the store is as it was"


def test_an_engine_folder_carries_the_manifest_in_engine_json(tmp_path: Path, photos: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    engine = tmp_path / "engine"
    engine.mkdir()
    shutil.copy(bundle / "image_encoder.onnx", engine)
    manifest = json.loads((bundle / "edje.json").read_text())
    (engine / "engine.json").write_text(json.dumps({"backend": "openvino", "bundle": manifest}))
    assert index_images(ImageEncoder.open(engine), photos, tmp_path / "s").indexed == 5
    (engine / "image_encoder.onnx").unlink()
    with pytest.raises(EngineError, match="build with --image-encoder"):
        ImageEncoder.open(engine)
    (engine / "engine.json").write_text("{}")
    with pytest.raises(EngineError, match="edje build"):
        ImageEncoder.open(engine)


def test_a_folder_without_encoder_or_with_a_damaged_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="neither a model bundle"):
        ImageEncoder.open(tmp_path)
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "image_encoder.onnx").write_bytes(b"damaged")
    with pytest.raises(EngineError, match=r"cannot open .*image_encoder"):
        ImageEncoder.open(bundle)


def test_onnx_runtime_stands_in_for_openvino_and_both_agree(
    tmp_path: Path, encoder: ImageEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    monkeypatch.setitem(sys.modules, "openvino", None)
    second = ImageEncoder.open(bundle)
    assert second.name.startswith("onnxruntime ")
    pixels = np.random.default_rng(0).standard_normal((3, 3, SIZE, SIZE)).astype(np.float32)
    np.testing.assert_allclose(second.encode(pixels), encoder.encode(pixels), atol=2e-3)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=r"edje-runtime\[cpu\]"):
        ImageEncoder.open(bundle)


def test_a_graph_of_other_sizes_than_the_manifest_is_refused(
    encoder: ImageEncoder,
) -> None:
    wrong = ImageEncoder(
        encoder.manifest, encoder.image, "wrong", lambda pixels: np.zeros((1, 2, 3), np.float32)
    )
    with pytest.raises(EdjeError, match=r"gave float32 \[1, 2, 3\], expected float16 \[1, 4, 6\]"):
        wrong.encode(np.zeros((1, 3, SIZE, SIZE), np.float32))


def test_a_real_bundle_indexes_the_images_of_the_official_outputs(
    tmp_path: Path, tiny_bundle: Path, official_tiny: Path
) -> None:
    """The tokens in the store are those that the official code gave for the same images."""
    expected = np.load(official_tiny / "expected.npz")
    encoder = ImageEncoder.open(tiny_bundle)
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(expected["images_u8"]):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / f"photos/{number:03d}.png")
    report = index_images(encoder, tmp_path / "photos", tmp_path / "s", batch_size=3)
    assert report.indexed == len(expected["images_u8"])
    out = np.empty_like(expected["compressed_tokens"], dtype=np.float16)
    with TokenStore.open(tmp_path / "s") as store:
        store.read(store.rows(store.ids()), out)
    difference = np.abs(out.astype(np.float32) - expected["compressed_tokens"])
    half = np.abs(expected["compressed_tokens"]) * 2.0**-10
    assert (difference <= 1e-4 + half).all()


@pytest.mark.parametrize("only", [[], iter(())])
def test_a_list_of_no_ids_leaves_no_store(
    tmp_path: Path, photos: Path, encoder: ImageEncoder, only: Any
) -> None:
    with pytest.raises(RequestError, match=r"the list of ids to index \(only\) is empty"):
        index_images(encoder, photos, tmp_path / "s", only=only)
    assert not (tmp_path / "s").exists()
