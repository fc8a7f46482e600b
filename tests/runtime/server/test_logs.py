"""Log lines are whole JSON; a disk that is full or slow costs lines, never a request."""

from __future__ import annotations

import io
import json
import threading
import time

from edje.runtime.server.logs import MAX_LINES, JsonLog


class Blocked(io.BytesIO):
    """A disk that takes nothing until it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.let = threading.Event(), threading.Event()

    def write(self, content: object) -> int:
        self.reached.set()
        assert self.let.wait(20)
        return super().write(content)  # type: ignore[arg-type]


def test_every_line_is_json_and_none_is_lost_at_the_end():
    stream = io.BytesIO()
    log = JsonLog(stream)
    for number in range(1000):
        log.write("request", number=number, query='"\n\ud800', nothing=None)
    log.close()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["number"] for line in lines] == list(range(1000))
    assert all("nothing" not in line for line in lines)


def test_what_is_said_to_people_stands_between_the_lines_in_order():
    stream = io.BytesIO()
    log = JsonLog(stream)
    log.write("first")
    log.say("serving \ud800")
    log.write("last")
    log.close()
    first, said, last = stream.getvalue().splitlines()
    assert json.loads(first)["event"] == "first"
    assert json.loads(last)["event"] == "last"
    assert said == rb"edje: serving \ud800"


def test_a_full_disk_is_counted():
    lost: list[int] = []
    with open("/dev/full", "wb", buffering=0) as full:
        log = JsonLog(full)
        log.on_lost = lost.append
        for _ in range(3):
            log.write("request")
        log.close()
    assert sum(lost) == 3


def test_a_slow_disk_holds_nobody_up_and_memory_is_bounded():
    stream, lost = Blocked(), []
    log = JsonLog(stream)
    log.on_lost = lost.append
    log.write("first")
    assert stream.reached.wait(10)
    began = time.monotonic()
    for _ in range(MAX_LINES + 50):
        log.write("request")
    assert time.monotonic() - began < 5
    assert sum(lost) == 50
    stream.let.set()
    log.close()
