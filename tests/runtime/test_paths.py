"""Every public function that takes a path takes it as text, as a Path and as any path-like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edje import RequestError, Reranker
from edje.bundle import BundleManifest
from edje.engines.builder.build import build_engine
from edje.engines.builder.cache import cached_engine
from edje.engines.builder.options import EngineOptions
from edje.engines.image import FeatureEncoder, ImageEncoder
from edje.engines.manifest import EngineManifest
from edje.engines.registry import open_engine
from edje.engines.verify import verify_engine
from edje.runtime.indexing.index import index_features, index_images
from edje.runtime.queries import StoreSamples
from edje.runtime.store.verify import verify_store
from edje.runtime.text import QueryTokenizer


class PathLike:
    """A path that is neither text nor a `Path`."""

    def __init__(self, path: Path):
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.mark.parametrize("kind", [str, PathLike])
def test_engines_and_stores_are_found_by_any_kind_of_path(
    tmp_path: Path, tiny_engine: Path, tiny_store: Path, tiny_bundle: Path, kind: Any
) -> None:
    engine, store, bundle = kind(tiny_engine), kind(tiny_store), kind(tiny_bundle)
    manifest = EngineManifest.read(engine)
    assert BundleManifest.read(bundle) == manifest.bundle
    QueryTokenizer.open(engine, manifest.bundle.text)
    open_engine(engine).close()
    with Reranker.open(engine, store=store, rescore=engine, rescore_margin=0.1) as reranker:
        assert len(reranker.rank("red", top_k=3)) == 3
    (tmp_path / "queries.tsv").write_bytes(b"\xef\xbb\xbfa red circle\timg-1\r\nblue\timg-2\r\n")
    with StoreSamples.open(store, bundle, kind(tmp_path / "queries.tsv")) as samples:
        assert verify_engine(engine, bundle, samples).num_queries == 2
    assert verify_store(store).is_clean


@pytest.mark.parametrize("kind", [str, PathLike])
def test_engines_are_built_into_any_kind_of_path(
    tmp_path: Path, tiny_bundle: Path, kind: Any
) -> None:
    buckets = (size for size in np.array([15, 64]))
    options = EngineOptions(max_pairs=4, text_buckets=buckets)
    chosen: dict[str, Any] = {"backend": "onnxruntime", "precision": "fp32", "options": options}
    bundle, out = kind(tiny_bundle), kind(tmp_path / "engine")
    built = build_engine(bundle, out, **chosen)
    assert built.profile.text_buckets == (15, 64)
    assert cached_engine(bundle, kind(tmp_path / "cache"), **chosen).parent == tmp_path / "cache"


@pytest.mark.parametrize("kind", [str, PathLike])
def test_a_bundle_is_exported_between_any_kinds_of_paths(
    tmp_path: Path, official_tiny: Path, kind: Any
) -> None:
    from edje.export.export import export_bundle

    parts = [kind(official_tiny / name) for name in ("checkpoint_16.pth", "lm")]
    export_bundle(*parts, kind(tmp_path / "bundle"), vision_model=kind(official_tiny / "siglip"))
    assert BundleManifest.read(tmp_path / "bundle").image is not None


@pytest.mark.parametrize("kind", [str, PathLike])
def test_images_and_features_are_indexed_between_any_kinds_of_paths(
    tmp_path: Path, tiny_bundle: Path, kind: Any
) -> None:
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (60 * number, 90, 30)).save(tmp_path / f"photos/{number}.png")
    bundle, photos, store = (kind(p) for p in (tiny_bundle, tmp_path / "photos", tmp_path / "s"))
    encoder = ImageEncoder.open(bundle)
    only = (f"{number}.png" for number in (0, 2))
    assert index_images(encoder, photos, store, workers=1, only=only).indexed == 2
    sizes = encoder.manifest.sizes
    np.save(
        tmp_path / "f.npy", np.zeros((2, sizes.num_features or 1, sizes.feature_dim), np.float32)
    )
    (tmp_path / "ids.txt").write_text("x\ny\n")
    found = index_features(
        FeatureEncoder.open(bundle),
        kind(tmp_path / "f.npy"),
        store,
        ids=kind(tmp_path / "ids.txt"),
        only=iter(["y"]),
    )
    assert found.indexed == 1


@pytest.mark.parametrize("path", [3, None, b"engine"])
def test_what_is_no_path_is_refused_before_any_work(path: Any) -> None:
    for read in (BundleManifest.read, EngineManifest.read):
        with pytest.raises(RequestError, match="expected a path"):
            read(path)
