"""Native engines of the fixture bundle, built once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from edje.engines.builder.build import build_engine
from edje.engines.builder.options import EngineOptions


@pytest.fixture(scope="session")
def native_folder(
    tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Return the engine folder of a precision and a type of tokens. Read-only."""

    @cache
    def folder(precision: str = "fp16", tokens: str = "float16") -> Path:
        out = tmp_path_factory.mktemp("native") / "engine"
        options = EngineOptions(token_dtype=tokens)
        build_engine(tiny_bundle, out, backend="native", precision=precision, options=options)
        return out

    return folder
