"""The command line: every verb's way, and one clear sentence with exit code 2 for bad input."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from edje import __version__
from edje.runtime.store import TokenStore


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
    assert result["engine"] == {
        **engine,
        "tokens": "float16",
        "residency": "disk",
        "layers": "",
    }
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


def test_rerank_says_where_it_reads_tokens_from(edje, tiny_engine, tiny_store):
    common = ("rerank", tiny_engine, "--store", tiny_store, "--query", "a dog")
    table = edje(*common, "--residency", "host")
    assert (table.code, "tokens are read from host: as asked" in table.err) == (0, True)
    assert edje(*common).err == "", "nobody asked"
    result = edje(*common, "--residency", "auto", "--json").json
    assert result["residency"]["place"] == result["engine"]["residency"]
    assert result["residency"]["pairs_per_s"].keys() == {"disk", "host"}


def test_rerank_skips_missing_candidates_where_asked(edje, tiny_engine, tiny_store, tmp_path):
    (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbfimg-3\r\nghost\r\nimg-5\r\n")
    common = ("rerank", tiny_engine, "--store", tiny_store, "--query", "a dog")
    common += ("--candidates", tmp_path / "ids.txt")
    refused = edje(*common)
    assert (refused.code, "1 of 3 ids are not in the store" in refused.err) == (2, True)
    table = edje(*common, "--missing", "skip")
    assert table.code == 0
    assert "1 candidate is not in the store: 'ghost'" in table.err
    result = edje(*common, "--missing", "skip", "--json").json
    assert {hit["id"] for hit in result["hits"]} == {"img-3", "img-5"}
    assert [(fault["id"], fault["index"]) for fault in result["missing"]] == [("ghost", 1)]
    assert (result["num_asked"], result["num_scored"]) == (3, 2)


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
    assert "1 candidate could not be scored, the others were" in ran.err


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
RERANK = "rerank ENGINE --store STORE --query"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"export {NOWHERE} --language-model LM --out OUT", NOWHERE),
        (f"export CKPT --language-model {NOWHERE} --out OUT", NOWHERE),
        ("export CKPT --language-model LM --out OUT --text-normalization x", "openclip"),
        (f"build {NOWHERE} --out OUT", NOWHERE),
        ("build BUNDLE --out OUT --backend abacus", "this machine can run"),
        ("build BUNDLE --out OUT --backend openvino --precision fp3", "'fp3'"),
        ("build BUNDLE --out OUT --text-buckets 16,x", "whole numbers"),
        ("build BUNDLE --out /proc/engine", "/proc/engine"),
        (f"index ENGINE {NOWHERE} --store OUT", NOWHERE),
        (f"index {NOWHERE} LM --store OUT", NOWHERE),
        (f"rerank {NOWHERE} --store STORE --query x", NOWHERE),
        ("rerank BUNDLE --store STORE --query x", "model bundle"),
        (f"rerank ENGINE --store {NOWHERE} --query x", NOWHERE),
        (f"{RERANK} ' '", "empty"),
        (f"{RERANK} !?", "empty after normalization"),
        (f"{RERANK} x --candidates {NOWHERE}", NOWHERE),
        (f"{RERANK} x --candidates CAPTIONS", "ids are not in the store"),
        (f"{RERANK} x --candidates CKPT", "not UTF-8"),
        (f"store stat {NOWHERE}", NOWHERE),
        ("rerank ENGINE", "--store"),
        (f"{RERANK} x --top-k few", "--top-k"),
        (f"{RERANK} x --residency device", "the residency `host` keeps them"),
        (f"{RERANK} x --residency auto --resident-gb nan", "--resident-gb is nan"),
        (f"{RERANK} x --resident-gb 1", "--resident-gb: only with --residency device or auto"),
        (f"{RERANK} x --timeout nan", "--timeout is nan"),
        (f"{RERANK} x --device cuda_core", "built for the CPU"),
        (f"{RERANK} x --rescore-margin 0.001", "only with --rescore"),
    ],
)
def test_bad_input_is_one_clear_sentence_and_exit_code_2(
    edje, line, message, official_tiny, tiny_bundle, tiny_engine, tiny_store, tmp_path
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
    ran = edje(*(places.get(word, word) for word in shlex.split(line)))
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
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


def test_version_and_empty_call(edje):
    assert edje("--version").out == f"edje-runtime {__version__}\n"
    alone = edje()
    assert "rerank" in alone.out + alone.err
    assert "Exit codes:" in alone.out + alone.err
