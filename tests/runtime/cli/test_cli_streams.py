"""The command line on any stdout: other encodings, readers that leave, none at all; `--quiet`."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command

from edje.runtime.cli.app import EXIT_CODES, app, main
from edje.runtime.store import TokenStore

NAMES = ("größe-日本.png", "b.png")
ENCODINGS = ("ascii", "latin-1", "utf-8")
VERBS = [
    *("export", "build", "index", "rerank", "serve", "route", "verify", "doctor", "demo"),
    *(f"store {name}" for name in ("stat", "ids", "delete", "compact", "export", "import")),
    "store verify",
]
NO_JSON = ("demo", "serve", "route")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two images, one of them named in letters that few encodings have."""
    folder = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(NAMES):
        Image.new("RGB", (64, 48), (40 * number, 90, 200)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def store(photos: Path, tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of `photos`."""
    folder = tmp_path_factory.mktemp("store") / "photos.store"
    assert main(["-q", "index", str(tiny_engine), str(photos), "--store", str(folder)]) == 0
    return folder


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch):
    """Run the command line with streams of an encoding: `(code, stdout, stderr)`, both decoded."""

    def call(encoding: str, *args: object) -> tuple[int, str, str]:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        code = main([str(arg) for arg in args])
        told = []
        for stream in streams:
            stream.flush()
            assert isinstance(stream.buffer, io.BytesIO)
            told.append(stream.buffer.getvalue().decode(encoding))
        return code, told[0], told[1]

    return call


def shown_in(name: str, encoding: str) -> str:
    return name.encode(encoding, "backslashreplace").decode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_tables_show_any_id_in_any_encoding(printed, encoding, tiny_engine, store):
    code, out, err = printed(
        encoding, "rerank", tiny_engine, "--store", store, "--query", "a größe"
    )
    assert (code, err) == (0, "")
    assert shown_in(NAMES[0], encoding) in out
    assert NAMES[1] in out


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_is_the_same_document_in_any_encoding(printed, encoding, tiny_engine, store):
    common = ("--store", store, "--query", "größe 日本", "--json")
    code, out, _ = printed(encoding, "rerank", tiny_engine, *common)
    assert code == 0
    result = json.loads(out)
    assert result["query"] == "größe 日本"
    assert {hit["id"] for hit in result["hits"]} == set(NAMES)
    code, out, _ = printed(encoding, "store", "ids", store, "--json")
    assert (code, set(json.loads(out))) == (0, set(NAMES))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_lists_of_ids_are_utf_8_in_any_encoding(store, encoding):
    done = run("store", "ids", store, env={"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
    assert sorted(done.stdout.decode("utf-8").split()) == sorted(NAMES)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_progress_notes_and_errors_are_told_in_any_encoding(
    printed, encoding, tiny_engine, photos, tmp_path
):
    (tmp_path / "größe-日本.png").write_bytes(b"no image")
    Image.open(photos / "b.png").save(tmp_path / "b.png")
    place = tmp_path / "s.store"
    code, out, err = printed(encoding, "index", tiny_engine, tmp_path, "--store", place)
    assert code == 0, err
    assert "indexed" in out
    assert "2/2" in err, "the progress bar"
    assert shown_in("größe-日本.png", encoding) in err
    code, _, err = printed(encoding, "store", "delete", place, "größe-日本.png")
    assert code == 2
    assert shown_in("größe-日本.png", encoding) in err


def test_a_locale_without_unicode_takes_a_query_as_the_utf_8_that_it_is(tiny_engine, store):
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    query = ("rerank", tiny_engine, "--store", store, "--json", "--query")
    done = run(*query, "größe", env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["query"] == "größe"
    wrong = run(*query, b"gr\xf6sse", env=ascii_only)
    assert wrong.returncode == 2
    assert b"is not UTF-8 text" in wrong.stderr
    assert b"Traceback" not in wrong.stderr


def run(*args: object, env: dict[str, str] | None = None, stdout=subprocess.PIPE):
    """Run the command line in a process of its own."""
    words = [arg if isinstance(arg, bytes) else str(arg) for arg in args]
    command = [sys.executable, "-m", "edje", *words]
    env = {**os.environ, **(env or {})}
    return subprocess.run(command, env=env, stdout=stdout, stderr=subprocess.PIPE, check=False)


@pytest.mark.parametrize(
    "args", [("store", "ids", "STORE"), ("store", "stat", "STORE", "--json"), ("doctor",)], ids=str
)
def test_a_reader_that_leaves_early_ends_the_command_without_a_word(args, store):
    reading, writing = os.pipe()
    os.close(reading)  # as `head` does when it has seen enough
    done = run(*(store if arg == "STORE" else arg for arg in args), stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("args", [("--version",), ("doctor", "--json")])
def test_a_full_disk_under_stdout_is_one_sentence_that_names_it(args, unbuffered):
    with open("/dev/full", "wb") as full:
        done = run(*args, env={"PYTHONUNBUFFERED": unbuffered}, stdout=full)
    assert done.returncode == 2
    assert done.stderr == b"edje: stdout: No space left on device\n"


def test_a_closed_stdout_is_no_error(store):
    code = f"exec {sys.executable} -m edje store stat {store} --json >&-"
    done = subprocess.run(["sh", "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("place", ["before the verb", "after it"])
def test_quiet_leaves_results_and_drops_progress_and_notes(
    place, tiny_engine, photos, tmp_path, capfd
):
    (tmp_path / "none.png").write_bytes(b"no image")
    Image.open(photos / "b.png").save(tmp_path / "b.png")
    words = ["index", str(tiny_engine), str(tmp_path), "--store", str(tmp_path / "s.store")]
    words = ["-q", *words] if place == "before the verb" else [*words, "--quiet"]
    assert main(words) == 0
    quiet = capfd.readouterr()
    assert quiet.err == ""
    assert "num_skipped" in quiet.out
    assert main([word for word in words if word not in ("-q", "--quiet")]) == 0
    assert "'none.png' was skipped" in capfd.readouterr().err, "the next call is not quiet"


def test_quiet_leaves_errors(tiny_engine, tmp_path, capfd):
    damaged = tmp_path / "damaged.store"
    with TokenStore.create(damaged, num_tokens=64, hidden=32, fingerprint_encoder="0" * 64) as made:
        made.append(["a"], np.zeros((1, 64, 32), np.float16))
    (segment,) = (damaged / "segments").glob("*.tokens")
    with segment.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff")
    assert main(["store", "verify", "-q", str(damaged)]) == 1
    assert "damaged: " in capfd.readouterr().err
    assert main(["-q", "rerank", "/nonexistent", "--store", str(damaged), "--query", "x"]) == 2
    assert "/nonexistent" in capfd.readouterr().err


@pytest.mark.parametrize("verb", ["", "store", *VERBS])
def test_h_is_help_everywhere_with_quiet_json_and_an_example(verb, capfd):
    assert main([*verb.split(), "-h"]) == 0
    short = capfd.readouterr().out
    assert main([*verb.split(), "--help"]) == 0
    assert short == capfd.readouterr().out
    assert "-q, --quiet" in short
    assert "-h, --help" in short
    assert (f"Example:\n    edje {verb}" in short) == (verb in VERBS)
    assert ("--json" in short) == (verb in VERBS and verb not in NO_JSON)


def test_every_verb_is_tested_above():
    names = dict(get_command(app).commands)
    nested = [f"store {name}" for name in names.pop("store").commands]
    del names["bench"]  # hands on to the command line of `perf`, which has tests of its own
    assert sorted([*names, *nested]) == sorted(VERBS)


def test_the_exit_codes_are_in_the_help(capfd):
    assert main(["--help"]) == 0
    told = capfd.readouterr().out
    for line in EXIT_CODES.splitlines()[1:]:
        assert line.strip() in told
    for code in (0, 1, 2, 130, 141):
        assert f"\n    {code} " in told


@pytest.mark.parametrize(
    ("args", "meant"), [(("rernk",), "rerank"), (("store", "veryfy"), "verify")], ids=str
)
def test_a_misspelt_verb_is_told_what_was_meant(args, meant, capfd):
    assert main(list(args)) == 2
    assert f"Did you mean '{meant}'?" in capfd.readouterr().err


def test_the_shell_completes_verbs(capfd):
    asked = {"_EDJE_COMPLETE": "complete_bash", "COMP_WORDS": "edje re", "COMP_CWORD": "1"}
    assert run(env=asked).stdout.split() == [b"rerank"]
    assert main(["--help"]) == 0
    told = capfd.readouterr().out
    assert "--install-completion" in told
    assert "--show-completion" in told
