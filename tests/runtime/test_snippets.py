"""Every Python snippet of the project's pages runs as it stands, in a folder with its names."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edje import StoppedError, TokenStore
from edje.bundle import BundleManifest

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("export", "engines", "kernels", "runtime", "perf", "demo", "tests")
NOT_RUN = "<!-- not run by the tests: "
BLOCK = re.compile(r"(?P<before>[^\n]*\n)```(?:python|py)\b[^\n]*\n(?P<code>.*?)^```", re.M | re.S)


@dataclass(frozen=True)
class Snippet:
    """One block of Python on a page; `why_not`: why it cannot run here."""

    page: str
    line: int
    code: str
    why_not: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets() -> Iterator[Snippet]:
    pages = [
        *ROOT.glob("*.md"),
        *(page for name in FOLDERS for page in (ROOT / name).rglob("*.md")),
    ]
    pages.remove(ROOT / "tests/clients/README.md")  # `make test-clients` runs the clients
    for page in sorted(pages):
        text = page.read_text(encoding="utf-8")
        for block in BLOCK.finditer(text):
            before = block["before"].strip()
            why_not = before if before.startswith(NOT_RUN) else None
            line = text.count("\n", 0, block.start("code")) + 1
            yield Snippet(str(page.relative_to(ROOT)), line, block["code"], why_not)


ALL = list(snippets())


def make_store(path: Path, manifest: BundleManifest, ids: list[str]) -> np.ndarray:
    """Write a store of random tokens for the model; return such tokens, float16 [N, m, H]."""
    sizes = manifest.sizes
    shape = (len(ids), sizes.num_tokens, sizes.hidden)
    tokens = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    with TokenStore.create(
        path,
        num_tokens=sizes.num_tokens,
        hidden=sizes.hidden,
        fingerprint_encoder=manifest.fingerprint_encoder,
    ) as store:
        store.append(ids, tokens)
    return tokens


@pytest.fixture
def names(
    tmp_path: Path, tiny_bundle: Path, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The current folder holds what the pages name; return what they say a reader has."""
    from PIL import Image

    manifest = BundleManifest.read(tiny_bundle)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["part.py", "1", "2"])
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (60 * number, 90, 30)).save(f"photos/{number}.png")
    (tmp_path / "demo-out").mkdir()
    scenes = sorted({name for s in ALL for name in re.findall(r"scene-\d+\.png", s.code)})
    make_store(tmp_path / "demo-out/scenes.store", manifest, [*scenes, "other.png"])
    tokens = make_store(tmp_path / "photos.store", manifest, ["kite.png", "dog.png"])
    for name, folder in (("engine", tiny_engine), ("demo-out/engine", tiny_engine)):
        (tmp_path / name).symlink_to(folder)
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    return {"ids": ["new-1.png", "new-2.png"], "tokens": tokens, "out": np.empty_like(tokens)}


@pytest.mark.parametrize("snippet", [s for s in ALL if s.why_not is None], ids=str)
def test_a_snippet_runs_as_it_stands(snippet: Snippet, names: dict[str, Any]) -> None:
    code = compile(snippet.code, str(snippet), "exec")
    try:
        exec(code, names)
    except StoppedError:
        assert "timeout_s" in snippet.code, "a busy machine may need longer than the snippet allows"
    for store in ("photos.store", "demo-out/scenes.store"):
        with TokenStore.open(store) as opened:
            assert opened.verify().is_clean


def test_the_snippets_that_cannot_run_are_known() -> None:
    assert len(ALL) >= 6
    not_run = [snippet.page for snippet in ALL if snippet.why_not]
    assert not_run == ["README.md", "kernels/README.md"]
    for snippet in ALL:
        compile(snippet.code, str(snippet), "exec")
