"""The page at `/docs`: the OpenAPI document as a person reads it, without any script.

FastAPI's own page loads Swagger UI from another origin, which many networks do not let through.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere; }
h1, h2 { line-height: 1.2; letter-spacing: -0.02em; }
h2 { margin: 2.5rem 0 0.5rem; text-transform: capitalize; }
details { border: 1px solid GrayText; border-radius: 10px; margin: 0.5rem 0; }
summary { padding: 0.6rem 0.9rem; cursor: pointer; }
summary code { display: block; font-weight: 600; }
details > div { padding: 0 0.9rem 0.8rem; }
pre { overflow-x: auto; padding: 0.7rem; border-radius: 8px; border: 1px dashed GrayText; }
dt { font-weight: 600; } dd { margin: 0 0 0.4rem 1.2rem; }
"""
_STYLE_HASH = b64encode(sha256(_STYLE.encode()).digest()).decode()
HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def docs_page(document: Mapping[str, Any]) -> str:
    """Return the HTML of an OpenAPI document: its routes by tag, what each takes and answers."""
    by_tag: dict[str, dict[str, list[str]]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            tag = operation.get("tags", ["other"])[0]
            text = _operation(operation, document)  # routes of one text are told once
            by_tag.setdefault(tag, {}).setdefault(text, []).append(f"{method.upper()} {path}")
    title = escape(document["info"]["title"])
    sections = "".join(
        f"<h2>{escape(tag)}</h2>" + "".join(_route(paths, text) for text, paths in routes.items())
        for tag, routes in by_tag.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}: the API</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>"
        f"<h1>{title} {escape(document['info']['version'])}</h1>"
        f"<p>{escape(document['info'].get('summary', ''))} This page as "
        f'<a href="openapi.json">openapi.json</a>, for tools.</p>{sections}</body></html>'
    )


def _route(paths: list[str], text: str) -> str:
    names = "".join(f"<code>{escape(path)}</code>" for path in paths)
    what, _, rest = text.partition("\n")
    return f"<details><summary>{names}{what}</summary><div>{rest}</div></details>"


def _operation(operation: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """Return the HTML of one operation; its first line says what it does."""
    what = operation.get("description") or operation["summary"]
    parts = [escape(" ".join(what.split())) + "\n"]
    parameters = operation.get("parameters", [])
    if parameters:
        named = (
            f"<dt>{escape(one['name'])} ({one['in']})</dt>"
            f"<dd>{escape(_shape(one['schema'], document))}</dd>"
            for one in parameters
        )
        parts.append(f"<p>Parameters:</p><dl>{''.join(named)}</dl>")
    if "requestBody" in operation:
        parts.append(f"<p>Takes:</p>{_content(operation['requestBody'], document)}")
    for status, answer in operation["responses"].items():
        parts.append(f"<p><b>{escape(status)}</b> {escape(answer['description'])}</p>")
        if status.startswith("2"):
            parts.append(_content(answer, document))
    return "".join(parts)


def _content(holder: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """Return what a body may be, by media type."""
    return "".join(
        f"<pre>{escape(kind)}\n{escape(_shape(found['schema'], document))}</pre>"
        for kind, found in holder.get("content", {}).items()
        if found.get("schema")
    )


def _shape(schema: Mapping[str, Any], document: Mapping[str, Any], indent: str = "") -> str:
    """Return a JSON schema in short: `{query: string, ...}`, a `?` where a field may be missing."""
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    for name in ("anyOf", "oneOf"):
        if name in schema:
            return " | ".join(_shape(each, document, indent) for each in schema[name])
    if "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema["enum"])
    kind = schema.get("type", "any")
    if kind == "array":
        return f"[{_shape(schema.get('items', {}), document, indent)}, ...]"
    if kind != "object" or not schema.get("properties"):
        return kind if isinstance(kind, str) else " | ".join(kind)
    required, deeper = schema.get("required", ()), indent + "  "
    lines = []
    for name, inner in schema["properties"].items():
        note = f"  # {inner['description']}" if "description" in inner else ""
        mark = "" if name in required else "?"
        lines.append(f"{deeper}{name}{mark}: {_shape(inner, document, deeper)},{note}\n")
    return "{\n" + "".join(lines) + indent + "}"
