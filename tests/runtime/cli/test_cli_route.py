"""`edje route`: options are checked before any shard is asked; the process serves and ends."""

from __future__ import annotations

from typing import Any


def test_every_wrong_option_is_named_at_once(edje: Any) -> None:
    ran = edje("route", "--shard", "http://a:1", "--port", 70000, "--unknown-ids", "guess")
    assert ran.code == 2
    for name in ("--port", "--unknown-ids"):
        assert f"{name} is " in ran.err


def test_urls_that_are_none_are_named(edje: Any) -> None:
    ran = edje("route", "--shard", "http://a:1,nowhere", "--shard", "http://a:1")
    assert ran.code == 2
    assert "'nowhere' is no URL" in ran.err
    assert "http://a:1 is named twice" in ran.err


def test_the_help_shows_an_example(edje: Any) -> None:
    ran = edje("route", "--help")
    assert ran.code == 0
    assert "edje route --shard http://a:8000,http://a2:8000 --shard http://b:8000" in ran.out


def test_several_stores_need_ray_or_a_router(edje: Any, tiny_engine: Any, tiny_store: Any) -> None:
    ran = edje("serve", tiny_engine, "--store", tiny_store, "--store", tiny_store)
    assert ran.code == 2
    assert "several stores or copies need --ray" in ran.err
