"""A real headless Chromium, driven over the DevTools protocol: by a pipe, so by nothing but Python.

Source: `--remote-debugging-pipe` (commands come on descriptor 3, answers go to 4, a zero byte after
each); https://chromedevtools.github.io/devtools-protocol
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # a test may run as root, where Chromium has none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
TIMEOUT_S = 60.0
KEYS = {"Enter": 13, "Escape": 27, "Home": 36, "End": 35, "Tab": 9}
KEYS |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


def chromium_path() -> str | None:
    """Return where Chromium is installed; None: nowhere."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """One browser with one page. Use it as a context manager.

    Attributes:
        problems: errors and warnings that the page's console showed, uncaught exceptions among
            them.
        asked: URLs that the page asked for.
    """

    def __init__(self, folder: Path):
        """Start it; `folder` takes its profile."""
        path = chromium_path()
        assert path is not None
        self.problems: list[str] = []
        self.asked: list[str] = []
        self._session: str | None = None
        self._number, self._answers = 0, dict[int, dict[str, Any]]()
        self._unread = b""
        its_in, self._out = _high_pipe()
        self._in, its_out = _high_pipe()
        null = [(os.POSIX_SPAWN_OPEN, at, os.devnull, os.O_RDWR, 0) for at in (0, 1, 2)]
        command = [path, *OPTIONS, f"--user-data-dir={folder}", "about:blank"]
        pipes = [(os.POSIX_SPAWN_DUP2, its_in, 3), (os.POSIX_SPAWN_DUP2, its_out, 4)]
        self._process = os.posix_spawn(
            path, command, os.environ, file_actions=[*null, *pipes], setpgroup=0
        )
        os.close(its_in)
        os.close(its_out)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command; return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = monotonic() + TIMEOUT_S
        while self._number not in self._answers:
            self._read(until, method)
        answer = self._answers.pop(self._number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def screen(self, width: int, height: int = 900, **media: str) -> None:
        """Set the window's size and media features, such as `prefers_color_scheme="dark"`."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        features = [{"name": k.replace("_", "-"), "value": v} for k, v in media.items()]
        self.call("Emulation.setEmulatedMedia", features=features)

    def open(self, url: str) -> None:
        """Go to a page, from another one, so that it is loaded anew."""
        self.call("Page.navigate", url="about:blank")
        self.problems.clear()
        self.asked.clear()
        failed = self.call("Page.navigate", url=url).get("errorText")
        assert failed is None, f"{url}: {failed}"
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """Return what a JavaScript expression gives; a promise's value."""
        got = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        until = monotonic() + TIMEOUT_S
        while not self.run(f"Boolean({condition})"):
            assert monotonic() < until, f"never true: {condition}; console: {self.problems}"
            sleep(0.02)

    def press(self, key: str) -> None:
        """Press and leave one key: a letter, or one of KEYS."""
        code = KEYS.get(key, 0)
        text = {"Enter": "\r"}.get(key, key if not code else "")
        event = {"key": key, "windowsVirtualKeyCode": code, "text": text}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        """Put text where the focus is."""
        self.call("Input.insertText", text=text)

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """Write a screenshot: of the whole page, or of what the window shows."""
        got = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(got["data"]))

    def close(self) -> None:
        """End it."""
        for descriptor in (self._out, self._in):
            os.close(descriptor)  # the browser ends when its pipe does
        until = monotonic() + 5.0
        while os.waitpid(self._process, os.WNOHANG) == (0, 0):
            if monotonic() > until:
                os.killpg(self._process, signal.SIGKILL)
            sleep(0.02)

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, until: float, why: str) -> None:
        """Take in what the browser says next."""
        ready, _, _ = select.select([self._in], [], [], max(0.0, until - monotonic()))
        assert ready, f"Chromium did not answer {why} within {TIMEOUT_S:g} s"
        part = os.read(self._in, 1 << 16)
        assert part, f"Chromium ended before it answered {why}"
        *messages, self._unread = (self._unread + part).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            elif message["method"] in _EVENTS:
                _EVENTS[message["method"]](self, message["params"])


def _on_console(browser: Chromium, params: dict[str, Any]) -> None:
    if params["type"] in ("error", "warning", "assert"):
        browser.problems.append(str([one.get("value") for one in params["args"]]))


def _on_exception(browser: Chromium, params: dict[str, Any]) -> None:
    browser.problems.append(str(params["exceptionDetails"]))


def _on_log(browser: Chromium, params: dict[str, Any]) -> None:
    entry = params["entry"]
    if entry["level"] in ("error", "warning"):
        browser.problems.append(f"{entry['text']} {entry.get('url', '')}")


def _on_request(browser: Chromium, params: dict[str, Any]) -> None:
    browser.asked.append(params["request"]["url"])


_EVENTS: dict[str, Callable[[Chromium, dict[str, Any]], None]] = {
    "Runtime.consoleAPICalled": _on_console,
    "Runtime.exceptionThrown": _on_exception,
    "Log.entryAdded": _on_log,
    "Network.requestWillBeSent": _on_request,
}


def _high_pipe() -> tuple[int, int]:
    """Return a pipe whose ends lie above the descriptors that the browser wants."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]
