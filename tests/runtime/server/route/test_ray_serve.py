"""`edje serve --ray` with three shards: the order of one reranker, and a replica that is killed.

Needs the extra `cluster-serve`; skips with the reason where `ray.serve` cannot be imported.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edje import Reranker
from edje.perf.server_process import ServerProcess, serving
from running_server import settings_of
from sharded import cut
from waiting import wait_until

try:
    from edje.runtime.server.route import ray_serve
except ImportError as missing:
    pytest.skip(f"ray.serve cannot be imported: {missing}", allow_module_level=True)

pytestmark = pytest.mark.slow

IDS = [f"img-{number}" for number in range(12)]
QUERY = "a red circle"


@pytest.fixture(scope="module")
def server(
    tiny_engine: Path, tiny_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """An ingress before three shards of two replicas each; they ask Ray for 1.75 CPUs."""
    folder = tmp_path_factory.mktemp("parts")
    first, *others = (cut(tiny_store, IDS[at::3], folder / str(at)) for at in range(3))
    more = [word for store in others for word in ("--store", str(store))]
    on_ray = ("--ray", "--copies", "2", "--ray-cpus", "0.25", "--num-threads", "1")
    with serving(tiny_engine, first, *more, *on_ray, has_admin=False) as started:
        yield started


def rerank(server: ServerProcess, documents: list[str]) -> tuple[int, bytes]:
    return server.ask("/v2/rerank", {"query": QUERY, "documents": documents})


def replica_of(server: ServerProcess, shard: int) -> int:
    """Return the process of one replica, among those that the server started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            named = (folder / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if f"ServeReplica:edje:shard-{shard}".encode() in named and is_below(server.pid, folder):
            return int(folder.name)
    raise AssertionError(f"shard {shard} has no process")


def is_below(pid: int, folder: Path) -> bool:
    """Whether a process descends from another."""
    while folder.name not in ("0", "1", str(pid)):
        parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        folder = folder.with_name(parent)
    return folder.name == str(pid)


def test_a_killed_replica_loses_no_request(
    server: ServerProcess, tiny_engine: Path, tiny_store: Path
) -> None:
    with Reranker.open(tiny_engine, store=tiny_store, num_threads=1) as whole:
        expected = [hit.index for hit in whole.rank(QUERY, IDS)]
    found: list[list[int] | tuple[int, bytes]] = []

    def ask_often() -> None:
        for _ in range(30):
            status, body = rerank(server, IDS)
            order = [one["index"] for one in json.loads(body)["results"]] if status == 200 else []
            found.append(order or (status, body))

    threads = [threading.Thread(target=ask_often) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(found) >= 10)
    os.kill(replica_of(server, 1), signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert found == [expected] * 90
    assert "some wait until nodes come" not in server.log_text(), "two cores are enough"


def test_unknown_ids_are_named(server: ServerProcess) -> None:
    status, body = rerank(server, ["img-1", "who"])
    assert status == 422
    assert b"'who' is not in the store" in body


def test_drain_is_the_time_that_replicas_have_to_end(
    tiny_engine: Path, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, float] = {}
    deployment = ray_serve.serve.deployment

    def noting(**options: Any) -> Any:
        given[options["name"]] = options["graceful_shutdown_timeout_s"]
        return deployment(**options)

    monkeypatch.setattr(ray_serve.serve, "deployment", noting)
    settings = settings_of(tiny_engine, tiny_store)
    ray_serve.application([settings, settings], settings, drain_s=7.5)
    assert given == {"shard-0": 7.5, "shard-1": 7.5, "ingress": 7.5}


def test_sigterm_ends_it_in_order(server: ServerProcess) -> None:
    """The last test of this file: the others share the server."""
    assert rerank(server, IDS)[0] == 200
    replicas = [replica_of(server, shard) for shard in range(3)]
    assert server.end() == 0
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in replicas), "all to end")
