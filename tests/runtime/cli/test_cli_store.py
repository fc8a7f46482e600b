"""`edje store`: every verb's way, exit codes, and one clear sentence for bad input."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edje.runtime.store import TokenStore

SIZES = {"num_tokens": 4, "hidden": 6, "fingerprint_encoder": "sha256:tower"}
IDS = ["a.png", "b/é.png", "c.png"]


Edje = Callable[..., Any]


@pytest.fixture(name="edje")
def edje_store(edje: Edje) -> Edje:
    """Run `edje store ...`: `edje("stat", path)`."""
    return partial(edje, "store")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three records."""
    tokens = np.arange(3 * 24, dtype=np.float16).reshape(3, 4, 6)
    with TokenStore.create(tmp_path / "s", **SIZES) as opened:
        opened.append(IDS, tokens)
    return tmp_path / "s"


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        value = file.read(1)[0] ^ 1
        file.seek(offset)
        file.write(bytes([value]))


def test_stat_says_what_it_holds_and_who_made_it(edje: Edje, store: Path) -> None:
    edje("delete", store, "a.png")
    facts = edje("stat", store, "--json").json
    assert facts["fingerprint_encoder"] == "sha256:tower"
    assert facts["created_by"].startswith("edje-runtime ")
    assert (facts["num_records"], facts["num_deleted"], facts["num_segments"]) == (2, 1, 1)
    assert facts["compact_frees_bytes"] == 4096
    table = edje("stat", store)
    assert (table.code, "sha256:tower" in table.out, table.err) == (0, True, "")


def test_ids_go_through_a_file_into_delete(
    edje: Edje, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = edje("ids", store)
    assert listed.out == "a.png\nb/é.png\nc.png\n"
    assert edje("ids", store, "--json").json == IDS
    gone = tmp_path / "gone.txt"
    gone.write_text("a.png\n\nb/é.png\r\n", encoding="utf-8")
    facts = edje("delete", store, "--from", gone, "--json").json
    assert facts == {"store": str(store), "num_deleted": 2, "num_records": 1}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"c.png\n")))
    assert "num_records  0" in edje("delete", store, "--from", "-").out
    assert edje("ids", store).out == ""


def test_ids_that_no_line_can_hold_need_json(edje: Edje, tmp_path: Path) -> None:
    ids = ["x\ny", " ", "z\r", "good"]
    with TokenStore.create(tmp_path / "s", **SIZES) as opened:
        opened.append(ids, np.zeros((4, 4, 6), np.float16))
    ran = edje("ids", tmp_path / "s")
    assert (ran.code, ran.out) == (2, "")
    assert "3 ids cannot stand on a line of their own" in ran.err
    assert edje("ids", tmp_path / "s", "--json").json == ids


def du(folder: Path) -> int:
    shown = subprocess.run(["du", "-s", "-B1", folder], capture_output=True, text=True, check=True)
    return int(shown.stdout.split()[0])


def test_compact_says_what_waits_for_readers(edje: Edje, store: Path) -> None:
    edje("delete", store, "a.png", "c.png")
    segment = (store / "segments/000001.tokens").stat().st_blocks * 512
    with TokenStore.open(store):
        before = du(store)
        ran = edje("compact", store, "--json")
        assert ran.json["freed_bytes"] == before - du(store)
        assert ran.json["waiting_bytes"] == segment
        assert f"{ran.json['waiting_bytes']:,} bytes more come free" in ran.err
    before = du(store)
    ran = edje("compact", store, "--json")
    assert ran.json["freed_bytes"] == before - du(store) > 0
    assert "come free" not in ran.err


def test_compact_gives_space_back(edje: Edje, store: Path) -> None:
    edje("delete", store, "a.png", "c.png", "a.png")
    before = du(store)
    facts = edje("compact", store, "--json").json
    assert (facts["num_moved"], facts["num_dropped"]) == (1, 1)
    assert facts["freed_bytes"] == before - du(store)
    assert edje("stat", store, "--json").json["num_deleted"] == 0
    assert edje("compact", store, "--max-dead-share", "0.5").code == 0


