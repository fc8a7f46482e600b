"""The page's files, the candidates that it draws, and the pictures of ids: found safely."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from edje.runtime.reranker import Reranker
from edje.runtime.server import ScoringService
from edje.runtime.store import TokenStore
from running_server import GivenSettings, Running, running, settings_of

IDS = [f"img-{number}" for number in range(12)]
FILES = {
    "/": "text/html; charset=utf-8",
    "/page/page.css": "text/css; charset=utf-8",
    "/page/page.js": "text/javascript; charset=utf-8",
    "/page/api.js": "text/javascript; charset=utf-8",
    "/page/charts.js": "text/javascript; charset=utf-8",
    "/page/tiles.js": "text/javascript; charset=utf-8",
    "/page/icon.svg": "image/svg+xml; charset=utf-8",
}
NESTED = "a folder/später?#50%.jpg"
KEY = {"authorization": "Bearer sesame"}
# What an attacker may ask for; each is the path of the file beside the pictures.
ESCAPES = (
    "../secret.png",
    "a folder/../../secret.png",
    "..%2fsecret.png",
    "%2e%2e/secret.png",
    "%2e%2e%2fsecret.png",
    "..%252fsecret.png",
    "....//secret.png",
    "\\..\\secret.png",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of some ids, beside a file that none may see."""
    folder = tmp_path_factory.mktemp("pictures") / "images"
    (folder / "a folder").mkdir(parents=True)
    for number, suffix in enumerate((".png", ".JPG", ".webp", ".gif", ".bmp")):
        picture = Image.new("RGB", (400 + number, 200), (40 * number, 90, 200))
        picture.save(folder / f"img-{number}{suffix.lower()}")
    (folder / "img-1.jpg").rename(folder / "img-1.jpeg")
    Image.new("RGB", (50, 40), "red").save(folder / NESTED)
    Image.new("RGB", (9, 9), "green").save(folder.parent / "secret.png")
    (folder / "img-6").symlink_to(folder.parent / "secret.png")
    (folder / "img-6.png").symlink_to(folder.parent / "secret.png")
    (folder / "img-7.png").write_bytes(b"this is no picture")
    (folder / "img-8.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "img-9.png").mkdir()
    return folder


@pytest.fixture(scope="module")
def store(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny store's records and some more, under ids that have pictures or should have none."""
    folder = tmp_path_factory.mktemp("page-store") / "store"
    with TokenStore.open(tiny_store) as old:
        tokens = np.empty((3, *old.record_shape), np.float16)
        old.read(old.live_rows()[:3], tokens)
        everything = np.empty((len(old), *old.record_shape), np.float16)
        old.read(old.live_rows(), everything)
        with TokenStore.create(
            folder,
            num_tokens=old.record_shape[0],
            hidden=old.record_shape[1],
            fingerprint_encoder=old.fingerprint_encoder,
        ) as new:
            new.append(old.ids(), everything)
            new.append([NESTED, "../secret.png", "a folder/../../secret.png"], tokens)
    return folder


@pytest.fixture(scope="module")
def shown(tiny_engine: Path, store: Path, images: Path) -> Iterator[Running]:
    """A server with pictures."""
    with running(settings_of(tiny_engine, store, images=images)) as started:
        yield started


@pytest.mark.parametrize("path", FILES)
def test_a_file_of_the_page_says_what_it_is_and_what_it_may_load(server: Running, path: str):
    reply = server.ask(path)
    assert (reply.status, reply.headers["content-type"]) == (200, FILES[path])
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'self'; img-src 'self' blob: data:;")
    assert "unsafe" not in policy
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["cache-control"] == "no-cache"
    again = server.ask(path, headers={"if-none-match": reply.headers["etag"]})
    assert (again.status, again.body) == (304, b"")
    head = server.ask(path, method="HEAD")
    assert (head.status, head.body) == (200, b"")
    assert int(head.headers["content-length"]) == len(reply.body)


def test_the_page_loads_nothing_from_elsewhere_and_has_no_script_or_style_inside(server: Running):
    html = server.ask("/").body.decode()
    assert re.findall(r"<script(?![^>]* src=)", html) == []
    assert re.findall(r"<style|\sstyle=|\son\w+=|javascript:", html) == []
    assert "$" not in html, "a placeholder was left"
    for path in FILES:
        text = server.ask(path).body.decode()
        addresses = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text)
        assert [one for one in addresses if "www.w3.org" not in one] == []
    linked = set(re.findall(r'(?:src|href)="(?:\./)?(page/[^"]*)"', html))
    assert {f"/{name}" for name in linked} == FILES.keys() - {"/"}


def test_one_seed_draws_the_same_ids_and_another_others(server: Running):
    first = server.ask("/page/candidates?count=6&seed=5").json()
    assert first == server.ask("/page/candidates?count=6&seed=5").json()
    assert (first["seed"], first["num_images"], first["pictures"]) == (5, 12, False)
    assert len(set(first["ids"])) == 6
    assert set(first["ids"]) <= set(IDS)
    draws = [server.ask(f"/page/candidates?count=6&seed={seed}").json()["ids"] for seed in range(8)]
    assert len(set(map(tuple, draws))) > 4
    assert sorted(server.ask("/page/candidates?count=500").json()["ids"]) == sorted(IDS)


def test_what_was_drawn_can_be_ranked_and_deleted_ids_are_not_drawn(
    tiny_engine: Path, tiny_store: Path, store: Path, tmp_path: Path
):
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    with TokenStore.open(copy, mode="a") as changed:
        changed.delete(IDS[:4])
    with running(settings_of(tiny_engine, copy)) as server:
        drawn = server.ask("/page/candidates?count=100").json()["ids"]
        assert sorted(drawn) == sorted({*IDS[4:], NESTED, *ESCAPES[:2]})
        ranked = server.ask("/v2/rerank", {"query": "red", "documents": drawn}).json()["results"]
        assert len(ranked) == len(drawn)


def test_an_empty_store_draws_nothing(tiny_engine: Path, tiny_store: Path, tmp_path: Path):
    with TokenStore.open(tiny_store) as old:
        layout = old.layout
    TokenStore.create(
        tmp_path / "empty",
        num_tokens=layout.num_tokens,
        hidden=layout.hidden,
        fingerprint_encoder=layout.fingerprint_encoder,
    ).close()
    with running(settings_of(tiny_engine, tmp_path / "empty")) as server:
        drawn = server.ask("/page/candidates?count=5").json()
        assert (drawn["ids"], drawn["num_images"]) == ([], 0)


class StorelessService(ScoringService):
    """Scores, but has no store to tell of, as a router of shards."""

    store = None


def test_a_server_without_a_store_draws_nothing_and_shows_what_the_folder_has(
    tiny_engine: Path, tiny_store: Path, images: Path
):
    with Reranker.open(tiny_engine, store=tiny_store, num_threads=1) as reranker:
        settings = GivenSettings(opens=lambda: StorelessService(reranker), images=images)
        with running(settings) as server:
            drawn = server.ask("/page/candidates?count=5").json()
            assert (drawn["ids"], drawn["num_images"], drawn["pictures"]) == ([], None, True)
            assert server.ask("/images/img-0").status == 200
            assert server.ask("/images/..%2fsecret.png").status == 404


@pytest.mark.parametrize("asked", ["count=0", "count=501", "count=x", "seed=-1", "seed=1e99"])
def test_a_count_that_cannot_be_is_refused_in_the_one_body(server: Running, asked: str):
    reply = server.ask(f"/page/candidates?{asked}")
    told = reply.json()
    assert reply.status == 422
    assert told["message"] == told["error"]["message"]
    assert told["message"].startswith(asked.partition("=")[0])


@pytest.mark.parametrize(
    ("image_id", "kind", "size"),
    [
        ("img-0", "image/png", (400, 200)),
        ("img-1", "image/jpeg", (401, 200)),
        ("img-2", "image/webp", (402, 200)),
        ("img-3", "image/gif", (403, 200)),
        ("img-4", "image/bmp", (404, 200)),
        (NESTED, "image/jpeg", (50, 40)),
    ],
)
def test_the_picture_of_an_id_comes_whole_or_small(shown: Running, image_id, kind, size):
    path = f"/images/{quote(image_id)}"
    whole = shown.ask(path)
    assert (whole.status, whole.headers["content-type"]) == (200, kind)
    assert whole.headers["x-content-type-options"] == "nosniff"
    assert Image.open(io.BytesIO(whole.body)).size == size
    small = shown.ask(f"{path}?w=100")
    assert (small.status, small.headers["content-type"]) == (200, "image/webp")
    width = min(160, size[0])
    assert Image.open(io.BytesIO(small.body)).size == (width, round(size[1] * width / size[0]))


def test_a_small_picture_stands_upright(tiny_engine: Path, tiny_store: Path, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (800, 400), "red").save(tmp_path / "img-0.jpg", exif=exif)
    Image.new("RGBA", (800, 400), (9, 9, 9, 0)).save(tmp_path / "img-1.png")
    Image.new("CMYK", (800, 400)).save(tmp_path / "img-2.jpg")
    with running(settings_of(tiny_engine, tiny_store, images=tmp_path)) as server:
        turned, clear, print_ = (
            Image.open(io.BytesIO(server.ask(f"/images/img-{i}?w=320").body)) for i in range(3)
        )
    assert turned.size == (160, 320)
    assert (clear.size, clear.mode) == ((320, 160), "RGBA")
    assert print_.size == (320, 160)


def test_what_pillow_cannot_read_comes_as_it_is(shown: Running):
    reply = shown.ask("/images/img-7?w=200")
    assert (reply.status, reply.body) == (200, b"this is no picture")
    assert reply.headers["content-type"] == "image/png"


def test_a_browser_keeps_a_picture_until_it_changes(
    tiny_engine: Path, tiny_store: Path, tmp_path: Path
):
    picture = tmp_path / "img-0.png"
    Image.new("RGB", (30, 30), "red").save(picture)
    with running(settings_of(tiny_engine, tiny_store, images=tmp_path)) as server:
        for path in ("/images/img-0", "/images/img-0?w=320"):
            reply = server.ask(path)
            assert reply.headers["cache-control"] == "public, max-age=3600"
            tag, date = reply.headers["etag"], reply.headers["last-modified"]
            for headers in ({"if-none-match": f'"old", {tag}'}, {"if-modified-since": date}):
                kept = server.ask(path, headers=headers)
                assert (kept.status, kept.body) == (304, b"")
                assert kept.headers["etag"] == tag
            before = format_datetime(datetime(2001, 1, 1, tzinfo=timezone.utc), usegmt=True)
            for headers in (
                {"if-none-match": '"old"', "if-modified-since": date},
                {"if-modified-since": before},
                {"if-modified-since": "yesterday"},
            ):
                assert server.ask(path, headers=headers).status == 200
        first = server.ask("/images/img-0?w=320")
        assert first.headers["etag"] != server.ask("/images/img-0").headers["etag"]
        Image.new("RGB", (30, 30), "blue").save(picture)
        later = (datetime.now(timezone.utc) + timedelta(seconds=9)).timestamp()
        os.utime(picture, (later, later))
        second = server.ask("/images/img-0?w=320", headers={"if-none-match": first.headers["etag"]})
        assert (second.status, second.body == first.body) == (200, False)


@pytest.mark.parametrize(
    ("image_id", "why"),
    [
        ("img-5", "an id without a picture"),
        ("nobody", "no id of the store"),
        ("img-0.png", "a file whose name is no id of the store"),
        ("img-6", "a link that leads outside"),
        ("img-8", "an SVG, which can hold a script"),
        ("img-9", "a folder"),
        ("%00", "a zero byte"),
        ("x" * 3000, "too long a name"),
        ("/etc/passwd", "a path from the root"),
        *((escape, "a path that leads outside") for escape in ESCAPES),
    ],
)
def test_what_is_no_picture_of_an_id_is_not_found(shown: Running, image_id: str, why: str):
    for asked in (image_id, f"{image_id}?w=320"):
        reply = shown.ask(f"/images/{asked.replace(' ', '%20')}")
        assert reply.status == 404, why
        told = reply.json()
        assert told["message"] == told["error"]["message"] == "there is no picture of this id"


def test_the_ids_that_lead_outside_are_in_the_store_and_can_be_ranked(shown: Running):
    """Else the test above would hold by the store alone, not by the folder."""
    documents = list(ESCAPES[:2])
    assert shown.ask("/v2/rerank", {"query": "red", "documents": documents}).status == 200


def test_a_server_without_pictures_says_how_to_get_them(server: Running):
    reply = server.ask("/images/img-0")
    assert reply.status == 404
    assert "--images" in reply.json()["message"]


def test_with_keys_the_page_is_open_and_candidates_and_pictures_are_not(
    tiny_engine: Path, tiny_store: Path, images: Path
):
    settings = settings_of(tiny_engine, tiny_store, images=images, keys=("sesame",))
    with running(settings) as server:
        for path in FILES:
            assert server.ask(path).status == 200
        assert b'data-needs-key="yes"' in server.ask("/").body
        for path in ("/page/candidates", "/images/img-0", "/images/img-0?w=320", "/page/", "//"):
            assert server.ask(path).status == 401, path
        assert len(server.ask("/page/candidates", headers=KEY).json()["ids"]) == 12
        picture = server.ask("/images/img-0", headers=KEY)
        assert (picture.status, picture.headers["cache-control"]) == (200, "private, max-age=3600")


def test_without_keys_the_page_asks_for_none(server: Running):
    assert b'data-needs-key="no"' in server.ask("/").body


def test_the_candidates_and_pictures_are_those_of_the_store_after_a_reload(
    tiny_engine: Path, store: Path, images: Path, tmp_path: Path
):
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    with running(settings_of(tiny_engine, copy, images=images)) as server:
        assert server.ask("/images/img-0").status == 200
        with TokenStore.open(copy, mode="a") as changed:
            changed.delete(["img-0"])
        server.host.reload()
        assert server.ask("/images/img-0").status == 404
        assert "img-0" not in server.ask("/page/candidates?count=100").json()["ids"]
