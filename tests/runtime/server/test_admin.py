"""The operator's port: state, and a reload that answers once it is done."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import httpx

from edje.runtime.server.admin import make_admin_app
from edje.runtime.server.host import Host
from running_server import Running, running, settings_of


def ask(host: Host, method: str, path: str) -> httpx.Response:
    async def send() -> Any:
        transport = httpx.ASGITransport(make_admin_app(host))
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
            return await client.request(method, path)

    return asyncio.run(send())


def test_the_state_names_what_is_served_and_how_much_waits(server: Running):
    state = ask(server.host, "GET", "/state").json()
    assert state["ready"] is True
    assert state["num_pairs"] == 0
    assert Path(state["engine"]).is_dir()


def test_a_reload_answers_with_the_new_generation_or_why_there_is_none(
    tiny_engine, tiny_store, tmp_path
):
    engine = tmp_path / "engine"
    shutil.copytree(tiny_engine, engine)
    with running(settings_of(engine, tiny_store)) as server:
        done = ask(server.host, "POST", "/reload")
        assert (done.status_code, done.json()) == (200, {"reloaded": True, "generation": 2})
        shutil.rmtree(engine)
        failed = ask(server.host, "POST", "/reload")
        assert failed.status_code == 500
        assert str(engine) in failed.json()["error"], "the operator may see paths"
        assert server.ask("/readyz").json() == {"ready": True, "generation": 2}


def test_metrics_are_on_the_operators_port_too(server: Running):
    assert b"edje_ready 1.0" in ask(server.host, "GET", "/metrics").content
