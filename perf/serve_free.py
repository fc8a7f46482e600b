"""`edje serve` whose engine and reading take no time: what is left is the front and the sharing.

Run in place of `edje` with the words of `edje serve`; the engine folder gives the model's sizes and
tokenizer, the store its ids.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

from ..engines import registry
from ..engines.contract import OpenOptions
from ..engines.manifest import EngineManifest
from ..runtime import opening
from ..runtime.cli import main
from .free_engine import FreeEngine, OneValue


def open_free(folder: object, options: OpenOptions | None = None) -> FreeEngine:
    """Open no engine, whatever the folder holds.

    Its precision is fp32, for which nobody looks through the tokens: an 8-bit one hides NaN, so
    that every value is read before it, which takes 1.3 us a record and is no work of the front.
    """
    return FreeEngine(replace(EngineManifest.read(str(folder)), precision="fp32"))


@contextmanager
def nothing_but_the_front() -> Iterator[None]:
    """Let engines and reads take no time in the block."""
    with (
        patch.object(registry, "open_engine", open_free),
        patch.object(opening, "tokens_for", lambda engine, store: OneValue()),
    ):
        yield


if __name__ == "__main__":
    with nothing_but_the_front():
        sys.exit(main(sys.argv[1:]))
