"""The page at `/docs` tells every route, and needs nothing from elsewhere."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser

from edje.runtime.server.docs import docs_page
from running_server import Running


class Read(HTMLParser):
    """Collects elements that load something, and checks that what is opened is closed."""

    def __init__(self, html: str):
        super().__init__()
        self.loading: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe") or "src" in dict(attributes):
            self.loading.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_loads_nothing_and_names_every_route(server: Running) -> None:
    reply = server.ask("/docs")
    assert (reply.status, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    html = reply.body.decode()
    read = Read(html)
    assert (read.loading, read.open) == ([], [])
    assert re.findall("https?://", html) == []
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    told = set(re.findall("<code>([A-Z]+ [^<]+)</code>", unescape(html)))
    paths = server.ask("/openapi.json").json()["paths"]
    assert told == {f"{verb.upper()} {path}" for path, verbs in paths.items() for verb in verbs}
    assert "query: string" in html
    assert "top_n?: integer | null,  # Null and 0 are all." in html


def test_names_of_the_document_are_text() -> None:
    operation = {"summary": "<script>", "responses": {"200": {"description": "<b>"}}}
    info = {"title": "<i>", "version": "1"}
    html = docs_page({"info": info, "paths": {"/<u>": {"get": operation}}})
    assert not {"<script>", "<i>", "<u>"} & set(re.findall("<[a-z]+>", html))
