"""The two TensorRT libraries as one: found by either import name, with one log a process.

TensorRT keeps the first logger that a process gives it and ignores the others, so each library
has one logger here, and what is logged is read from it.
"""

from __future__ import annotations

import importlib
from collections import deque
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

MAX_MESSAGES = 64
IMPORT_NAMES = {
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
_TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
_LAYER_REPORT = "LayerType: "


class MessageLog:
    """What a library logged of late: its errors, and its last report of layers."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._errors: deque[str] = deque(maxlen=MAX_MESSAGES)
        self.layer_report = ""

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._errors.clear()
            self.layer_report = ""

    def add(self, severity: str, text: str) -> None:
        """Take a message as the library's logger hands it over, from any thread."""
        with self._lock:
            if severity in ("INTERNAL_ERROR", "ERROR"):
                self._errors.append(one_line(text))
            elif _LAYER_REPORT in text:
                self.layer_report = text

    def errors(self) -> list[str]:
        """Return the errors in the order they came, each once and in one line."""
        with self._lock:
            return list(dict.fromkeys(self._errors))


@dataclass(frozen=True, slots=True)
class TrtLibrary:
    """An imported TensorRT or TensorRT-RTX.

    Attributes:
        backend: its command-line name, `tensorrt` or `tensorrt-rtx`.
        module: what was imported; both libraries use the same class names.
        logger: the one `ILogger` of the process, which fills `log`.
        building: held by the one build that may run; builds share the log.
    """

    backend: str
    module: Any
    logger: Any
    log: MessageLog
    building: Lock

    @property
    def title(self) -> str:
        """The library's name as its vendor writes it."""
        return _TITLES[self.backend]

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX, which compiles its kernels on the user's GPU."""
        return self.backend == "tensorrt-rtx"

    @property
    def version(self) -> str:
        """The full version: plans open with exactly the one that built them."""
        return str(self.module.__version__)


@cache
def load_trt(backend: str) -> TrtLibrary:
    """Import the library of `tensorrt` or `tensorrt-rtx`.

    Raises:
        ImportError: not installed, or its shared libraries cannot be loaded; one sentence.
    """
    module = _import_first(backend)
    log = MessageLog()
    return TrtLibrary(backend, module, make_logger(module, log), log, Lock())


def make_logger(module: Any, log: MessageLog) -> Any:
    """Return the library's kind of logger, writing into `log`."""
    base: Any = module.ILogger

    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)  # pybind11 asks for exactly this call

        def log(self, severity: Any, text: str) -> None:
            log.add(str(severity).rpartition(".")[2], text)

    return Logger()


def one_line(text: str) -> str:
    """Return a library's message without line breaks and doubled spaces."""
    return " ".join(text.split())


def _import_first(backend: str) -> Any:
    names = IMPORT_NAMES[backend]
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, None):
                raise ImportError(
                    f"{_TITLES[backend]} is installed without its {error.name}"
                ) from error
        except (ImportError, OSError) as error:
            raise ImportError(
                f"{_TITLES[backend]} is installed but does not load: {one_line(str(error))}"
            ) from error
    raise ImportError(f"{_TITLES[backend]} is not installed (no module named {names[0]})")
