"""Promises of calls: what is of another kind is one RequestError, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edje.engines.build_options import BuildOptions
from edje.engines.builder.build import build_engine
from edje.engines.builder.cache import cached_engine
from edje.engines.builder.options import EngineOptions
from edje.engines.image import FeatureEncoder, ImageEncoder
from edje.engines.verify import verify_engine
from edje.errors import RequestError
from edje.export.export import export_bundle
from edje.runtime.indexing.index import index_features, index_images
from edje.runtime.queries import StoreSamples
from edje.runtime.store import TokenStore

Call = Callable[..., Any]
NO_PATHS = (3, None, b"x", ["a"])
NO_FLAGS = ("no", 1, None)
NO_SAMPLES = ("store", ["a"], 3, iter(["a"]), {})
INDEX_OPTIONS: dict[str, tuple[Any, ...]] = {
    "dtype": (3, np.int8),
    "only": ("a.png", {"a.png": 1}, 3, [3], frozenset([3])),
    "progress": (3, "x"),
    "on_skip": (3, "x"),
    "follow_links": NO_FLAGS,
}

WRONG: dict[str, dict[str, tuple[Any, ...]]] = {
    "build_engine": {
        "bundle": NO_PATHS,
        "out": NO_PATHS,
        "backend": (None, 3, ["openvino"]),
        "precision": (32, ["fp32"]),
        "calibration": NO_SAMPLES,
        "options": ({"max_pairs": 3}, 3, "x", False),
        "overwrite": NO_FLAGS,
        "progress": (3, "x"),
    },
    "cached_engine": {
        "bundle": NO_PATHS,
        "root": (3, b"x", ["a"]),
        "backend": (None, 3, ["openvino"]),
        "precision": (None, 32, ["fp32"]),
        "calibration": NO_SAMPLES,
        "options": ({"max_pairs": 3}, 3, "x", False),
        "progress": (3, "x"),
    },
    "verify_engine": {
        "folder": NO_PATHS,
        "bundle": NO_PATHS,
        "samples": NO_SAMPLES,
        "write": NO_FLAGS,
        "progress": (3, "x"),
    },
    "verify": {"progress": (3, "x")},
    "index_images": {
        "encoder": ("bundle", None, 3),
        "images": (3, None, b"im", [3], {"im": 1}),
        "store": NO_PATHS,
        "batch_size": ("32", None, 2.5, True, 0),
        "workers": ("2", 1.5, True, 0),
        **INDEX_OPTIONS,
    },
    "index_features": {
        "encoder": ("bundle", None, 3),
        "features": NO_PATHS,
        "store": NO_PATHS,
        "ids": (["a"], 3, b"x"),
        "batch_size": ("32", None, 2.5, True, 0),
        **INDEX_OPTIONS,
    },
    "ImageEncoder.open": {"folder": NO_PATHS},
    "FeatureEncoder.open": {"folder": NO_PATHS},
    "StoreSamples.open": {
        "store": NO_PATHS,
        "bundle": NO_PATHS,
        "queries": (*NO_PATHS, iter(["a query"])),
        "num_candidates": ("5", 2.5, None, True, 1),
        "max_queries": ("3", 2.5, True, 0),
        "seed": ("x", 1.5, None, -1),
    },
    "export_bundle": {
        "checkpoint": NO_PATHS,
        "language_model": NO_PATHS,
        "out": NO_PATHS,
        "vision_model": (3, b"x", ["a"]),
        "text_normalization": (None, 3, ["none"]),
        "overwrite": NO_FLAGS,
        "progress": (3, "x"),
    },
}

WRONG_OPTIONS: dict[str, tuple[Any, ...]] = {
    "limits": ({"min_kendall_tau": 0.9}, 0.9, "x", False),
    "image_encoder": NO_FLAGS,
    "backend_options": ({}, 3, None),
}
WRONG_BACKEND_OPTIONS: dict[str, tuple[Any, ...]] = {
    "workspace_bytes": ("3", 2.5),
    "optimization_level": ("3", 2.5),
    "compute_capabilities": (3, "8.9", [8.9]),
    "hardware_compatible": NO_FLAGS,
    "version_compatible": NO_FLAGS,
    "report": NO_FLAGS,
}


def cases(table: dict[str, tuple[Any, ...]]) -> list[Any]:
    """Return a (name, value) for each wrong value of each argument."""
    return [
        pytest.param(name, value, id=f"{name}-{type(value).__name__}")
        for name, values in table.items()
        for value in values
    ]


@pytest.fixture(scope="module")
def encoders(tiny_bundle: Path) -> tuple[ImageEncoder, FeatureEncoder]:
    """Both encoders of the bundle, opened once."""
    return ImageEncoder.open(tiny_bundle), FeatureEncoder.open(tiny_bundle)


@pytest.fixture
def calls(
    encoders: tuple[ImageEncoder, FeatureEncoder],
    tmp_path: Path,
    tiny_bundle: Path,
    tiny_engine: Path,
    tiny_store: Path,
    official_tiny: Path,
) -> dict[str, tuple[Call, dict[str, Any]]]:
    """Every call with arguments that would do, and are to write into `new`."""
    engine = {"bundle": tiny_bundle, "backend": "openvino", "precision": "fp32"}
    new = tmp_path / "new"
    return {
        "build_engine": (build_engine, {**engine, "out": new}),
        "cached_engine": (cached_engine, {**engine, "root": new}),
        "verify_engine": (verify_engine, {"folder": tiny_engine, "bundle": tiny_bundle}),
        "verify": (TokenStore.open(tiny_store).verify, {}),
        "index_images": (
            index_images,
            {"encoder": encoders[0], "images": tmp_path, "store": new},
        ),
        "index_features": (
            index_features,
            {"encoder": encoders[1], "features": tmp_path, "store": new},
        ),
        "ImageEncoder.open": (ImageEncoder.open, {}),
        "FeatureEncoder.open": (FeatureEncoder.open, {}),
        "StoreSamples.open": (
            StoreSamples.open,
            {"store": tiny_store, "bundle": tiny_bundle, "queries": tmp_path / "queries.txt"},
        ),
        "export_bundle": (
            export_bundle,
            {
                "checkpoint": official_tiny / "checkpoint_16.pth",
                "language_model": official_tiny / "lm",
                "out": new,
            },
        ),
    }


@pytest.mark.parametrize(
    ("call", "name", "value"),
    [
        pytest.param(call, *case.values, id=f"{call}-{case.id}")
        for call, table in WRONG.items()
        for case in cases(table)
    ],
)
def test_what_is_of_another_kind_is_refused_before_any_work(
    calls: dict[str, tuple[Call, dict[str, Any]]], tmp_path: Path, call: str, name: str, value: Any
) -> None:
    function, arguments = calls[call]
    with pytest.raises(RequestError, match=f"{name}.*(expected|not strings)"):
        function(**{**arguments, name: value})
    assert not (tmp_path / "new").exists()


def test_all_that_is_of_another_kind_is_told_at_once(
    calls: dict[str, tuple[Call, dict[str, Any]]],
) -> None:
    for call, table in WRONG.items():
        function, arguments = calls[call]
        wrong = {name: values[0] for name, values in table.items()}
        with pytest.raises(RequestError) as caught:
            function(**{**arguments, **wrong})
        assert len(caught.value.faults or [caught.value.message]) == len(wrong), call


@pytest.mark.parametrize(("name", "value"), [*cases(WRONG_OPTIONS), *cases(WRONG_BACKEND_OPTIONS)])
def test_options_of_another_kind_are_refused_before_any_work(
    calls: dict[str, tuple[Call, dict[str, Any]]], tmp_path: Path, name: str, value: Any
) -> None:
    of_backend = name in WRONG_BACKEND_OPTIONS
    options = EngineOptions(
        **{"backend_options": BuildOptions(**{name: value})} if of_backend else {name: value}
    )
    for call in ("build_engine", "cached_engine"):
        function, arguments = calls[call]
        with pytest.raises(RequestError, match=name):
            function(**arguments, options=options)
        with pytest.raises(RequestError, match=name):
            function(**{**arguments, "backend": "auto"}, options=options)
    assert not (tmp_path / "new").exists()


def test_every_iterable_option_is_taken_once_and_becomes_a_tuple() -> None:
    ways: list[Callable[[list[Any]], Any]] = [iter, list, tuple, np.array]
    for way in [*ways, lambda values: dict.fromkeys(values).keys()]:
        buckets, capabilities = way([24, 64]), way(["8.9"])
        options = EngineOptions(
            text_buckets=buckets, backend_options=BuildOptions(compute_capabilities=capabilities)
        )
        assert options.text_buckets == (24, 64)
        assert options.backend_options.compute_capabilities == ("8.9",)
        assert options.profile(61).text_buckets == options.profile(61).text_buckets == (24, 64)


def test_an_engine_of_an_iterator_of_buckets_is_that_of_the_list(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    how: dict[str, Any] = {"backend": "onnxruntime", "precision": "fp32"}
    ways = (iter([24, 64]), [24, 64], iter([24, 64]))
    entries = {
        cached_engine(tiny_bundle, tmp_path, **how, options=EngineOptions(text_buckets=buckets))
        for buckets in ways
    }
    assert len(entries) == 1
