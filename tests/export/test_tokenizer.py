"""The language model's tokenizer, from every kind of folder that transformers reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from edje.errors import CheckpointError
from edje.export.configs import read_tokenizer

TEXT = "Two D\u00f3gs on the \u732b grass"
Folder = Callable[..., Path]


@pytest.fixture
def folder(official_tiny: Path, tmp_path: Path) -> Folder:
    """Make a folder of some of the language model's files, `tokenizer_config.json` as given."""

    def make(*names: str, settings: dict[str, object] | None = None) -> Path:
        for name in ("config.json", *names):
            shutil.copy(official_tiny / "lm" / name, tmp_path)
        if settings is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return tmp_path

    return make


def encoded(folder: Path) -> tuple[list[int], int]:
    tokenizer = read_tokenizer(folder)
    assert tokenizer.truncation is None
    assert tokenizer.padding is None
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    return ids, tokenizer.get_vocab_size()


def as_transformers_reads(folder: Path) -> tuple[list[int], int]:
    read = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return read(TEXT, add_special_tokens=False)["input_ids"], len(read)


@pytest.mark.parametrize(
    "names", [("tokenizer.json",), ("vocab.txt",), ("tokenizer.json", "tokenizer_config.json")]
)
def test_tokenizer_json_or_vocab_txt_alone_is_enough(folder, official_tiny, names):
    assert encoded(folder(*names)) == encoded(official_tiny / "lm")


def test_what_transformers_5_saves_gives_the_same_file(official_tiny, tmp_path):
    AutoTokenizer.from_pretrained(official_tiny / "lm").save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path).to_str() == read_tokenizer(official_tiny / "lm").to_str()


def test_truncation_and_padding_of_the_last_use_are_not_kept(official_tiny, tmp_path):
    used = AutoTokenizer.from_pretrained(official_tiny / "lm")
    used("a", truncation=True, max_length=4, padding="max_length")
    used.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is not None
    assert encoded(tmp_path) == encoded(official_tiny / "lm")


@pytest.mark.parametrize("names", [("tokenizer.json",), ("vocab.txt",)])
@pytest.mark.parametrize(
    "settings",
    [
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"tokenize_chinese_chars": False},
        {"tokenizer_class": "BertTokenizer"},
        {"tokenizer_class": "BertTokenizerFast"},
        {"extra_special_tokens": {"image_token": "<image>"}},
        {"extra_special_tokens": ["<image>"]},
        {"additional_special_tokens": ["<image>"]},
    ],
    ids=lambda value: "-".join(map(str, value)),
)
def test_tokenizer_config_changes_what_it_changes_in_transformers(folder, names, settings):
    made = folder(*names, settings=settings)
    assert encoded(made) == as_transformers_reads(made)


def test_the_image_token_that_training_added_is_counted_once(official_tiny, tmp_path):
    added = {"extra_special_tokens": {"image_token": "<image>"}}
    AutoTokenizer.from_pretrained(official_tiny / "lm", **added).save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path).token_to_id("<image>") == 142
    assert encoded(tmp_path) == (encoded(official_tiny / "lm")[0], 143)


def test_a_config_without_a_model_type_is_a_bert(folder, official_tiny):
    made = folder("vocab.txt")
    config = json.loads((made / "config.json").read_text())
    del config["model_type"]
    (made / "config.json").write_text(json.dumps(config))
    assert encoded(made) == encoded(official_tiny / "lm")


@pytest.mark.parametrize("content", ["", "{}", '{"model": 3}', "not JSON"])
def test_a_file_that_is_no_tokenizer_is_told(folder, content):
    made = folder()
    (made / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="cannot read the tokenizer in"):
        read_tokenizer(made)
