"""The changes that a store makes to its files, counted, so that a test can stop it at any one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from edje.runtime.store import disk

CHANGES = ("create", "write", "sync", "truncate", "unlink", "link", "rename", "sync_folder")


def write_half(descriptor: int, pieces: list[bytes], offset: int) -> None:
    """Do half of what `disk.write` does."""
    content = b"".join(pieces)
    os.pwrite(descriptor, content[: len(content) // 2 + 7], offset)


class Failure:
    """Makes the n-th change of the store on disk fail; half of a write is done before.

    `countdown` is above zero as long as nothing has failed. With `stay` all later ones fail too.
    """

    def __init__(self, patch: pytest.MonkeyPatch, countdown: int, code: int, *, stay: bool):
        self.countdown, self._code, self._stay = countdown, code, stay
        for name in CHANGES:
            patch.setattr(disk, name, self._failing(getattr(disk, name)))

    def _failing(self, call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: Any) -> object:
            self.countdown -= 1
            if self.countdown > 0 or (self.countdown < 0 and not self._stay):
                return call(*arguments)
            if call.__name__ == "unlink" and self._code == errno.ENOSPC:
                return call(*arguments)  # a full disk lets one remove
            if call.__name__ == "write" and self.countdown == 0:
                write_half(*arguments)
            raise OSError(self._code, os.strerror(self._code))

        return wrapped
