"""`edje.json`: what is written is read back, and every fault is named at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edje.bundle import BundleManifest, ImageSpec, ModelSizes, TextSpec
from edje.errors import CheckpointError, EdjeError, named

MANIFEST = BundleManifest(
    sizes=ModelSizes(64, 384, 12, 12, 1536, 30523, 1024, 576),
    text=TextSpec("openclip", 61, 101, 102, 0),
    image=ImageSpec(384, 2, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    fingerprint_encoder="e" * 64,
    fingerprint_scorer="s" * 64,
    provenance={"checkpoint": "checkpoint_16.pth"},
)


def written(folder: Path, **changes: Any) -> Path:
    values = {**MANIFEST.to_json(), **changes}
    (folder / "edje.json").write_text(json.dumps(values))
    return folder


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path)
    assert BundleManifest.read(tmp_path) == MANIFEST


def test_a_bundle_without_image_encoder_is_read_back(tmp_path: Path) -> None:
    assert BundleManifest.read(written(tmp_path, image=None)).image is None


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    text = {**MANIFEST.to_json()["text"], "colour": 1}
    del text["cls_id"]
    with pytest.raises(CheckpointError) as caught:
        BundleManifest.read(written(tmp_path, text=text, sizes=3, extra=0))
    assert set(caught.value.faults) == {
        "sizes: expected an object, got int",
        "text.cls_id: missing",
        "text.colour: unknown field",
        "extra: unknown field",
    }


def test_another_version_names_both(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="format version 3, this edje reads 2"):
        BundleManifest.read(written(tmp_path, format_version=3))


@given(content=st.binary(max_size=60))
def test_any_other_content_is_refused(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "edje.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        BundleManifest.read(folder)


def test_a_missing_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="edje export"):
        BundleManifest.read(tmp_path / "none")


def test_an_error_shows_faults_and_hint_a_line_each() -> None:
    error = EdjeError("it failed", faults=["one", "two"], hint="mend it")
    assert str(error).splitlines() == ["it failed", "  - one", "  - two", "Hint: mend it"]


@pytest.mark.parametrize(("count", "rest"), [(1, ""), (20, ""), (21, " and 1 more")])
def test_long_lists_of_names_are_cut_with_the_count(count: int, rest: str) -> None:
    text = named([f"id{number}" for number in range(count)])
    assert text.count("'id") == min(count, 20)
    assert text.endswith(rest or "'")
