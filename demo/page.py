"""`demo-out/index.html`: the demo's result as one self-contained page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from PIL import Image

from .evaluation import CUTOFFS, DemoResult, QueryResult, spread

TEMPLATE = Path(__file__).with_name("page.html")
TOP = 5
THUMB = 144


def write_page(result: DemoResult, images: Path, captions: Mapping[str, str], target: Path) -> None:
    """Write the page to `target`; thumbnails are inside it, so it can be sent as one file."""
    recalls = result.recalls()
    before, after = recalls["first stage"]["R@1"], recalls["reranked"]["R@1"]
    thumbnails = Thumbnails(images, captions)
    shown = spread(result.queries, 12)
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        headline=f"The right image first: from {before:.1f}&nbsp;% to {after:.1f}&nbsp;%",
        lead=_lead(result),
        bars="".join(_bars(recalls, k) for k in CUTOFFS),
        tiles=_tiles(result),
        num_queries=f"{len(result.queries):,}",
        queries="\n".join(_card(query, thumbnails) for query in shown),
        steps="".join(_row(s.name, f"{s.seconds:.1f} s", s.detail) for s in result.steps),
        conditions="".join(
            f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>"
            for key, value in result.conditions.items()
        ),
    )
    target.write_text(page, encoding="utf-8")


class Thumbnails:
    """Image files as `<figure>` elements with the picture inside."""

    def __init__(self, images: Path, captions: Mapping[str, str]):
        self._images, self._captions = images, captions

    def figure(self, name: str, *, right: bool) -> str:
        with Image.open(self._images / name) as picture:
            small = picture.convert("RGB").resize((THUMB, THUMB), Image.Resampling.LANCZOS)
        data = io.BytesIO()
        small.quantize(64).save(data, "PNG", optimize=True)
        source = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        caption = html.escape(self._captions[name], quote=True)
        kind = ' class="right"' if right else ""
        return f'<figure{kind}><img src="{source}" alt="{caption}" title="{caption}"></figure>'


def _lead(result: DemoResult) -> str:
    return (
        f"{len(result.queries):,} queries over {result.num_images:,} images, "
        f"{result.num_candidates} candidates each from a dual encoder, reranked by a joint "
        f"encoder that reads the query together with each image's stored tokens."
    )


def _bars(recalls: Mapping[str, Mapping[str, float]], k: int) -> str:
    old, new = recalls["first stage"][f"R@{k}"], recalls["reranked"][f"R@{k}"]
    return f'<div class="name">R@{k}</div>{_bar(old, "")}{_bar(new, " new")}'


def _bar(value: float, kind: str) -> str:
    return (
        f'<div class="bar{kind}"><span><i style="width:{value:.1f}%"></i></span>'
        f"<b>{value:.1f}&nbsp;%</b></div>"
    )


def _tiles(result: DemoResult) -> str:
    total = sum(step.seconds for step in result.steps)
    tiles = [
        (f"{result.pairs_per_s:,.0f}", "pairs scored a second"),
        (f"{result.bytes_per_image:,}", "bytes stored an image"),
        (f"{total:.0f} s", "from checkpoint to this page"),
        (html.escape(result.engine), "engine that ran"),
    ]
    return "".join(f"<div><b>{figure}</b><span>{name}</span></div>" for figure, name in tiles)


def _card(query: QueryResult, thumbnails: Thumbnails) -> str:
    strips = "".join(
        f'<div><div class="label"><span>{name}</span>{_verdict(query.target, order)}</div>'
        f'<div class="strip">{_strip(query, order, thumbnails)}</div></div>'
        for name, order in (("first stage", query.before), ("reranked", query.after))
    )
    caption = html.escape(query.caption)
    return f'<section class="query"><h3>{caption}</h3><div class="strips">{strips}</div></section>'


def _strip(query: QueryResult, order: Sequence[str], thumbnails: Thumbnails) -> str:
    return "".join(thumbnails.figure(name, right=name == query.target) for name in order[:TOP])


def _verdict(target: str, order: Sequence[str]) -> str:
    if target not in order:
        return '<span class="verdict">not among the candidates</span>'
    place = order.index(target) + 1
    kind = " good" if place == 1 else ""
    return f'<span class="verdict{kind}">right image at {place}</span>'


def _row(name: str, seconds: str, detail: str) -> str:
    return (
        f'<tr class="step"><td>{html.escape(name)}</td><td class="number">{seconds}</td>'
        f'<td class="soft">{html.escape(detail)}</td></tr>'
    )
