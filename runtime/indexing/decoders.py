"""Decoder processes: image files in, RGB of the model's size out; a crash costs one image.

Each is a fresh interpreter behind a socket, so it needs no guard in the caller's script, inherits
no thread or lock of this one, and ends when this process is gone, however it ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from queue import Empty, SimpleQueue

from ...arrays import UInt8
from ...bundle import ImageSpec
from ...errors import EdjeError, RequestError
from ...files import Closing
from ...machine import usable_cores
from .images import PillowSettings, Unreadable, decode_entry, import_pillow
from .sources import ImageFile

Decoded = UInt8 | Unreadable

MAX_DECODE_S = 120.0  # for one image; only a decoder that hangs, or a dead disk, takes longer
START_S = 120.0
ATTEMPTS = 2  # the first death may be another's fault: a system out of memory shoots anyone
READY = "ready"


def default_workers() -> int:
    """Return the usable cores but one: that is left to reading, encoding and the store."""
    return max(1, usable_cores() - 1)


class DecoderPool(Closing):
    """`num_workers` decoder processes, started when first needed. Use it as a context manager.

    What this process has set in Pillow when the pool is made holds in them too: the pixel limit,
    openers of more formats, truncated images.

    Args:
        spec: what they make of an image.
        num_workers: how many images are decoded at once.
        settings: of Pillow; default: those of this process.

    Raises:
        RequestError: fewer than one worker, no Pillow, or an opener that only this process has.
    """

    def __init__(
        self, spec: ImageSpec, num_workers: int, *, settings: PillowSettings | None = None
    ):
        if num_workers < 1:
            raise RequestError(f"workers is {num_workers}, expected at least 1")
        import_pillow()
        self._settings = PillowSettings.of_this_process() if settings is None else settings
        self.num_workers = num_workers
        self._spec = spec
        self._idle: SimpleQueue[_Decoder] = SimpleQueue()
        self._decoders: list[_Decoder] = []
        self._closed = False
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="edje-decode")

    def submit(self, files: Sequence[ImageFile]) -> Future[list[Decoded]]:
        """Have one process decode `files`; the result holds one entry a file, in their order.

        The caller bounds how many are under way.
        """
        return self._threads.submit(self._decode, files)

    def close(self) -> None:
        """End the processes and drop what is under way."""
        self._closed = True
        for decoder in list(self._decoders):
            decoder.kill()
        self._threads.shutdown(cancel_futures=True)
        for decoder in self._decoders:
            decoder.close()

    def _decode(self, files: Sequence[ImageFile]) -> list[Decoded]:
        """Go on with a new process where one dies; the image it dies on twice is skipped."""
        decoded: list[Decoded] = []
        deaths = 0
        while len(decoded) < len(files) and not self._closed:
            decoder = self._take()
            if self._closed:  # meanwhile: `close` may have come too early to see this one
                break
            before = len(decoded)
            fault = decoder.decode(files[before:], decoded)
            if fault is None:
                self._idle.put(decoder)
                break
            self._decoders.remove(decoder)
            decoder.close()
            deaths = 1 if len(decoded) > before else deaths + 1
            if deaths == ATTEMPTS:
                decoded.append(Unreadable(fault))
                deaths = 0
        return decoded

    def _take(self) -> _Decoder:
        try:
            return self._idle.get_nowait()
        except Empty:
            self._decoders.append(decoder := _Decoder(self._spec, self._settings))
            return decoder


class _Decoder:
    """One process, seen from here."""

    def __init__(self, spec: ImageSpec, settings: PillowSettings):
        self._pipe, theirs = Pipe()
        program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
        command = [sys.executable, "-c", program, str(theirs.fileno())]
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        try:
            self._pipe.send((spec, MAX_DECODE_S, settings))
            answer = self._pipe.recv() if self._pipe.poll(START_S) else None
        except (EOFError, OSError):
            answer = None
        if answer == READY:
            return
        self.close()
        if isinstance(answer, EdjeError):
            what = f"a decoder process cannot be started: {answer.message}"
            raise RequestError(what, hint=answer.hint)
        raise RequestError(
            "a decoder process cannot be started: it ended with "
            f"{_cause(self._process.returncode)}",
            hint="its own message stands above; `edje doctor` shows what is missing",
        )

    def decode(self, files: Sequence[ImageFile], decoded: list[Decoded]) -> str | None:
        """Add the results to `decoded`; return why they end early, None where they do not."""
        try:
            self._pipe.send(files)
            for _ in files:
                decoded.append(self._pipe.recv())
        except (EOFError, OSError):
            code = self._process.wait()
            if code == -signal.SIGALRM:
                return f"decoding took longer than {MAX_DECODE_S:.0f} s"
            return f"its decoder process died ({_cause(code)})"
        return None

    def kill(self) -> None:
        """End the process, whatever it does: there is nothing that it could lose."""
        self._process.kill()

    def close(self) -> None:
        """End the process and let go of it."""
        self.kill()
        self._process.wait()
        self._pipe.close()


def _cause(code: int | None) -> str:
    """Name the signal that ended a process."""
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def serve() -> None:
    """Be a decoder process: decode what comes over the socket until its other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group
    pipe = Connection(int(sys.argv[1]))
    try:
        spec, max_decode_s, settings = pipe.recv()
        try:
            settings.apply()
        except EdjeError as error:
            pipe.send(error)
            return
        _silence()
        pipe.send(READY)
        while True:
            files: Sequence[ImageFile] = pipe.recv()
            for file in files:
                signal.setitimer(signal.ITIMER_REAL, max_decode_s)  # its end ends the process
                result = decode_entry(file, spec)
                signal.setitimer(signal.ITIMER_REAL, 0)
                pipe.send(result)
    except (EOFError, OSError):
        pass  # the other end is gone, and so is the reason to work


def _silence() -> None:
    """Keep the decoding libraries' own messages (libtiff's, libpng's) from the terminal."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
