"""Images whose decoding does to its process what a broken decoder would do."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import BinaryIO

from edje.runtime.indexing.sources import ImageFile


class Crashing(ImageFile):
    """A decoder that touches memory which is not its own."""

    __slots__ = ()

    def open(self) -> Path | BinaryIO:
        os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(60)
        raise AssertionError("a signal comes before this")


class ShotOnce(ImageFile):
    """A system that is out of memory shoots whoever decodes; the second time it has enough."""

    __slots__ = ()

    def open(self) -> Path | BinaryIO:
        mark = self.path.with_suffix(".shot")
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.path


class Hanging(ImageFile):
    """A decoder that never comes back."""

    __slots__ = ()

    def open(self) -> Path | BinaryIO:
        time.sleep(600)
        raise AssertionError("nobody waits for so long")
