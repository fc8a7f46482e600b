"""Ids and the files behind them are the same in every locale."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from edje.runtime.indexing.flow import read_skipped
from edje.runtime.store import TokenStore
from mean_bundle import FEATURE_DIM, make_bundle

NAME = "é日.png"
NO_UTF_8 = b"\xe9.png"
ASCII = {
    **{name: value for name, value in os.environ.items() if name != "LANG"},
    "LC_ALL": "C",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONUTF8": "0",
}


def index_in_ascii(folder: Path, *source: str) -> tuple[list[str], dict[str, str]]:
    """Index in a process that takes names for ASCII; return the store's ids and the skips."""
    bundle = make_bundle(folder / "bundle")
    command = [sys.executable, "-m", "edje", "index", bundle, *source, "--store", "s"]
    ran = subprocess.run(command, cwd=folder, env=ASCII, capture_output=True)
    assert ran.returncode == 0, ran.stderr
    with TokenStore.open(folder / "s") as store:
        return store.ids(), {entry.id: entry.reason for entry in read_skipped(folder / "s")}


def write_image(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (5, 5)).save(path)


def test_an_id_of_a_folder_is_the_utf_8_of_the_name(tmp_path: Path) -> None:
    write_image(tmp_path / "bilder-ü" / NAME)
    write_image(tmp_path / "bilder-ü" / os.fsdecode(NO_UTF_8))
    ids, skipped = index_in_ascii(tmp_path, "bilder-ü")
    assert ids == [NAME]
    assert skipped == {
        "\\udce9.png": "its name cannot be an id: it has no UTF-8 form (a lone surrogate)"
    }
    (entry,) = read_skipped(tmp_path / "s")
    assert entry.source == str(tmp_path / "bilder-ü")


def test_the_paths_of_a_list_are_utf_8(tmp_path: Path) -> None:
    write_image(tmp_path / NAME)
    (tmp_path / "list-ü.tsv").write_text(f"日\t{NAME}\n", encoding="utf-8")
    assert index_in_ascii(tmp_path, "list-ü.tsv") == (["日"], {})


def test_an_id_of_a_tar_is_the_utf_8_of_the_members_name(tmp_path: Path) -> None:
    write_image(tmp_path / NAME)
    content = (tmp_path / NAME).read_bytes()
    with tarfile.open(tmp_path / "ü.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in (NAME, os.fsdecode(NO_UTF_8)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (tmp_path / "ü.tar").write_bytes((tmp_path / "ü.tar").read_bytes()[:2048])  # no mark of its end
    ids, skipped = index_in_ascii(tmp_path, "ü.tar")
    assert ids == [NAME]
    assert sorted(skipped) == ["\\udce9.png", "ü.tar"]


def test_an_id_of_features_is_the_utf_8_of_the_name(tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    np.save(tmp_path / "features/é日.npy", np.ones((3, FEATURE_DIM), np.float16))
    assert index_in_ascii(tmp_path, "--features", "features") == (["é日"], {})
