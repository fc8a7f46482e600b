"""Shards as deployments of a local Ray: the order of one reranker, and a replica that is killed.

Needs the extra `cluster-serve`; skips with the reason where `ray.serve` cannot be imported.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from socket import socket
from typing import Any

import pytest

from edje import Reranker
from sharded import cut

try:
    import ray
    from ray import serve

    from edje.runtime.server.route.ray_serve import APP, application
except ImportError as missing:
    pytest.skip(f"ray.serve cannot be imported: {missing}", allow_module_level=True)

from edje.runtime.server.settings import FrontSettings
from running_server import settings_of

pytestmark = pytest.mark.slow

IDS = [f"img-{number}" for number in range(12)]
QUERY = "a red circle"


def ask(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=60) as answer:
        return json.load(answer)


def is_ready(url: str) -> bool:
    try:
        return bool(ask(f"{url}/readyz")["ready"])
    except OSError:
        return False


@pytest.fixture(scope="module")
def url(
    tiny_engine: Path, tiny_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """An ingress before three shards of two replicas each."""
    folder = tmp_path_factory.mktemp("parts")
    stores = [cut(tiny_store, IDS[at::3], folder / str(at)) for at in range(3)]
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        shards = [settings_of(tiny_engine, store) for store in stores]
        serve.run(application(shards, FrontSettings(), copies=2, num_cpus=1), name=APP)
        where = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 60
        while not is_ready(where):
            assert time.monotonic() < until
            time.sleep(0.1)
        yield where
    finally:
        serve.shutdown()
        ray.shutdown()


def test_a_killed_replica_loses_no_request(url: str, tiny_engine: Path, tiny_store: Path) -> None:
    with Reranker.open(tiny_engine, store=tiny_store, num_threads=1) as whole:
        expected = [hit.index for hit in whole.rank(QUERY, IDS)]
    found: list[list[int]] = []

    def ask_often() -> None:
        for _ in range(30):
            body = {"query": QUERY, "documents": IDS}
            results = ask(f"{url}/v2/rerank", body)["results"]
            found.append([result["index"] for result in results])

    threads = [threading.Thread(target=ask_often) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(found) < 10:
        time.sleep(0.01)
    actors = ray.util.list_named_actors(all_namespaces=True)
    victim = next(one for one in actors if "#shard-1#" in one["name"])
    ray.kill(ray.get_actor(victim["name"], namespace=victim["namespace"]))
    for thread in threads:
        thread.join()
    assert found == [expected] * 90


def test_unknown_ids_are_named(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(f"{url}/v2/rerank", {"query": QUERY, "documents": ["img-1", "who"]})
    with refused.value as error:
        assert error.code == 422
        assert "'who' is not in the store" in error.read().decode()
