"""Folders are published whole or not at all, and what was there survives every failure."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edje import folders
from edje.errors import EdjeError
from edje.folders import publish_folder


def listing(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def publish_half(target: Path, error: type[BaseException]) -> None:
    with publish_folder(target, overwrite=True) as folder:
        (folder / "half.txt").write_text("half")
        raise error


def test_a_block_that_ends_well_publishes_everything(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with publish_folder(target) as folder:
        assert not target.exists()
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
    assert listing(tmp_path) == {"deep/target/sub/a.txt": "a"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("there", [False, True])
def test_a_block_that_fails_leaves_what_was_there(
    tmp_path: Path, error: type[BaseException], there: bool
) -> None:
    target = tmp_path / "target"
    if there:
        target.mkdir()
        (target / "old.txt").write_text("old")
    before = listing(tmp_path)
    with pytest.raises(error):
        publish_half(target, error)
    assert listing(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["target"] if there else [])


def test_an_existing_folder_is_replaced_only_on_demand(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(EdjeError, match="--overwrite"), publish_folder(target):
        pytest.fail("the block must not run")
    assert listing(tmp_path) == {"target/old.txt": "old"}
    with publish_folder(target, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
    assert listing(tmp_path) == {"target/new.txt": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_a_swap_that_fails_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old.txt").write_text("old")
    rename, calls = os.rename, []

    def second_fails(source: object, destination: object) -> None:
        calls.append(destination)
        if len(calls) == 2:
            raise OSError("no space")
        rename(source, destination)  # type: ignore[arg-type]

    monkeypatch.setattr(folders.os, "rename", second_fails)
    with pytest.raises(OSError, match="no space"), publish_folder(target, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
    assert listing(tmp_path) == {"target/old.txt": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_others_may_read_a_published_folder(tmp_path: Path) -> None:
    with publish_folder(tmp_path / "target"):
        pass
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(EdjeError, match=r"cannot write .*target"),
        publish_folder(tmp_path / "file" / "target"),
    ):
        pytest.fail("the block must not run")
