"""`edje serve`: options are checked before anything is opened, in the words of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def serve(edje: Any, tiny_engine: Path, tiny_store: Path) -> Any:
    """Run the verb with options that it must refuse."""

    def call(*options: object, engine: Path = tiny_engine, store: Path = tiny_store) -> Any:
        ran = edje("serve", engine, "--store", store, *options)
        assert ran.code == 2
        return ran.err

    return call


def test_every_wrong_option_is_named_at_once(serve: Any) -> None:
    told = serve(
        *("--port", 70000, "--unknown-ids", "guess", "--timeout", -1, "--max-batch", 0),
        *("--residency", "moon"),
    )
    for name in ("--port", "--unknown-ids", "--timeout", "--max-batch", "--residency"):
        assert f"{name} is " in told


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--id-pattern", "("), "id_pattern '(' is no expression"),
        (("--images", "nowhere"), "nowhere is no folder"),
        (("--api-keys", "nowhere"), "cannot read the API keys nowhere"),
        (("--max-pairs-per-key", 0), "max_pairs_per_key is 0"),
        (("--max-body-mb", 2, "--max-bodies-mb", 1), "max_bodies_bytes is 1000000, expected 2"),
        (("--ray-cpus", 0.5), "--ray-cpus: only with --ray"),
        (("--ray", "--ray-cpus", 1.5), "--ray-cpus is 1.5, expected a whole number"),
        (("--ray", "--admin-port", 9000), "--admin-port: not with --ray"),
        (("--ray", "--grace", 1), "--grace: not with --ray"),
        (("--ray", "--port", 0), "--port 0: not with --ray"),
        (("--ray", "--device", "cuda_core"), "--device cuda_core: not with --ray"),
    ],
)
def test_settings_that_cannot_be_meant(serve: Any, options: tuple[object, ...], fault: str) -> None:
    assert fault in serve(*options)


def test_an_engine_that_is_none_and_a_store_that_is_none(serve: Any, tmp_path: Path) -> None:
    assert "engine.json" in serve(engine=tmp_path)
    assert "store.json" in serve(store=tmp_path)


def test_the_help_shows_an_example(edje: Any) -> None:
    ran = edje("serve", "--help")
    assert ran.code == 0
    assert "edje serve engine --store photos.store" in ran.out
