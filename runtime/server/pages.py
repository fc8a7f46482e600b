"""The page at `/`: its files, the candidates that it draws, the pictures that it shows.

It asks `/v2/rerank` as everybody does. Its files need no API key; candidates and pictures do.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request, Response
from starlette.responses import FileResponse

from ...errors import StoreError
from ..store import TokenStore
from .host import Host
from .openapi import refused
from .pictures import THUMBNAIL_TYPE, Picture, Pictures, is_unchanged, width_for
from .refusals import Refusal

FOLDER = Path(__file__).parent / "page"
TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
# Path -> file.
FILES = {
    "/": "page.html",
    **{
        f"/page/{name}": name
        for name in ("page.css", "page.js", "api.js", "charts.js", "tiles.js", "icon.svg")
    },
}
# Nothing of another origin, no script or style inside the page.
CSP = (
    "default-src 'self'; img-src 'self' blob: data:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'self'; object-src 'none'"
)
MAX_CANDIDATES = 500
_T = TypeVar("_T")


def add_page(app: FastAPI, host: Host) -> None:
    """Add the page and what it asks for; read its files once."""
    for path, name in FILES.items():
        app.add_api_route(
            path, _file_route(name, host), methods=["GET", "HEAD"], include_in_schema=False
        )
    _add_candidates(app, host)
    _add_images(app, host)


def _file_route(name: str, host: Host) -> Callable[[Request], Any]:
    """Return the route of one of the page's files."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    text = text.replace("$needs_key", "yes" if host.settings.keys else "no")
    content, media_type = text.encode(), TYPES[Path(name).suffix]
    headers = {
        "etag": f'"{sha256(content).hexdigest()[:16]}"',
        "cache-control": "no-cache",  # kept, but asked for: a new version is seen at once
        "content-security-policy": CSP,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }

    async def file(request: Request) -> Response:
        if is_unchanged(request.headers, headers):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=f"{media_type}; charset=utf-8", headers=headers)

    return file


def _add_candidates(app: FastAPI, host: Host) -> None:
    """Add the sample of ids that a visitor begins with."""
    one_at_a_time = threading.Lock()  # the rows of 20 million records take 160 MB

    @app.get("/page/candidates", tags=["page"])
    def candidates(
        count: Annotated[int, Query(ge=1, le=MAX_CANDIDATES)] = 48,
        seed: Annotated[int, Query(ge=0, lt=1 << 53)] = 0,
    ) -> dict[str, Any]:
        """Draw ids of the store at random; the same seed draws the same ids of the same store."""
        with one_at_a_time:
            ids, total = _of_store(host, lambda store: _draw(store, count, seed)) or ([], None)
        return {
            "ids": ids,
            "seed": seed,
            "num_images": total,
            "pictures": host.settings.images is not None,
        }


def _draw(store: TokenStore, count: int, seed: int) -> tuple[list[str], int]:
    """Return `count` ids at random, and how many there are. 20 ms of a million records."""
    rows = store.live_rows()
    chosen = Random(seed).sample(range(len(rows)), min(count, len(rows)))
    return store.ids_of(rows[chosen]), len(rows)


def _add_images(app: FastAPI, host: Host) -> None:
    """Add the pictures, of ids that the store holds and no others."""
    folder, is_private = host.settings.images, bool(host.settings.keys)
    pictures = None if folder is None else Pictures(folder)
    # Decoding takes CPU time that rankings need: two at once, however many are asked for.
    threads = ThreadPoolExecutor(2, thread_name_prefix="edje-picture")

    def answer(image_id: str, width: int | None, request: Request) -> Response:
        if pictures is None:
            raise _no_picture("this server shows no pictures: `edje serve --images FOLDER` does")
        # A server without a store of its own cannot know which ids there are.
        is_known = _of_store(host, lambda store: image_id in store) is not False
        found = pictures.find(image_id) if is_known else None
        if found is None:
            raise _no_picture("there is no picture of this id")
        return _picture_response(pictures, found, width, request, is_private)

    @app.get(
        "/images/{image_id:path}",
        tags=["page"],
        response_class=Response,
        responses={
            200: {"content": {"image/*": {}}},
            304: {"description": "As the `If-None-Match` of the request has it."},
            **refused(_404="There is no picture of this id, or this server shows none."),
        },
    )
    async def image(
        request: Request, image_id: str, w: Annotated[int | None, Query(ge=1, le=1 << 14)] = None
    ) -> Response:
        """Return the picture of an id; with `w`, a smaller one at least so wide, if it can be."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(threads, answer, image_id, w, request)


def _picture_response(
    pictures: Pictures, found: Picture, asked: int | None, request: Request, is_private: bool
) -> Response:
    """Return a picture's file, its thumbnail, or that the browser has it already."""
    width = None if asked is None else width_for(asked)
    headers = found.headers(width, private=is_private)
    if is_unchanged(request.headers, headers):
        return Response(status_code=304, headers=headers)
    small = None if width is None else pictures.small(found, width)
    if small is not None:
        return Response(small, media_type=THUMBNAIL_TYPE, headers=headers)
    return FileResponse(
        found.path, media_type=found.media_type, headers=headers, stat_result=found.stat
    )


def _no_picture(why: str) -> Refusal:
    return Refusal(404, why, reason="not_found")


def _of_store(host: Host, ask: Callable[[TokenStore], _T]) -> _T | None:
    """Ask the store that is served now, once more where a reload closed it meanwhile.

    None: this server has no store itself.
    """
    service = host.service
    store = None if service is None else service.store
    try:
        return None if store is None else ask(store)
    except StoreError:
        if host.service is service:
            raise
        return _of_store(host, ask)
