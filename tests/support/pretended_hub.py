"""The Hugging Face Hub as far as an export asks it: over HTTP on this machine, or as a cache."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TAGGED = "fedcba9876543210fedcba9876543210fedcba98"


@dataclass
class Repository:
    """Files by name, commits by branch or tag; `gated`: its files are refused.

    With a `token`, it is private to who brings it.
    """

    files: Mapping[str, bytes]
    refs: Mapping[str, str] = field(default_factory=lambda: {"main": COMMIT, "v1": TAGGED})
    gated: bool = False
    token: str | None = None


@dataclass
class Hub:
    """A running hub: its address, and the files that were asked of it as `repository/file`."""

    endpoint: str
    fetched: list[str]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_cache(
    cache: Path, name: str, files: Mapping[str, bytes], *, commit: str = COMMIT
) -> Path:
    """Lay out `files` as huggingface_hub caches a repository; return the snapshot's folder."""
    root = cache / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for file, content in files.items():
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = snapshot / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    return snapshot


@contextmanager
def running_hub(repositories: Mapping[str, Repository]) -> Iterator[Hub]:
    """Serve `repositories` on this machine, with the Hub's addresses, headers and error codes."""
    fetched: list[str] = []

    class Handler(_Handler):
        known = repositories
        log = fetched

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Hub(f"http://127.0.0.1:{server.server_port}", fetched)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    known: Mapping[str, Repository]
    log: list[str]

    def log_message(self, *args: object) -> None:
        """Stay quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if is_api else parts
        repository = self.known.get(f"{owner}/{name}")
        if repository is None or not self._may_read(repository):
            self._send(401, {"X-Error-Code": "RepoNotFound"}, b"Invalid username or password.")
            return
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repository.refs.get(revision, revision)
        if commit not in repository.refs.values():
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        elif is_api:
            self._send(200, {}, self._listing(repository, f"{owner}/{name}", commit, rest))
        else:
            self._file(repository, f"{owner}/{name}", commit, "/".join(rest[2:]))

    def _may_read(self, found: Repository) -> bool:
        return found.token is None or self.headers["Authorization"] == f"Bearer {found.token}"

    def _listing(self, found: Repository, name: str, commit: str, rest: list[str]) -> bytes:
        if rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
                for path, content in found.files.items()
            ]
            return json.dumps(entries).encode()
        siblings = [{"rfilename": path} for path in found.files]
        return json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode()

    def _file(self, found: Repository, name: str, commit: str, file: str) -> None:
        if found.gated:
            self._send(403, {"X-Error-Code": "GatedRepo"})
            return
        content = found.files.get(file)
        if content is None:
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        if self.command == "GET":
            self.log.append(f"{name}/{file}")
        self._send(200, {"X-Repo-Commit": commit, "ETag": f'"{_oid(content)}"'}, content)

    def _send(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
