"""The page as a visitor has it: a real headless Chromium over a real server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image

from chromium import Chromium, chromium_path
from running_server import Running, running, settings_of

pytestmark = pytest.mark.skipif(chromium_path() is None, reason="no Chromium is installed")

QUERY = "a red circle"
MINUS = "\N{MINUS SIGN}"
IDS = [f"img-{number}" for number in range(12)]
DRAWN = "document.querySelectorAll('#grid .tile .open').length"
ORDER = "[...document.querySelectorAll('#grid .tile')].map((tile) => Number(tile.dataset.index))"
ANSWERED = "document.body.classList.contains('answered') && !document.body.matches('.busy')"
STILL = "document.getAnimations().every((one) => one.playState === 'finished')"
FOCUSED = "document.activeElement"
# Luminance and contrast: WCAG 2.2, section 1.4.3. Colours come as `rgb(r, g, b)`, or with alpha.
CONTRASTS = """(() => {
  const numbers = (color) => (color.match(/[\\d.]+/g) ?? []).map(Number);
  const bright = ([r, g, b]) => [r, g, b]
    .map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
  const ground = (node) => {
    for (let one = node; one; one = one.parentElement) {
      const color = numbers(getComputedStyle(one).backgroundColor);
      if (color.length === 3) return color;
    }
    return [255, 255, 255];
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const node = text.parentElement;
    if (!text.data.trim() || !node.checkVisibility() || node.closest('.unseen, .bare')) continue;
    const [a, b] = [numbers(getComputedStyle(node).color), ground(node)].map(bright);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${text.data.trim()}: ${ratio.toFixed(2)}`);
  }
  return low;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(7)
    for name in IDS:
        pixels = random.integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).resize((600, 400)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def shown(tiny_engine: Path, tiny_store: Path, images: Path) -> Iterator[Running]:
    with running(settings_of(tiny_engine, tiny_store, images=images)) as started:
        yield started


def visit(browser: Chromium, server: Running, motion: str = "reduce", **asked: object) -> None:
    """Open the page, with what its address asks for, and wait for the candidates."""
    browser.screen(1200, prefers_reduced_motion=motion)
    browser.open(f"{server.url}/#{urlencode(asked)}")
    browser.wait(f"{ANSWERED} && {STILL}" if "q" in asked else DRAWN)


def text(browser: Chromium, selector: str) -> str:
    found = browser.run(f"document.querySelector({json.dumps(selector)}).textContent")
    return " ".join(found.split())


def test_typing_a_query_and_enter_ranks_as_the_server_ranks(browser: Chromium, shown: Running):
    visit(browser, shown, "no-preference", n=12, seed=3)
    assert browser.run(ORDER) == list(range(12))
    browser.press("/")
    assert browser.run(f"{FOCUSED}.id") == "query"
    browser.type(QUERY)
    browser.press("Enter")
    browser.wait(f"{ANSWERED} && {STILL}")
    drawn = shown.ask("/page/candidates?count=12&seed=3").json()["ids"]
    body = {"query": QUERY, "documents": drawn, "raw_scores": True}
    results = shown.ask("/v2/rerank", body).json()["results"]
    assert browser.run(ORDER) == [one["index"] for one in results]
    for place, one in enumerate(results, 1):
        label = browser.run(
            f"document.querySelectorAll('#grid .open')[{place - 1}].getAttribute('aria-label')"
        )
        moved = one["index"] + 1 - place
        way = f"{'up' if moved > 0 else 'down'} {abs(moved)} from" if moved else "where it was"
        assert label.startswith(f"{place} of 12, {way}")
        assert drawn[one["index"]] in label
        logit = one["relevance_score"]
        assert label.endswith(f"logit {MINUS if logit < 0 else '+'}{abs(logit):.2f}")
        assert f"score {1 / (1 + np.exp(-logit)):.3f}" in label
    assert "12 pictures reranked" in text(browser, "#said")
    assert browser.problems == []


def test_the_stages_are_those_of_the_answers_header(browser: Chromium, shown: Running):
    visit(browser, shown, n=12, seed=3, q=QUERY)
    stage_of = ".map((part) => [part.dataset.stage, Number(part.style.flexGrow)])"
    parts = browser.run(f"[...document.querySelectorAll('#stages i')]{stage_of}")
    named = browser.run(f"[...document.querySelectorAll('#legend li i')]{stage_of}")
    assert [name for name, _ in named] == [name for name, _ in parts]
    assert {"tokenize", "compute"} <= {name for name, _ in parts}
    total = float(text(browser, "#total").split()[0])
    assert sum(share for _, share in parts) >= 0.97 * total
    rate = int(text(browser, "#rate").replace(",", ""))
    assert rate == pytest.approx(12 / total * 1e3, rel=0.01)
    assert "openvino fp32" in text(browser, "#facts")


def test_before_and_after_can_be_compared_and_the_best_is_found_again(
    browser: Chromium, shown: Running
):
    visit(browser, shown, n=12, seed=3, q=QUERY)
    after = browser.run(ORDER)
    browser.run("document.querySelector('input[name=order][value=before]').click()")
    browser.wait(STILL)
    assert browser.run(ORDER) == list(range(12))
    assert browser.run("Number(document.querySelector('.tile.best').dataset.index)") == after[0]
    browser.run("document.querySelector('input[name=order][value=after]').click()")
    browser.wait(STILL)
    assert browser.run(ORDER) == after
    threads = "[...document.querySelectorAll('#threads path')].map((p) => Number(p.dataset.index))"
    assert browser.run(threads) == after[::-1]


@pytest.mark.parametrize("wish", ["no-preference", "reduce"])
def test_tiles_move_unless_the_visitor_wants_no_motion(browser, shown, wish: str):
    visit(browser, shown, wish, n=12, seed=3, q=QUERY)
    moving = browser.run(
        "(document.querySelector('input[name=order][value=before]').click(),"
        " document.querySelectorAll('.tile.moving').length)"
    )
    assert (moving > 6) == (wish == "no-preference")


def test_the_pictures_are_shown_and_only_this_server_is_asked(browser: Chromium, shown: Running):
    visit(browser, shown, n=12, seed=3, q=QUERY)
    browser.wait("document.querySelectorAll('#grid .picture.loaded img').length === 12")
    sizes = "[...document.querySelectorAll('#grid img')].map((image) => image.naturalWidth)"
    assert set(browser.run(sizes)) == {320}
    assert {url.split("/")[2] for url in browser.asked} == {f"127.0.0.1:{shown.port}"}
    assert browser.problems == []


def test_without_pictures_a_plate_with_the_id_stands_for_each(browser: Chromium, server: Running):
    visit(browser, server, n=12, seed=3, q=QUERY)
    names = browser.run(
        "[...document.querySelectorAll('#grid .picture.bare .plate-name')]"
        ".filter((name) => name.checkVisibility()).map((name) => name.textContent)"
    )
    assert sorted(names) == sorted(IDS)
    assert not [url for url in browser.asked if "/images/" in url]
    assert browser.problems == []


def test_arrows_walk_among_the_pictures_and_enter_opens_one(browser: Chromium, shown: Running):
    visit(browser, shown, n=12, seed=3, q=QUERY)
    browser.run("document.querySelector('#grid .open[tabindex=\"0\"]').focus()")
    at = f"[...document.querySelectorAll('#grid .open')].indexOf({FOCUSED})"
    walked = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "Home"):
        browser.press(key)
        walked.append(browser.run(at))
    assert walked == [1, 2, 1, 11, 0]
    browser.press("ArrowRight")
    before = browser.run(f"{FOCUSED}.getBoundingClientRect().toJSON()")
    browser.press("ArrowDown")
    below = browser.run(f"{FOCUSED}.getBoundingClientRect().toJSON()")
    assert below["top"] > before["bottom"]
    assert abs(below["left"] - before["left"]) < 2
    assert browser.run(f"getComputedStyle({FOCUSED}).outlineStyle") == "solid"
    assert browser.run("document.querySelectorAll('#grid .open[tabindex=\"0\"]').length") == 1
    assert browser.run("document.querySelectorAll('#threads path.on').length") == 1
    opened = browser.run(f"{FOCUSED}.parentElement.dataset.index")
    browser.press("Enter")
    browser.wait("document.querySelector('dialog').open")
    drawn = shown.ask("/page/candidates?count=12&seed=3").json()["ids"]
    assert text(browser, "#detail-id") == drawn[int(opened)]
    browser.press("ArrowRight")
    assert text(browser, "#detail-id") != drawn[int(opened)]
    browser.press("Escape")
    browser.wait("!document.querySelector('dialog').open")
    assert browser.run(f"{FOCUSED}.matches('#grid .open')")
    assert browser.problems == []


def test_a_link_brings_back_the_same_answer_and_back_the_one_before(
    browser: Chromium, shown: Running
):
    visit(browser, shown, n=12, seed=3, q=QUERY)
    order, first = browser.run(ORDER), browser.run("location.hash")
    browser.run("document.getElementById('query').select()")
    browser.type("blue squares & <b>more</b>")
    browser.press("Enter")
    browser.wait(f"location.hash !== {json.dumps(first)} && {ANSWERED} && {STILL}")
    second = browser.run("location.hash")
    browser.open(f"{shown.url}/{second}")
    browser.wait(f"{ANSWERED} && {STILL}")
    assert browser.run("document.getElementById('query').value") == "blue squares & <b>more</b>"
    browser.open(f"{shown.url}/{first}")
    browser.wait(f"{ANSWERED} && {STILL}")
    assert browser.run(ORDER) == order
    browser.run("document.getElementById('query').select()")
    browser.type("something else")
    browser.press("Enter")
    browser.wait(f"location.hash !== {json.dumps(first)} && {ANSWERED} && {STILL}")
    browser.run("history.back()")
    asked = f"document.getElementById('query').value === {json.dumps(QUERY)}"
    browser.wait(f"{asked} && {ANSWERED} && {STILL}")
    assert browser.run(ORDER) == order
    assert browser.problems == []


def test_own_ids_are_ranked_and_a_refusal_is_told_in_the_servers_words(
    browser: Chromium, shown: Running
):
    visit(browser, shown, n=12, seed=3)
    browser.run("document.getElementById('own-open').click()")
    assert browser.run(f"{FOCUSED}.id") == "ids"
    browser.type("img-4\nimg-2\nimg-9")
    browser.run("document.getElementById('own-use').click()")
    browser.wait(f"{DRAWN} === 3")
    browser.run("document.getElementById('query').focus()")
    browser.type(QUERY)
    browser.press("Enter")
    browser.wait(f"{ANSWERED} && {STILL}")
    body = {"query": QUERY, "documents": ["img-4", "img-2", "img-9"]}
    results = shown.ask("/v2/rerank", body).json()["results"]
    assert browser.run(ORDER) == [one["index"] for one in results]
    assert browser.problems == []
    browser.open(f"{shown.url}/#{urlencode({'q': QUERY, 'ids': 'img-1 <i>x</i>'})}")
    browser.wait("!document.getElementById('error').hidden")
    refused = shown.ask("/v2/rerank", {"query": QUERY, "documents": ["img-1 <i>x</i>"]})
    assert text(browser, "#error-text") == refused.json()["message"]
    assert "422" in text(browser, "#error-more")


def test_a_server_with_keys_is_asked_with_the_key_of_this_tab(
    browser: Chromium, tiny_engine: Path, tiny_store: Path, images: Path
):
    settings = settings_of(tiny_engine, tiny_store, images=images, keys=("sesame",))
    with running(settings) as server:
        browser.screen(1200)
        browser.open(f"{server.url}/#{urlencode({'q': QUERY, 'n': 12, 'seed': 3})}")
        browser.wait("!document.getElementById('unlock').hidden")
        assert browser.problems == [], "nothing is asked before there is a key"
        browser.run("document.getElementById('key').focus()")
        browser.type("wrong")
        browser.press("Enter")
        browser.wait("!document.getElementById('error').hidden")
        assert text(browser, "#error-text") == "the API key is not known"
        browser.problems.clear()
        browser.run("document.getElementById('key').focus()")
        browser.type("sesame")
        browser.press("Enter")
        browser.wait(f"{ANSWERED} && {STILL}")
        browser.wait("document.querySelectorAll('#grid .picture.loaded').length === 12")
        sources = browser.run("[...document.querySelectorAll('#grid img')].map((i) => i.src)")
        assert all(source.startswith("blob:") for source in sources)
        kept = browser.run("[JSON.stringify(sessionStorage), JSON.stringify(localStorage)]")
        assert ("sesame" in kept[0], "sesame" in kept[1]) == (True, False)
        assert "sesame" not in browser.run("location.href")
        assert browser.problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 768, 1440])
def test_it_fits_every_screen_and_can_be_read_in_light_and_dark(
    browser: Chromium, shown: Running, server: Running, width: int, scheme: str
):
    for one in (shown, server):
        visit(browser, one, n=12, seed=3, q=QUERY)
        browser.screen(width, prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
        time.sleep(0.1)  # the drawing of the threads follows the width
        assert browser.run("document.documentElement.scrollWidth") == width
        wider = "[...document.querySelectorAll('main *, header *, footer *')].filter((one) =>"
        wider += " one.checkVisibility() && !one.closest('.unseen') &&"
        wider += " one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.className)"
        assert browser.run(wider) == []
        assert browser.run(CONTRASTS) == []
        small = "[...document.querySelectorAll('main *:not(svg *)')].filter((one) =>"
        small += " one.checkVisibility() && parseFloat(getComputedStyle(one).fontSize) < 13).length"
        assert browser.run(small) == 0
        assert browser.problems == []


def test_every_field_and_button_has_a_name(browser: Chromium, shown: Running):
    visit(browser, shown, n=12, seed=3, q=QUERY)
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "searchbox", "radio", "link", "group", "list"}
    unnamed = [
        node["role"]["value"]
        for node in nodes
        if not node["ignored"]
        and node["role"]["value"] in roles - {"list"}
        and not node.get("name", {}).get("value")
    ]
    assert unnamed == []
    names = [node.get("name", {}).get("value") for node in nodes]
    assert "What should the picture show?" in names
