"""Inputs of an export: paths first, then names on the Hub, every fault of the three at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edje.bundle import BundleManifest
from edje.errors import CheckpointError
from edje.export.export import export_bundle
from edje.export.sources import Sources, locate
from pretended_hub import COMMIT, TAGGED, Hub, Repository, files_of, running_hub, write_cache

LM, SIGLIP, EDJE = "acme/minilm", "acme/siglip", "acme/edje"
# Answers each of the inputs in argv[1] with where they came from, or with the error.
ASK = """
import json, sys
from edje.errors import CheckpointError
from edje.export.sources import locate
answers = []
for inputs in json.loads(sys.argv[1]):
    try:
        answers.append(locate(*inputs, lambda step: None).to_json())
    except CheckpointError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


@pytest.fixture
def cache(tmp_path: Path, official_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A prepared cache, as a user's who works with HF_HUB_OFFLINE=1."""
    from huggingface_hub import constants

    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    write_cache(folder, LM, files_of(official_tiny / "lm"))
    write_cache(folder, SIGLIP, files_of(official_tiny / "siglip"), commit=TAGGED)
    checkpoint = (official_tiny / "checkpoint_16.pth").read_bytes()
    write_cache(folder, EDJE, {"README.md": b"EDJE", "runs/checkpoint_16.pth": checkpoint})
    monkeypatch.chdir(tmp_path)
    return folder


def found(checkpoint: object, language: object, vision: object = None) -> Sources:
    return locate(checkpoint, language, vision, lambda step: None)  # type: ignore[arg-type]


def refusal(checkpoint: object, language: object, vision: object = None) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        found(checkpoint, language, vision)
    return caught.value


def test_names_in_the_cache_export_the_bundle_of_the_folders(cache, tmp_path, tiny_bundle):
    manifest = export_bundle(EDJE, LM, tmp_path / "bundle", vision_model=SIGLIP)
    local = BundleManifest.read(tiny_bundle)
    assert manifest.fingerprint_encoder == local.fingerprint_encoder
    assert manifest.fingerprint_scorer == local.fingerprint_scorer
    for name in ("joint_encoder.onnx", "image_encoder.onnx", "tokenizer.json"):
        assert (tmp_path / "bundle" / name).read_bytes() == (tiny_bundle / name).read_bytes()
    assert BundleManifest.read(tmp_path / "bundle").provenance["sources"] == {
        "checkpoint": {"repository": EDJE, "commit": COMMIT, "file": "runs/checkpoint_16.pth"},
        "language_model": {"repository": LM, "commit": COMMIT},
        "vision_model": {"repository": SIGLIP, "commit": TAGGED},
    }


def test_local_folders_are_named_in_the_provenance(tiny_bundle):
    assert BundleManifest.read(tiny_bundle).provenance["sources"] == {
        "checkpoint": {"file": "checkpoint_16.pth"},
        "language_model": {"folder": "lm"},
        "vision_model": {"folder": "siglip"},
    }


def test_a_name_may_be_a_path_object_and_may_carry_file_and_commit(cache):
    sources = found(f"{EDJE}@{COMMIT}:runs/checkpoint_16.pth", Path(LM), Path(SIGLIP))
    assert sources.checkpoint.path.name == "checkpoint_16.pth"
    assert sources.checkpoint.origin["revision"] == COMMIT
    assert sources.language_model.origin["commit"] == COMMIT


def test_a_local_path_wins_over_a_name(cache, official_tiny, tmp_path):
    for name, target in ((LM, official_tiny / "lm"), (EDJE, official_tiny)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(target)
    sources = found(f"{EDJE}:checkpoint_16.pth", LM)
    assert sources.checkpoint.path == Path(EDJE, "checkpoint_16.pth")
    assert sources.language_model.path == Path(LM)
    assert sources.to_json()["language_model"] == {"folder": "lm"}
    assert "is a folder, expected a checkpoint file" in refusal(EDJE, LM).message
    assert f"{EDJE}/none.pth does not exist" in refusal(f"{EDJE}:none.pth", LM).message


def test_all_three_are_told_at_once(cache, tmp_path):
    (tmp_path / "empty").mkdir()
    error = refusal("run/none.pth", "empty", "acme/nowhere@v2")
    assert "run/none.pth does not exist" in error.faults[2]
    assert "empty holds no config.json and no tokenizer.json or vocab.txt" in error.faults[0]
    assert "acme/nowhere@v2 is neither a path here nor whole in the" in error.faults[1]
    assert "HF_HUB_OFFLINE" in (error.hint or "")


@pytest.mark.parametrize(
    "text",
    ["/nonexistent", "./acme/minilm", "a/b/c", "minilm", "https://hf.co/acme/minilm", "a b/c"],
)
def test_what_cannot_be_a_name_is_looked_for_on_this_machine_only(cache, text):
    for error in (refusal(text, LM), refusal(EDJE, text), refusal(EDJE, LM, text)):
        assert f"{text} does not exist" in error.message
        assert "owner/name" in error.message


def test_files_where_folders_belong_are_told(cache, official_tiny):
    file = official_tiny / "lm" / "vocab.txt"
    assert "is a file, expected the language model's" in refusal(EDJE, file).message
    assert "is a file, expected the SigLIP model's" in refusal(EDJE, LM, file).message
    assert "does not exist" in refusal(EDJE, f"{LM}:vocab.txt").message


def test_a_cache_that_lacks_the_file_lists_what_it_has(cache):
    write_cache(cache, "acme/two", {"a.pth": b"", "b.pth": b"", "notes.txt": b""})
    message = refusal("acme/two", LM).message
    assert "the cache of acme/two holds 2 checkpoint files: got a.pth, b.pth" in message
    message = refusal("acme/two:c.pth", LM).message
    assert "the cache of acme/two holds no file c.pth: got a.pth, b.pth" in message
    assert found("acme/two:b.pth", LM).checkpoint.origin["file"] == "b.pth"


@pytest.fixture(scope="module")
def hub(official_tiny: Path) -> Iterator[Hub]:
    """A hub with everything that an export asks for, and what it may fail on."""
    weights = {"model.safetensors": b"x", "pytorch_model.bin": b"x", "README.md": b"x"}
    lm, siglip = files_of(official_tiny / "lm"), files_of(official_tiny / "siglip")
    with running_hub(
        {
            LM: Repository({**lm, **weights}),
            SIGLIP: Repository({**siglip, **weights}),
            EDJE: Repository({"a/one [1].pth": b"1", "README.md": b"", "log.txt": b""}),
            "acme/two": Repository({"a.pth": b"a", "b.pth": b"b"}),
            "acme/none": Repository({"README.md": b""}),
            "acme/gated": Repository(lm, gated=True),
            "acme/private": Repository(lm, token="hf_secret"),
        }
    ) as running:
        yield running


def ask(
    endpoint: str, folder: Path, *inputs: tuple[str | None, ...], cache: Path | None = None
) -> list[Any]:
    """Locate inputs in a process of its own, whose environment names the hub and the cache."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache or folder / "cache")}
    env["HF_HUB_OFFLINE"] = "0"
    command = [sys.executable, "-c", ASK, json.dumps(inputs)]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_only_the_files_that_an_export_reads_are_fetched(hub, tmp_path):
    hub.fetched.clear()
    (answer,) = ask(hub.endpoint, tmp_path, (EDJE, f"{LM}@v1", SIGLIP))
    assert answer == {
        "checkpoint": {"repository": EDJE, "commit": COMMIT, "file": "a/one [1].pth"},
        "language_model": {"repository": LM, "revision": "v1", "commit": TAGGED},
        "vision_model": {"repository": SIGLIP, "commit": COMMIT},
    }
    tokenizer = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
    assert sorted(hub.fetched) == sorted(
        [
            f"{EDJE}/a/one [1].pth",
            *(f"{LM}/{name}" for name in tokenizer),
            *(f"{SIGLIP}/{name}" for name in ("config.json", "preprocessor_config.json")),
        ]
    )
    fetched = len(hub.fetched)
    assert ask(hub.endpoint, tmp_path, (EDJE, f"{LM}@v1", SIGLIP)) == [answer]
    assert len(hub.fetched) == fetched, "the second time all of it is in the cache"


def test_what_the_hub_refuses_is_one_sentence_each(hub, tmp_path):
    faults = [
        ("acme/gone", "acme/gone is neither a path here nor a repository on the Hugging Face Hub"),
        ("acme/gated", "acme/gated is a gated repository, and its owner has not granted access"),
        (f"{LM}@v9", f"{LM} has no revision 'v9'"),
        ("acme/none", "holds no config.json and no tokenizer.json or vocab.txt"),
        ("acme/b--d", "neither a path here nor a repository on the Hugging Face Hub"),
    ]
    answers = ask(hub.endpoint, tmp_path, *((EDJE, name, None) for name, _ in faults))
    for answer, (_, sentence) in zip(answers, faults, strict=True):
        told, hint = answer.splitlines()
        assert sentence in told
        assert hint.startswith("Hint: ")


def test_a_repository_without_the_one_checkpoint_lists_its_files(hub, tmp_path):
    names = ("acme/two", "acme/two:c.pth", "acme/none", "acme/gone:c.pth")
    two, missing, none, gone = ask(hub.endpoint, tmp_path, *((name, LM, None) for name in names))
    assert "acme/two holds 2 checkpoint files: got a.pth, b.pth" in two
    assert "name the checkpoint: acme/two:FILE" in two
    assert "acme/two holds no file c.pth: got a.pth, b.pth" in missing
    assert "acme/none holds no checkpoint files: got README.md" in none
    assert "acme/gone:c.pth is neither a path here nor a repository" in gone


def test_a_private_repository_needs_the_token_that_the_environment_brings(
    hub, tmp_path, monkeypatch
):
    inputs = (EDJE, "acme/private", None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (answer,) = ask(hub.endpoint, tmp_path, inputs)
    assert "acme/private is neither a path here nor a repository" in answer
    assert "HF_TOKEN" in answer
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (answer,) = ask(hub.endpoint, tmp_path, inputs)
    assert answer["language_model"]["repository"] == "acme/private"


def test_a_checkpoint_is_fetched_only_once_the_models_are_there(hub, tmp_path):
    hub.fetched.clear()
    (answer,) = ask(hub.endpoint, tmp_path, ("acme/two:a.pth", LM, "acme/gone"))
    assert "acme/gone is neither" in answer
    assert "acme/two/a.pth" not in hub.fetched


def test_without_a_network_or_a_cache_to_write_the_address_or_folder_is_named(hub, tmp_path):
    (answer,) = ask("http://127.0.0.1:9", tmp_path, (EDJE, LM, SIGLIP))
    assert answer.count("cannot be fetched from http://127.0.0.1:9") == 3
    assert "HTTPS_PROXY" in answer
    (tmp_path / "file").write_text("")
    (answer,) = ask(hub.endpoint, tmp_path, (EDJE, LM, None), cache=tmp_path / "file")
    assert f"cannot write {LM} to the Hugging Face cache ({tmp_path / 'file'})" in answer
    assert "set HF_HUB_CACHE" in answer
