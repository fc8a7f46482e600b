"""`edje rerank`: what it writes and its exit code where not all candidates could be ranked."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edje.runtime.store import TokenStore


@pytest.fixture
def rerank(edje: Any, tiny_engine: Path, tiny_store: Path) -> Any:
    """Run the verb."""

    def call(*options: object, store: Path = tiny_store, engine: Path = tiny_engine) -> Any:
        return edje("rerank", engine, "--store", store, "--query", "a dog", *options)

    return call


@pytest.fixture
def lines(tmp_path: Path) -> Any:
    """Write a file of candidates."""

    def write(content: bytes) -> Path:
        (tmp_path / "ids.txt").write_bytes(content)
        return tmp_path / "ids.txt"

    return write


def test_where_every_candidate_is_missing_nothing_was_scored(rerank: Any, lines: Any) -> None:
    ghosts = ("--candidates", lines(b"ghost\nspectre\n"), "--missing", "skip")
    ran = rerank(*ghosts, "--json")
    assert (ran.code, ran.json["hits"], ran.json["num_scored"]) == (1, [], 0)
    assert "2 candidates are not in the store, none was scored" in ran.err
    assert rerank(*ghosts).code == 1


def test_strict_exits_with_1_where_a_candidate_is_missing(rerank: Any, lines: Any) -> None:
    common = ("--candidates", lines(b"img-1\nghost\n"), "--missing", "skip", "--json")
    assert rerank(*common).code == 0
    ran = rerank(*common, "--strict")
    assert (ran.code, len(ran.json["hits"])) == (1, 1)
    assert "1 candidate is not in the store, the others were scored" in ran.err


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf"], ids=repr)
def test_an_empty_list_of_candidates_is_nothing_scored(
    rerank: Any, lines: Any, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = rerank("--candidates", lines(content), "--json")
    assert (ran.code, ran.json["hits"]) == (1, [])
    assert ran.err.startswith("edje: nothing was scored: the list --candidates ")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert rerank("--candidates", "-").code == 1


def test_an_empty_store_is_nothing_scored(rerank: Any, tiny_store: Path, tmp_path: Path) -> None:
    with TokenStore.open(tiny_store) as full:
        shape, encoder = full.record_shape, full.fingerprint_encoder
    sizes = {"num_tokens": shape[0], "hidden": shape[1]}
    TokenStore.create(tmp_path / "empty", **sizes, fingerprint_encoder=encoder).close()
    ran = rerank("--json", store=tmp_path / "empty")
    assert (ran.code, ran.json["hits"]) == (1, [])
    assert ran.err == f"edje: nothing was scored: {tmp_path / 'empty'} holds no image\n"


def test_a_time_that_is_up_leaves_what_was_scored_and_exits_with_1(rerank: Any) -> None:
    ran = rerank("--timeout", "0", "--json")
    found = ran.json
    assert (ran.code, found["stopped"], found["hits"]) == (1, True, [])
    assert (found["num_scored"], found["num_asked"]) == (0, 12)
    table = rerank("--timeout", "0")
    assert (table.code, "0 of 12 images scored" in table.out) == (1, True)
    assert "--timeout 0: the request's deadline passed" in table.err
    assert "0 of 12 have a score" in table.err
    whole = rerank("--timeout", "600", "--json")
    assert (whole.code, whole.json["stopped"]) == (0, False)


def test_all_options_that_cannot_be_meant_are_told_by_their_names(rerank: Any) -> None:
    wrong = {"--timeout": "-1", "--top-k": "0", "--num-threads": "0", "--missing": "no"}
    more = {"--residency": "ram", "--resident-gb": "-1", "--rescore-margin": "-1"}
    ran = rerank(*(word for option in (wrong | more).items() for word in option))
    assert (ran.code, ran.out) == (2, "")
    for option in wrong | more:
        assert f"- {option} is " in ran.err
    for name in ("timeout_s", "max_bytes", "top_k", "num_threads", "rescore_margin"):
        assert name not in ran.err


def test_a_store_and_an_engine_that_are_swapped_are_told_so(
    rerank: Any, tiny_engine: Path, tiny_store: Path
) -> None:
    ran = rerank(engine=tiny_store, store=tiny_engine)
    assert ran.code == 2
    assert f"other way round: edje rerank {tiny_engine} --store {tiny_store}" in ran.err


def test_control_characters_of_ids_reach_no_terminal(
    rerank: Any, tiny_store: Path, tmp_path: Path
) -> None:
    odd = "a\x1b[31mb\nc\r\x9bd\u2028é"
    with TokenStore.open(tiny_store) as full:
        sizes = {"num_tokens": full.record_shape[0], "hidden": full.record_shape[1]}
        encoder = full.fingerprint_encoder
    with TokenStore.create(tmp_path / "odd", **sizes, fingerprint_encoder=encoder) as store:
        store.append([odd], np.ones((1, *sizes.values()), np.float16))
    table = rerank(store=tmp_path / "odd")
    assert table.code == 0
    assert "a\\x1b[31mb\\nc\\r\\x9bd\\u2028é" in table.out
    assert "\x1b" not in table.out
    assert rerank("--json", store=tmp_path / "odd").json["hits"][0]["id"] == odd
