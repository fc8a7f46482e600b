"""The demo's figures: recall, the even spread of shown queries, the page and the sheet."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from edje.demo import scenes
from edje.demo.contact_sheet import WIDTH, draw_contact_sheet
from edje.demo.evaluation import DemoResult, QueryResult, recall, spread
from edje.demo.page import write_page


@pytest.fixture
def pool(tmp_path: Path) -> dict[str, str]:
    """Eight pictures on disk, with the caption of each."""
    (tmp_path / "images").mkdir()
    captions = {}
    for number, scene in enumerate(next(scenes.groups(1))):
        captions[f"{number}.png"] = scene.caption
        scenes.render(scene, size=96).save(tmp_path / "images" / f"{number}.png")
    return captions


@pytest.fixture
def result(pool: dict[str, str]) -> DemoResult:
    names = tuple(pool)
    queries = [QueryResult(pool[n], n, names, (n, *(m for m in names if m != n))) for n in names]
    result = DemoResult(
        queries, num_candidates=8, num_images=8, pairs_per_s=123.4, bytes_per_image=16384
    )
    with result.step("rerank <all>") as detail:
        detail.append("64 pairs")
    return result


def test_recall_counts_targets_among_the_first_k() -> None:
    orders = [("a", "b", "c"), ("b", "a", "c"), ("b", "c", "d"), ("x", "y", "a")]
    found = recall(orders, ["a"] * 4)
    assert found == {"R@1": 25.0, "R@5": 75.0, "R@10": 75.0, "R@3": 75.0}


def test_recall_of_nothing_is_zero() -> None:
    assert recall([], [])["R@1"] == 0.0


@pytest.mark.parametrize(("total", "count"), [(1024, 12), (12, 12), (5, 12), (13, 12)])
def test_spread_shows_different_queries(total: int, count: int) -> None:
    queries = [QueryResult("", str(i), (), ()) for i in range(total)]
    shown = spread(queries, count)
    assert len({query.target for query in shown}) == len(shown) == min(total, count)


def test_recalls_compare_the_two_orders(result: DemoResult) -> None:
    recalls = result.recalls()
    assert recalls["first stage"]["R@1"] == 12.5
    assert recalls["reranked"]["R@1"] == 100.0
    assert result.to_json()["recall"] == recalls


class Page(HTMLParser):
    """Counts what a reader would see."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.framed, self.text = 0, 0, ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.images += tag == "img" and str(values["src"]).startswith("data:image/png;base64,")
        self.framed += tag == "figure" and values.get("class") == "right"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_shows_both_orders_and_frames_the_right_image(
    result: DemoResult, pool: dict[str, str], tmp_path: Path
) -> None:
    write_page(result, tmp_path / "images", pool, tmp_path / "index.html")
    page = Page()
    page.feed((tmp_path / "index.html").read_text())
    assert page.images == 8 * 2 * 5
    right_before = sum(query.target in query.before[:5] for query in result.queries)
    assert page.framed == right_before + 8
    assert "from 12.5" in page.text
    assert "rerank <all>" in page.text


def test_sheet_frames_the_right_image(
    result: DemoResult, pool: dict[str, str], tmp_path: Path
) -> None:
    draw_contact_sheet(result, tmp_path / "images", tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == WIDTH
        assert (21, 148, 84) in {color for _, color in sheet.getcolors(1 << 24) or []}
