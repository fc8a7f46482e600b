"""The contact sheet: twelve queries, the top five before and after reranking, as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .evaluation import DemoResult, QueryResult, spread

THUMB, GAP, MARGIN, ROW_TEXT, HEAD = 124, 10, 48, 44, 252
PAPER, INK, FAINT, RIGHT = (250, 249, 246), (28, 30, 36), (101, 106, 117), (21, 148, 84)
TOP = 5
BLOCK = TOP * THUMB + (TOP - 1) * GAP
MIDDLE = MARGIN + BLOCK + 56  # where the right half begins
WIDTH = MIDDLE + BLOCK + MARGIN
ROW = ROW_TEXT + THUMB + 30


def font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own typeface, so that every machine draws the same sheet."""
    return ImageFont.load_default(size)


def draw_contact_sheet(result: DemoResult, images: Path, target: Path, count: int = 12) -> None:
    """Write the sheet to `target`; the right image is framed in green wherever it stands."""
    shown = spread(result.queries, count)
    sheet = Image.new("RGB", (WIDTH, HEAD + ROW * len(shown) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_head(draw, result)
    for number, query in enumerate(shown):
        top = HEAD + number * ROW
        draw.text((MARGIN, top), query.caption, INK, font(20))
        _draw_strip(sheet, draw, query, query.before, images, (MARGIN, top + ROW_TEXT))
        _draw_strip(sheet, draw, query, query.after, images, (MIDDLE, top + ROW_TEXT))
    sheet.save(target, optimize=True)


def _draw_head(draw: ImageDraw.ImageDraw, result: DemoResult) -> None:
    """Draw the title and the legend: what figures, rows, halves and frames mean."""
    recalls = result.recalls()
    before, after = recalls["first stage"]["R@1"], recalls["reranked"]["R@1"]
    title = f"The right image first: from {before:.1f} % to {after:.1f} % of the queries"
    draw.text((MARGIN, 34), title, INK, font(38))
    legend = (
        f"A row is one of {len(result.queries):,} queries, its text above: taken at even "
        "distances, not chosen.",
        f"Left and right stand the first {TOP} of the same {result.num_candidates} candidates, "
        "best first.",
    )
    for number, line in enumerate(legend):
        draw.text((MARGIN, 96 + 30 * number), line, INK, font(20))
    swatch = (MARGIN + 1, 164, MARGIN + 27, 190)
    draw.rounded_rectangle(swatch, 6, outline=RIGHT, width=5)
    draw.text(
        (MARGIN + 40, 164), "the right image: the one that the text was written for", INK, font(20)
    )
    for left, words in ((MARGIN, "First stage"), (MIDDLE, "Reranked by EDJE")):
        draw.text((left, 208), f"{words}, top {TOP}", FAINT, font(20))


def _draw_strip(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    query: QueryResult,
    order: Sequence[str],
    images: Path,
    corner: tuple[int, int],
) -> None:
    left, top = corner
    for place, name in enumerate(order[:TOP]):
        x = left + place * (THUMB + GAP)
        with Image.open(images / name) as picture:
            small = picture.convert("RGB").resize((THUMB, THUMB), Image.Resampling.LANCZOS)
        sheet.paste(small, (x, top))
        right, bottom = x + THUMB, top + THUMB
        draw.rectangle((x - 1, top - 1, right, bottom), outline=(214, 212, 206))
        if name == query.target:
            frame = (x - 6, top - 6, right + 5, bottom + 5)
            draw.rounded_rectangle(frame, 8, outline=RIGHT, width=5)
