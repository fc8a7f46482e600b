"""A router asks its shards over TLS, with their key, and no shard whose certificate is unknown."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from running_server import Running, running, settings_of
from sharded import routing

IDS = [f"img-{number}" for number in range(12)]
BODY = {"query": "a red circle", "documents": IDS}
INNER, OUTER = "the-shards-key", "a-clients-key"


def make_certificate(folder: Path, name: str) -> Path:
    """Make a certificate that signs itself, for an address or a host; its key is in the file."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    made, key = folder / f"{name}.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=edje", "-addext", f"subjectAltName={name}"),
            *("-out", str(made), "-keyout", str(key)),
        ],
        check=True,
        capture_output=True,
    )
    made.write_text(made.read_text() + key.read_text())
    return made


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("certificate"), "IP:127.0.0.1")


@pytest.fixture(scope="module")
def shard(tiny_engine: Path, tiny_store: Path, certificate: Path) -> Iterator[Running]:
    """A server that speaks TLS and wants a key."""
    settings = settings_of(tiny_engine, tiny_store, keys=(INNER,))
    with running(settings, certificate=certificate) as started:
        yield started


def trust(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust what a certificate signed, as an operator lets the router do."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))


def why_not_ready(router: Running) -> str:
    reply = router.ask("/readyz")
    assert reply.status == 503
    refused = router.ask("/rerank", BODY)
    assert refused.status == 503
    assert b"certificate" not in refused.body, "what is wrong inside is the operator's"
    return str(reply.json()["why"])


def test_scores_come_over_tls_with_the_shards_key(
    shard: Running, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(certificate, monkeypatch)
    assert shard.url.startswith("https:")
    with routing([shard.url], shard_key=INNER, keys=(OUTER,)) as router:
        assert router.ask("/readyz").status == 200
        bearer = {"authorization": f"Bearer {OUTER}"}
        reply = router.ask("/rerank", BODY, headers=bearer)
        assert reply.status == 200
        assert len(reply.json()["results"]) == len(IDS)
        for wrong in (None, {"authorization": f"Bearer {INNER}"}):
            assert router.ask("/rerank", BODY, headers=wrong).status == 401


@pytest.mark.parametrize("key", [None, OUTER])
def test_without_the_shards_key_it_is_not_ready(
    key: str | None, shard: Running, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(certificate, monkeypatch)
    with routing([shard.url], shard_key=key) as router:
        assert "401" in why_not_ready(router)


def test_a_certificate_that_nobody_trusts_is_refused(shard: Running) -> None:
    with routing([shard.url], shard_key=INNER) as router:
        assert "certificate verify failed" in why_not_ready(router)


def test_a_certificate_of_another_host_is_refused(
    tiny_engine: Path, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_certificate(tmp_path, "DNS:other.example")
    trust(other, monkeypatch)
    with (
        running(settings_of(tiny_engine, tiny_store), certificate=other) as shard,
        routing([shard.url]) as router,
    ):
        assert "certificate verify failed" in why_not_ready(router)
