"""`edje` whose server leaks on purpose with every batch: memory, a file, now and then a thread."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

from edje.runtime.cli import main
from edje.runtime.server.metrics import Metrics

KEPT: list[Any] = []
count_batch = Metrics.count_batch


def leak(self: Metrics, *batch: Any) -> None:
    count_batch(self, *batch)
    KEPT.append(bytes(range(256)) * 1024)
    KEPT.append(os.dup(2))
    if len(KEPT) % 8 == 0:
        threading.Thread(target=threading.Event().wait, daemon=True).start()


if __name__ == "__main__":
    Metrics.count_batch = leak  # type: ignore[method-assign]
    sys.argv[0] = "edje"
    sys.exit(main())
