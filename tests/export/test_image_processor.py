"""The SigLIP folder's preprocessing, as either transformers saves it, read as it reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoImageProcessor, AutoTokenizer, SiglipProcessor

from edje.bundle import ImageSpec
from edje.errors import CheckpointError
from edje.export.configs import DEFAULTS, image_spec, read_image_processor

OLD, NEW = "preprocessor_config.json", "processor_config.json"
SQUARE = {"height": 32, "width": 32}


def write(folder: Path, name: str, values: object) -> None:
    (folder / name).write_text(json.dumps(values))


def spec_of(folder: Path, size: int = 32) -> ImageSpec:
    faults: list[str] = []
    spec = image_spec(read_image_processor(folder), size, faults)
    assert spec is not None, faults
    return spec


def as_transformers_reads(folder: Path) -> ImageSpec:
    read = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    mean, std = (tuple(map(float, values)) for values in (read.image_mean, read.image_std))
    return ImageSpec(read.size["height"], int(read.resample), read.rescale_factor, mean, std)


def faults_of(**settings: Any) -> list[str]:
    faults: list[str] = []
    assert image_spec({**DEFAULTS, "size": SQUARE, **settings}, 32, faults) is None
    return faults


def test_what_transformers_5_saves_is_what_the_original_folder_says(official_tiny, tmp_path):
    original = spec_of(official_tiny / "siglip")
    images = AutoImageProcessor.from_pretrained(official_tiny / "siglip")
    images.save_pretrained(tmp_path / "images")
    tokenizer = AutoTokenizer.from_pretrained(official_tiny / "lm")
    SiglipProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / NEW).exists()
    assert not (tmp_path / "both" / OLD).exists()
    assert spec_of(tmp_path / "images") == spec_of(tmp_path / "both") == original


@pytest.mark.parametrize(
    ("new", "resample"),
    [
        ({"image_processor": {"size": SQUARE, "resample": 0}}, 0),
        ({"processor_class": "SiglipProcessor"}, 2),
        ({"image_processor": None}, 2),
    ],
    ids=["nested", "without", "null"],
)
def test_where_both_files_are_there_the_one_that_transformers_takes_wins(tmp_path, new, resample):
    kind = {"image_processor_type": "SiglipImageProcessor"}
    if new.get("image_processor"):
        new = {**new, "image_processor": {**new["image_processor"], **kind}}
    write(tmp_path, OLD, {**kind, "size": SQUARE, "resample": 2})
    write(tmp_path, NEW, new)
    spec = spec_of(tmp_path)
    assert spec.resample == resample
    assert spec == as_transformers_reads(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": SQUARE},
        {"size": SQUARE, "resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]},
        {"size": SQUARE, "rescale_factor": 0.5, "do_convert_rgb": None},
    ],
)
def test_settings_and_defaults_are_those_of_transformers(tmp_path, settings):
    write(tmp_path, OLD, {"image_processor_type": "SiglipImageProcessor", **settings})
    assert spec_of(tmp_path) == as_transformers_reads(tmp_path)


def test_absent_and_null_settings_are_the_defaults_and_what_is_not_done_changes_nothing(tmp_path):
    nulls = dict.fromkeys(("resample", "rescale_factor", "image_mean", "image_std", "size"))
    for values in (nulls, {}):
        write(tmp_path, OLD, values)
        spec = spec_of(tmp_path, 224)
        assert (spec.resample, spec.mean, spec.std) == (3, (0.5,) * 3, (0.5,) * 3)
    off = {"do_rescale": False, "do_normalize": False, "size": SQUARE, "image_mean": [9, 9, 9]}
    write(tmp_path, OLD, off)
    spec = spec_of(tmp_path)
    assert (spec.rescale_factor, spec.mean, spec.std) == (1.0, (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"size": {"height": 32, "width": 48}}, "expected 32 squared"),
        ({"size": {"shortest_edge": 32}}, "expected 32 squared"),
        ({"size": "32"}, "expected 32 squared"),
        ({"resample": "bicubic"}, "resample: got 'bicubic'"),
        ({"resample": 2.5}, "resample: got 2.5"),
        ({"rescale_factor": "1/255"}, "rescale_factor: got '1/255'"),
        ({"rescale_factor": 0}, "rescale_factor: got 0"),
        ({"image_mean": [0.5, 0.5]}, "image_mean: got [0.5, 0.5]"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std: got [0.5, 0.5, 0.0]"),
        ({"image_mean": ["a", 0.5, 0.5]}, "image_mean: got ['a', 0.5, 0.5]"),
        ({"do_resize": False}, "do_resize: got False, expected True"),
        ({"do_center_crop": True}, "do_center_crop: got True, expected False"),
        ({"do_pad": True}, "do_pad: got True, expected False"),
        ({"image_processor_type": "CLIPImageProcessor"}, "got 'CLIPImageProcessor'"),
    ],
)
def test_what_the_runtime_does_not_do_is_refused_by_name(settings, part):
    (fault,) = faults_of(**settings)
    assert part in fault
    others = {"resample": 9, "image_mean": 3 * [None], "do_resize": False, "size": 3}
    assert len(faults_of(**others)) == 4, "all of them at once"


@pytest.mark.parametrize(
    "files", [{}, {NEW: {"processor_class": "SiglipProcessor"}}, {NEW: {"image_processor": [1]}}]
)
def test_a_folder_without_settings_names_both_files(tmp_path, files):
    for name, values in files.items():
        write(tmp_path, name, values)
    with pytest.raises(CheckpointError) as caught:
        read_image_processor(tmp_path)
    assert NEW in caught.value.message
    assert OLD in caught.value.message


def test_files_that_are_no_objects_are_told_and_a_byte_order_mark_is_not(tmp_path):
    write(tmp_path, OLD, [1])
    with pytest.raises(CheckpointError, match="holds list, expected an object"):
        read_image_processor(tmp_path)
    (tmp_path / OLD).write_bytes(b"\xef\xbb\xbf" + json.dumps({"size": SQUARE}).encode())
    assert spec_of(tmp_path).size == 32
