"""The demo's figures, page and contact sheet: what they show, and what explains it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edje.demo.contact_sheet import HEAD, MARGIN, RIGHT, draw_contact_sheet
from edje.demo.evaluation import DemoResult, QueryResult, recall, spread
from edje.demo.page import write_page

NAMES = tuple(f"{number}.png" for number in range(6))
CAPTIONS = {name: f"caption <{name}>" for name in NAMES}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate(NAMES):
        Image.new("RGB", (288, 288), (40 * number, 90, 200)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def result() -> DemoResult:
    """Every second target comes first after reranking, none before."""
    before = (*NAMES[1:], NAMES[0])
    queries = [
        QueryResult(CAPTIONS[NAMES[0]], NAMES[0], before, NAMES if number % 2 else before)
        for number in range(8)
    ]
    result = DemoResult(queries, num_candidates=6, num_images=6, engine="openvino fp32")
    with result.step("rerank <all>") as detail:
        detail.append("64 pairs")
    return result


@pytest.fixture(scope="module")
def page(result: DemoResult, images: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "index.html"
    write_page(result, images, CAPTIONS, path)
    return path.read_text(encoding="utf-8")


def test_recall_counts_targets_among_the_first_k(result: DemoResult) -> None:
    orders = [("a", "b", "c"), ("b", "a", "c"), ("b", "c", "d"), ("x", "y", "a")]
    assert recall(orders, ["a"] * 4) == {"R@1": 25.0, "R@5": 75.0, "R@10": 75.0, "R@3": 75.0}
    assert recall([], [])["R@1"] == 0.0
    recalls = result.to_json()["recall"]
    assert [recalls[stage]["R@1"] for stage in ("first stage", "reranked")] == [0.0, 50.0]


@pytest.mark.parametrize(("total", "count"), [(1024, 12), (12, 12), (5, 12), (13, 12)])
def test_spread_shows_different_queries(total: int, count: int) -> None:
    shown = spread([QueryResult("", str(i), (), ()) for i in range(total)], count)
    assert len({query.target for query in shown}) == len(shown) == min(total, count)


def test_the_page_shows_both_orders_and_frames_the_right_image(page: str) -> None:
    assert page.count('src="data:image/png;base64,') == 8 * 2 * 5
    assert page.count('<figure class="right">') == 4  # first after reranking, sixth before
    assert "caption &lt;0.png&gt;" in page
    assert "rerank &lt;all&gt;" in page


def test_a_bar_fills_as_much_of_its_track_as_its_figure_says(page: str) -> None:
    bars = re.findall(
        r'<div class="bar[^"]*"><span><i style="width:([\d.]+)%"></i></span>'
        r"<b>([\d.]+)&nbsp;%</b></div>",
        page,
    )
    assert bars == [(share, share) for share in ("0.0", "50.0", "0.0", "50.0", "100.0", "100.0")]


def test_every_track_is_as_wide_as_the_others_whatever_stands_beside_it(page: str) -> None:
    (rule,) = re.findall(r"^\.bar \{(.*?)\}", page, re.M)
    columns = re.findall(r"grid-template-columns:minmax\(0, 1fr\) ([\d.]+)em", rule)
    assert len(columns) == 1, "the figure's column has one width, the track takes the rest"
    assert float(columns[0]) >= 4.5, "room for `100.0 %` in bold"
    assert "white-space:nowrap" in rule


def test_no_grid_can_grow_wider_than_the_screen(page: str) -> None:
    style = page.split("<style>")[1].split("</style>")[0]
    grids = re.findall(r"grid-template-columns:([^;}]*)", style)
    assert len(grids) >= 6
    loose = [grid for grid in grids if re.search(r"(?<!minmax\(0, )\b\d+fr", grid)]
    assert loose == ["1fr auto"], "`fr` alone is as wide as its content; here it is short words"
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page


def test_the_page_says_what_figures_rows_and_frames_mean(page: str) -> None:
    text = " ".join(re.sub(r"<[^>]*>", " ", page.split("<body>")[1]).split())
    assert "R@k: percent of the queries whose right image" in text
    assert "A row holds the first five images, best first; the right one is framed." in text
    assert "from 0.0&nbsp;% to 50.0&nbsp;%" in text


def test_no_text_is_smaller_than_14_px_and_nothing_needs_a_script(page: str) -> None:
    sizes = [float(size) for size in re.findall(r"font(?:-size)?:(?:clamp\()?([\d.]+)px", page)]
    assert min(sizes) >= 14
    assert "<script" not in page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_and_bars_can_be_told_from_what_they_stand_on(page: str, scheme: str) -> None:
    first, second = re.findall(r":root \{(.*?)\}", page)
    colors = dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", first if scheme == "light" else second))
    for ground in ("paper", "card"):
        for ink, least in (("ink", 7), ("soft", 4.5), ("right", 4.5), ("old", 3)):
            found = contrast(colors[ink], colors[ground])
            assert found >= least, f"{ink} on {ground}: {found:.2f}"


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours. Source: WCAG 2.2, section 1.4.3."""
    dark, light = sorted(luminance(color) for color in (one, other))
    return (light + 0.05) / (dark + 0.05)


def luminance(color: str) -> float:
    channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    low = channels <= 0.04045
    linear = np.where(low, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_the_contact_sheet_frames_the_right_image_and_says_so_above_the_first_row(
    result: DemoResult, images: Path, tmp_path: Path
) -> None:
    draw_contact_sheet(result, images, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (sheet[HEAD:] == RIGHT).all(-1).any(), "the right image of a row"
    head = sheet[:HEAD]
    framed = np.argwhere((head == RIGHT).all(-1))
    assert len(framed) > 100, "a sample of the frame"
    assert framed[:, 1].min() >= MARGIN
    lines = (head != head[0, 0]).any((1, 2))
    blocks = np.count_nonzero(np.diff(lines.astype(int)) == 1)
    assert blocks >= 5, "title, two lines of legend, the frame's line, the halves' names"
