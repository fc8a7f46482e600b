"""The command line: every verb's way, and one clear sentence with exit code 2 for bad input."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from edje import __version__
from edje.runtime.cli.app import main
from edje.runtime.store import TokenStore


class Ran:
    """What one call of the command line gave."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def edje(capfd):
    """Run the command line in this process: `edje("store", "stat", path)`."""

    def call(*args: object) -> Ran:
        capfd.readouterr()
        code = main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return Ran(code, out, err)

    return call


@pytest.fixture
def photos(tmp_path, official_tiny):
    """A folder of six images, one below a subfolder, and one file that is none."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    pixels = np.load(official_tiny / "expected.npz")["images_u8"].transpose(0, 2, 3, 1)
    for number in range(6):
        name = f"sub/{number}.png" if number == 3 else f"{number}.png"
        Image.fromarray(pixels[number]).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_index_reports_skips_counts_and_continues(edje, tiny_engine, photos, tmp_path):
    store = tmp_path / "photos.store"
    first = edje("index", tiny_engine, photos, "--store", store, "--json")
    assert first.code == 0
    assert (first.json["indexed"], first.json["already_present"]) == (6, 0)
    assert [entry["id"] for entry in first.json["skipped"]] == ["notes.txt"]
    assert "'notes.txt' was skipped" in first.err
    again = edje("index", tiny_engine, photos, "--store", store)
    assert "already_present  6" in again.out
    stat = edje("store", "stat", store, "--json")
    assert stat.json["num_records"] == 6
    assert "num_records" in edje("store", "stat", store).out
    ranked = edje("rerank", tiny_engine, "--store", store, "--query", "a dog", "--json")
    assert sorted(hit["id"] for hit in ranked.json["hits"]) == [
        *("0.png", "1.png", "2.png", "4.png", "5.png", "sub/3.png")
    ]


def test_rerank_answers_in_json_and_as_a_table(edje, tiny_engine, tiny_store, tmp_path):
    candidates = tmp_path / "ids.txt"
    candidates.write_text("img-3\r\n\nimg-1\nimg-3\n")
    common = ("rerank", tiny_engine, "--store", tiny_store, "--query", "a dog")
    result = edje(*common, "--candidates", candidates, "--json").json
    assert result["query"] == "a dog"
    assert {hit["id"] for hit in result["hits"]} == {"img-1", "img-3"}
    assert len(result["hits"]) == 3
    engine = {"backend": "openvino", "precision": "fp32", "device": "host"}
    assert result["engine"] == {**engine, "tokens": "float16", "residency": "disk"}
    stages = ["tokenize", "resolve", "gather", "upload", "compute", "download", "total"]
    assert list(result["timings_ms"]) == stages
    assert (result["truncated"], result["errors"]) == (False, [])
    table = edje(*common, "--top-k", 2)
    assert table.code == 0
    head, before, *_ = table.out.splitlines()
    assert re.match(r"12 images scored in [\d.,]+ ms \([\d,]+ pairs/s\) on openvino fp32$", head)
    assert re.match(r"before: opened in \d+\.\d\d s, warmed up in \d+\.\d\d s$", before)
    assert result["open_s"] > 0
    assert result["warm_up_s"] > 0
    assert table.out.count("img-") == 2


def test_rerank_with_a_precise_engine_says_what_it_rescored(edje, tiny_engine, tiny_store):
    common = ("rerank", tiny_engine, "--store", tiny_store, "--query", "a dog", "--top-k", 2)
    cascade = (*common, "--rescore", tiny_engine, "--rescore-margin", 0.001)
    result = edje(*cascade, "--json").json
    alone = edje(*common, "--json").json
    assert [hit["id"] for hit in result["hits"]] == [hit["id"] for hit in alone["hits"]]
    assert alone["rescoring"] is None
    assert result["rescoring"]["num_rescored"] == 12
    assert "12 rescored on openvino fp32" in edje(*cascade).out
    refused = edje(*common, "--rescore-margin", 0.001)
    assert (refused.code, "only with --rescore" in refused.err) == (2, True)


def test_rerank_says_where_it_reads_tokens_from(edje, tiny_engine, tiny_store):
    common = ("rerank", tiny_engine, "--store", tiny_store, "--query", "a dog")
    table = edje(*common, "--residency", "host")
    assert (table.code, "tokens are read from host: as asked" in table.err) == (0, True)
    assert edje(*common).err == "", "nobody asked"
    result = edje(*common, "--residency", "auto", "--json").json
    assert result["residency"]["place"] == result["engine"]["residency"]
    assert result["residency"]["pairs_per_s"].keys() == {"disk", "host"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--residency", "ram"), '--residency is \'ram\', expected "disk" or "host"'),
        (("--residency", "device"), "the residency `host` keeps them"),
        (("--residency", "auto", "--resident-gb", "nan"), "--resident-gb is nan"),
        (("--residency", "auto", "--resident-gb", "0"), "--resident-gb is 0.0"),
        (("--device", "cuda_core"), "built for the CPU"),
        (("--resident-gb", "1"), "--resident-gb: only with --residency device or auto"),
        (("--timeout", "-1"), "--timeout is -1.0, expected 0 or more seconds"),
        (("--missing", "ignore"), '--missing is \'ignore\', expected "error" or "skip"'),
        (("--timeout", "nan"), "--timeout is nan"),
    ],
)
def test_rerank_refuses_what_cannot_be_meant(edje, tiny_engine, tiny_store, options, says):
    ran = edje("rerank", tiny_engine, "--store", tiny_store, "--query", "a dog", *options)
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err
    assert "Traceback" not in ran.err


def test_rerank_skips_missing_candidates_where_asked(edje, tiny_engine, tiny_store, tmp_path):
    (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbfimg-3\r\nghost\r\nimg-5\r\n")
    common = ("rerank", tiny_engine, "--store", tiny_store, "--query", "a dog")
    common += ("--candidates", tmp_path / "ids.txt")
    refused = edje(*common)
    assert (refused.code, "1 of 3 ids are not in the store" in refused.err) == (2, True)
    table = edje(*common, "--missing", "skip")
    assert table.code == 0
    assert "1 candidates are not in the store: 'ghost'" in table.err
    result = edje(*common, "--missing", "skip", "--json").json
    assert {hit["id"] for hit in result["hits"]} == {"img-3", "img-5"}
    assert [(fault["id"], fault["index"]) for fault in result["missing"]] == [("ghost", 1)]
    assert (result["num_asked"], result["num_scored"]) == (3, 2)


def test_candidates_come_from_stdin(edje, tiny_engine, tiny_store, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"img-5\nimg-4\n"))
    monkeypatch.setattr(sys, "stdin", stdin)
    common = ("rerank", tiny_engine, "--store", tiny_store, "--query", "x", "--json")
    hits = edje(*common, "--candidates", "-").json["hits"]
    assert {hit["id"] for hit in hits} == {"img-4", "img-5"}


def test_cut_queries_and_damaged_records_are_told_on_stderr(
    edje, tiny_engine, tiny_store, tmp_path
):
    store = tmp_path / "store"
    with TokenStore.open(tiny_store) as source:
        tokens = np.zeros((12, 64, 32), np.float16)
        source.read(source.rows(source.ids()), tokens)
        sizes = {"num_tokens": 64, "hidden": 32}
        fingerprint = source.fingerprint_encoder
    tokens[4] = np.nan
    with TokenStore.create(store, **sizes, fingerprint_encoder=fingerprint) as target:
        target.append([f"img-{i}" for i in range(12)], tokens, allow_nonfinite=True)
    ran = edje("rerank", tiny_engine, "--store", store, "--query", "a " * 70)
    assert ran.code == 0
    assert "the query was cut" in ran.err
    assert "'img-4' was not ranked" in ran.err
    assert "11 of 12 images scored in" in ran.out


def test_a_store_whose_segments_are_gone_exits_with_1(edje, tiny_engine, tiny_store, tmp_path):
    store = shutil.copytree(tiny_store, tmp_path / "store")
    for segment in (store / "segments").iterdir():
        segment.unlink()
    ran = edje("rerank", tiny_engine, "--store", store, "--query", "x", "--json")
    assert (ran.code, ran.json["hits"], len(ran.json["errors"])) == (1, [], 12)
    assert "12 candidates could not be scored, none was" in ran.err


def test_strict_exits_with_1_where_one_was_not_ranked(edje, tiny_engine, tiny_store, tmp_path):
    store = shutil.copytree(tiny_store, tmp_path / "store")
    common = ("rerank", tiny_engine, "--store", store, "--query", "x", "--json")
    assert edje(*common, "--strict").code == 0
    segment = store / "segments/000001.tokens"
    content = bytearray(segment.read_bytes())
    content[4096 + 5] ^= 1
    segment.write_bytes(content)
    assert edje(*common).code == 0
    ran = edje(*common, "--strict")
    assert (ran.code, len(ran.json["hits"]), len(ran.json["errors"])) == (1, 11, 1)
    assert "1 candidates could not be scored, the others were" in ran.err


def test_export_and_build_write_what_they_say(edje, official_tiny, tmp_path):
    bundle, engine = tmp_path / "bundle", tmp_path / "engine"
    folders = ("--language-model", official_tiny / "lm")
    exported = edje(
        *("export", official_tiny / "checkpoint_16.pth", *folders, "--out", bundle),
        *("--vision-model", official_tiny / "siglip", "--text-normalization", "none", "--json"),
    )
    assert exported.code == 0, exported.err
    assert exported.json["text"]["normalization"] == "none"
    built = edje(
        *("build", bundle, "--backend", "onnxruntime", "--precision", "fp32", "--out", engine),
        *("--max-pairs", 8, "--text-buckets", "16,64", "--json"),
    )
    assert built.code == 0, built.err
    assert built.json["profile"] == {"max_pairs": 8, "text_buckets": [16, 64]}
    assert (engine / "engine.json").is_file()
    kept = edje("build", bundle, "--out", engine)
    assert kept.code == 2
    assert "exists already" in kept.err


NOWHERE = "/nonexistent"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("export", NOWHERE, "--language-model", "LM", "--out", "OUT"), NOWHERE),
        (("export", "CKPT", "--language-model", NOWHERE, "--out", "OUT"), NOWHERE),
        (
            (
                "export",
                "CKPT",
                "--language-model",
                "LM",
                "--out",
                "OUT",
                "--text-normalization",
                "x",
            ),
            "openclip",
        ),
        (("build", NOWHERE, "--out", "OUT"), NOWHERE),
        (("build", "BUNDLE", "--out", "OUT", "--backend", "abacus"), "this machine can run"),
        (
            ("build", "BUNDLE", "--out", "OUT", "--backend", "openvino", "--precision", "fp3"),
            "'fp3'",
        ),
        (("build", "BUNDLE", "--out", "OUT", "--text-buckets", "16,x"), "whole numbers"),
        (("build", "BUNDLE", "--out", "/proc/engine"), "/proc/engine"),
        (("index", "ENGINE", NOWHERE, "--store", "OUT"), NOWHERE),
        (("index", NOWHERE, "LM", "--store", "OUT"), NOWHERE),
        (("rerank", NOWHERE, "--store", "STORE", "--query", "x"), NOWHERE),
        (("rerank", "BUNDLE", "--store", "STORE", "--query", "x"), "model bundle"),
        (("rerank", "ENGINE", "--store", NOWHERE, "--query", "x"), NOWHERE),
        (("rerank", "ENGINE", "--store", "STORE", "--query", " "), "empty"),
        (("rerank", "ENGINE", "--store", "STORE", "--query", "!?"), "empty after normalization"),
        (("rerank", "ENGINE", "--store", "STORE", "--query", "x", "--top-k", "0"), "--top-k is 0"),
        (
            ("rerank", "ENGINE", "--store", "STORE", "--query", "x", "--candidates", NOWHERE),
            NOWHERE,
        ),
        (
            ("rerank", "ENGINE", "--store", "STORE", "--query", "x", "--candidates", "CAPTIONS"),
            "ids are not in the store",
        ),
        (
            ("rerank", "ENGINE", "--store", "STORE", "--query", "x", "--candidates", "CKPT"),
            "not UTF-8",
        ),
        (("store", "stat", NOWHERE), NOWHERE),
        (("rerank", "ENGINE"), "--store"),
        (("rerank", "ENGINE", "--store", "STORE", "--query", "x", "--top-k", "few"), "--top-k"),
    ],
)
def test_bad_input_is_one_clear_sentence_and_exit_code_2(
    edje, args, message, official_tiny, tiny_bundle, tiny_engine, tiny_store, tmp_path
):
    places = {
        "CKPT": official_tiny / "checkpoint_16.pth",
        "CAPTIONS": official_tiny / "captions.json",
        "LM": official_tiny / "lm",
        "BUNDLE": tiny_bundle,
        "ENGINE": tiny_engine,
        "STORE": tiny_store,
        "OUT": tmp_path / "out",
    }
    ran = edje(*(places.get(arg, arg) for arg in args))
    assert ran.code == 2
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""
    assert not (tmp_path / "out").exists()


def test_a_store_of_another_encoder_names_both_fingerprints(
    edje, tiny_engine, tiny_bundle, tmp_path
):
    store = tmp_path / "store"
    TokenStore.create(store, num_tokens=64, hidden=32, fingerprint_encoder="c" * 64).close()
    ran = edje("rerank", tiny_engine, "--store", store, "--query", "x")
    fingerprint = json.loads((tiny_bundle / "edje.json").read_text())["fingerprint_encoder"]
    assert ran.code == 2
    assert "c" * 64 in ran.err
    assert fingerprint in ran.err
    assert "edje index" in ran.err


def test_missing_libraries_name_the_extra(edje, monkeypatch, official_tiny, tmp_path):
    monkeypatch.setattr("edje.runtime.cli.options.find_spec", lambda name: None)
    ran = edje("export", "x", "--language-model", "y", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "torch, transformers, onnx" in ran.err
    assert "pip install 'edje-runtime[export]'" in ran.err


@pytest.mark.parametrize(
    "verb", ["export", "build", "index", "rerank", "verify", "store stat", "doctor", "demo"]
)
def test_every_verb_explains_itself_with_an_example(edje, verb):
    ran = edje(*verb.split(), "--help")
    assert ran.code == 0
    assert f"Example:\n    edje {verb}" in ran.out


def test_version_and_empty_call(edje):
    assert edje("--version").out == f"edje-runtime {__version__}\n"
    alone = edje()
    assert "rerank" in alone.out + alone.err
    assert "Exit codes:" in alone.out + alone.err