def test_export_and_import(edje: Edje, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    ran = edje("export", store, "--out", out, "--json")
    assert (ran.json["num_records"], ran.json["num_shards"]) == (3, 1)
    assert "export" in ran.err, "the progress bar"
    again = edje("export", store, "--out", out)
    assert (again.code, "exists already" in again.err) == (2, True)
    assert "num_shards" in edje("export", store, "--out", out, "--overwrite").out
    new = tmp_path / "new"
    assert edje("import", new, out, "--dtype", "int8", "--json").json["num_added"] == 3
    assert edje("import", new, out, "--json").json["num_present"] == 3
    with TokenStore.open(new) as opened:
        assert (opened.ids(), opened.layout.dtype) == (IDS, "int8")
    other = edje("import", tmp_path / "other", out, "--fingerprint", "sha256:else")
    assert (other.code, "encoder sha256:tower, expected sha256:else" in other.err) == (2, True)


def test_verify_exits_with_1_until_damage_is_repaired(
    edje: Edje, store: Path, tmp_path: Path
) -> None:
    clean = edje("verify", store, "--json")
    assert (clean.code, clean.json["is_clean"], clean.json["bad"]) == (0, True, [])
    segment = store / "segments/000001.tokens"
    flip(segment, 2 * 4096)
    flip(segment, 5)
    found = edje("verify", store)
    assert found.code == 1
    assert "segment 1: its header page is damaged" in found.err
    bad = tmp_path / "bad.txt"
    mended = edje("verify", store, "--repair", "--bad-ids", bad)
    assert mended.code == 0
    assert "id 'b/é.png' (segment 1, row 1): its bytes do not fit" in mended.err
    assert "1 damaged records were taken out" in mended.err
    assert bad.read_text(encoding="utf-8") == "b/é.png\n"
    last = edje("verify", store, "--json", "--bad-ids", bad)
    assert (last.code, last.json["num_checked"]) == (0, 2)
    assert bad.read_text() == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("stat", "NOWHERE"), "there is no token store"),
        (("verify", "NOWHERE"), "there is no token store"),
        (("verify", "NOWHERE", "--repair"), "there is no token store"),
        (("ids", "NOWHERE"), "there is no token store"),
        (("export", "STORE"), "--out"),
        (("export", "STORE", "--out", "OUT", "--shard-mb", "0"), "--shard-mb is 0"),
        (("import", "STORE", "NOWHERE"), "there is no"),
        (("import", "STORE", "STORE"), r"holds no .safetensors"),
        (("delete", "STORE"), "no ids to delete were given"),
        (("delete", "STORE", "nothing.png", "a.png"), "1 id is not in the store: 'nothing.png'"),
        (("delete", "STORE", "--from", "NOWHERE"), "cannot read "),
        (("compact", "STORE", "--max-dead-share", "2"), "max_dead_share is 2"),
    ],
)
def test_bad_input_is_one_clear_sentence_and_exit_code_2(
    edje: Edje, store: Path, tmp_path: Path, args: tuple[str, ...], message: str
) -> None:
    places = {"STORE": store, "NOWHERE": tmp_path / "nowhere", "OUT": tmp_path / "out"}
    ran = edje(*(places.get(arg, arg) for arg in args))
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]
    with TokenStore.open(store) as opened:
        assert opened.ids() == IDS


def test_export_of_a_damaged_store_names_the_command_that_mends_it(
    edje: Edje, store: Path, tmp_path: Path
) -> None:
    flip(store / "segments/000001.tokens", 4096 + 5)
    ran = edje("export", store, "--out", tmp_path / "shards")
    assert ran.code == 2
    assert f"`edje store verify --repair {store}` takes them out" in ran.err
    assert "read(" not in ran.err
