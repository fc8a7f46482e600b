"""Full disks, closed folders, too few descriptors, two writers: one sentence, nothing lost."""

from __future__ import annotations

import codecs
import errno
import fcntl
import os
import random
import re
import resource
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from disk_changes import Failure
from edje.errors import StoreError
from edje.runtime.store import SegmentWriter, TokenStore
from mounts import run_with_mounts
from store_history import (
    KINDS,
    MEMORY,
    Operation,
    Sizes,
    Witness,
    differences,
    draw_operation,
    expected_bytes,
    served_bytes,
    tokens_of,
)

SMALL = {"num_tokens": 8, "hidden": 320, "segment_bytes": 4096 * 30}


@pytest.fixture(params=["float16", "int8"])
def witness(request: pytest.FixtureRequest) -> Iterator[Witness]:
    """A store of forty records and some dead ones, and what it must hold."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        witness = Witness(Path(folder) / "s")
        Sizes(dtype=request.param, **SMALL).create(witness.path).close()
        witness.fill(random.Random(0), 40)
        yield witness


def refusal(witness: Witness, operation: Operation, store: TokenStore | None = None) -> str:
    """Do it, in a store opened for it if none is given; return why it was refused, else nothing."""
    try:
        with nullcontext(store) if store else TokenStore.open(witness.path, mode="a") as writer:
            operation.apply(writer)
    except StoreError as error:
        return str(error)
    witness.model = operation.after(witness.model)
    return ""


def is_one_sentence(message: str) -> bool:
    """Return whether the message is one line (and one with the mend)."""
    first, *rest = message.split("\n")
    return bool(first) and all(line.startswith("Hint: ") for line in rest)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "delete"])  # SQLite's only
@pytest.mark.parametrize(
    ("code", "stay"), [(errno.ENOSPC, False), (errno.ENOSPC, True), (errno.EIO, False)]
)
def test_a_change_that_fails_anywhere_loses_nothing(
    witness: Witness, monkeypatch: pytest.MonkeyPatch, kind: str, code: int, stay: bool
) -> None:
    """Every change on disk fails once (a full disk stays full, or one call only)."""
    pick = random.Random(1)
    refusals: list[str] = []
    for countdown in count(1):
        operation = draw_operation(pick, witness.model, kind)
        with TokenStore.open(witness.path, mode="a") as store:
            with monkeypatch.context() as patch:
                failure = Failure(patch, countdown, code, stay=stay)
                refusals.append(refusal(witness, operation, store))
            assert witness.check(None) == []
            # With space again it goes on, or says that it must be opened again.
            refusal(witness, draw_operation(pick, witness.model, "append"), store)
            expected = expected_bytes(witness.model, store.layout)
            assert differences(served_bytes(store), expected) == ""
        assert witness.check(None) == []
        if failure.countdown > 0:
            break
        witness.fill(pick, 40)
    refusals = [message for message in refusals if message]
    assert len(refusals) >= 2
    assert all(os.strerror(code) in message for message in refusals)
    assert all(map(is_one_sentence, refusals)), refusals
    assert witness.verify() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_catalog_that_cannot_grow_refuses_and_loses_nothing(
    witness: Witness, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """SQLite's own full disk, at every size up to the one that suffices."""
    connect = sqlite3.connect

    def connect_small(spare: int, *arguments: object, **options: object) -> sqlite3.Connection:
        connection = connect(*arguments, **options)  # type: ignore[call-overload]
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + spare}")
        return connection

    for spare in range(40):
        operation = draw_operation(random.Random(3), witness.model, kind)
        with monkeypatch.context() as patch:
            patch.setattr(sqlite3, "connect", partial(connect_small, spare))
            message = refusal(witness, operation)
        assert witness.check(None) == []
        if not message:
            break
        assert "full" in message
        assert is_one_sentence(message)
    assert not message


@contextmanager
def limited(kind: int, soft: int) -> Iterator[None]:
    """Lower one limit of this process for the moment."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def test_a_file_that_the_system_lets_grow_no_further(witness: Witness) -> None:
    """A real refusal of the kernel, in the middle of a write."""
    names = tuple((f"new-{number}", number) for number in range(20))
    operation = Operation("append", names)
    with TokenStore.open(witness.path, mode="a") as store:
        with limited(resource.RLIMIT_FSIZE, 4096 * 12), pytest.raises(StoreError) as caught:
            operation.apply(store)
        assert os.strerror(errno.EFBIG) in str(caught.value)
        assert witness.check(None) == []
        operation.apply(store)
    witness.model = operation.after(witness.model)
    assert witness.check(None) == []


def test_too_few_descriptors_refuse_and_lose_nothing(witness: Witness) -> None:
    """At every limit each call works, or says that too many files are open."""
    pick = random.Random(2)
    refusals: list[str] = []
    with tempfile.TemporaryFile() as file:
        lowest = file.fileno()
    for spare in range(14):
        for kind in KINDS:
            operation = draw_operation(pick, witness.model, kind)
            with limited(resource.RLIMIT_NOFILE, lowest + spare):
                refusals.append(refusal(witness, operation))
            assert witness.check(None) == []
        witness.fill(pick, 40)
    refusals = [message for message in refusals if message]
    assert len(refusals) >= 10
    assert all(re.search("open files|unable to open", message) for message in refusals), refusals
    assert all(map(is_one_sentence, refusals)), refusals
    assert witness.verify() == []


def test_a_reader_with_too_few_descriptors_says_so(witness: Witness) -> None:
    outcomes = set()
    with tempfile.TemporaryFile() as file:
        lowest = file.fileno()
    for spare in range(10):
        try:
            low = limited(resource.RLIMIT_NOFILE, lowest + spare)
            with low, TokenStore.open(witness.path) as store:
                served = served_bytes(store)
            outcomes.add(differences(served, expected_bytes(witness.model, store.layout)))
        except StoreError as error:
            outcomes.update(re.findall("open files|unable to open", error.message) or ["?"])
    assert outcomes <= {"", "open files", "unable to open"}
    assert len(outcomes) >= 2


@contextmanager
def without_rights(folder: Path) -> Iterator[None]:
    """Make a folder unwritable; root, whom no mode stops, becomes nobody for the moment."""
    codecs.lookup("ascii")  # nobody may not read where Python keeps what it loads late
    user = os.geteuid()
    paths = [folder, *folder.rglob("*")]
    modes = [path.stat().st_mode for path in paths]
    for path, mode in zip(paths, modes, strict=True):
        path.chmod(mode & 0o555)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)


@pytest.mark.parametrize("access", ["cached", "resident"])
def test_a_folder_that_cannot_be_written_is_read_but_not_written(access: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folder is closed to nobody
        Path(folder).chmod(0o755)
        Sizes(**SMALL).create(Path(folder) / "s").close()
        witness = Witness(Path(folder) / "s")
        witness.fill(random.Random(0), 30)
        with without_rights(witness.path):
            assert witness.check(None) == []
            with TokenStore.open(witness.path, access=access) as store:  # type: ignore[arg-type]
                expected = expected_bytes(witness.model, store.layout)
                assert differences(served_bytes(store), expected) == ""
            with pytest.raises(StoreError, match="cannot write the store"):
                TokenStore.open(witness.path, mode="a")
            with pytest.raises(StoreError, match="cannot write"):
                Sizes().create(witness.path / "t")
            layout = store.layout
            with pytest.raises(StoreError, match="Permission denied"):
                SegmentWriter(witness.path / "incoming/x.tokens", layout)
        assert witness.check(None) == []


def test_a_reader_writes_nothing(witness: Witness) -> None:
    operations = [draw_operation(random.Random(4), witness.model, kind) for kind in KINDS]
    with TokenStore.open(witness.path) as reader:
        for operation in operations:
            with pytest.raises(StoreError, match='mode="a"'):
                operation.apply(reader)
    assert witness.check(None) == []


def test_a_second_writer_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    refusals: list[str] = []

    def open_another() -> None:
        try:
            TokenStore.open(tmp_path / "s", mode="a").close()
        except StoreError as error:
            refusals.append(str(error))

    with Sizes().create(tmp_path / "s") as store:
        thread = threading.Thread(target=open_another)
        thread.start()
        thread.join()
        code = "import sys, edje.runtime.store as s; s.TokenStore.open(sys.argv[1], mode='a')"
        command = [sys.executable, "-c", code, str(store.path)]
        refusals.append(subprocess.run(command, capture_output=True, text=True).stderr)
    assert len(refusals) == 2
    assert all(f"writer already (process {os.getpid()} on" in refusal for refusal in refusals)
    TokenStore.open(tmp_path / "s", mode="a").close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.parametrize(("mode", "lock"), [("a", "writer.lock"), ("r", "readers.lock")])
def test_a_file_system_without_locks_is_named_not_a_writer(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    mode: Literal["r", "a"],
    lock: str,
) -> None:
    path = tmp_path / "s"
    TokenStore.create(path, num_tokens=4, hidden=8, fingerprint_encoder="tower").close()

    def refuse(descriptor: int, *_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(StoreError, match="its file system offers no locks") as caught:
        TokenStore.open(path, mode=mode)
    assert str(path / lock) in str(caught.value)
    assert caught.value.hint is not None
    assert "-o flock" in caught.value.hint


@pytest.mark.parametrize("there", [False, True])
def test_a_store_that_cannot_be_locked_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    path = tmp_path / "s"
    if there:
        path.mkdir()

    def refuse(descriptor: int, *_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        with pytest.raises(StoreError, match="its file system offers no locks") as caught:
            TokenStore.create(path, num_tokens=4, hidden=8, fingerprint_encoder="tower")
    assert str(path / "writer.lock") in str(caught.value)
    assert [*tmp_path.rglob("*")] == [path] * there
    TokenStore.create(path, num_tokens=4, hidden=8, fingerprint_encoder="tower").close()


CREATE_ON_A_SMALL_DISK = """
from pathlib import Path
from edje.errors import StoreError
from edje.runtime.store import TokenStore

disk = Path("disk")
try:
    TokenStore.create(disk / INSIDE, num_tokens=4, hidden=8, fingerprint_encoder="tower").close()
    print("made")
except StoreError as error:
    print(str(error).splitlines()[0], "|", *disk.iterdir())
"""


@pytest.mark.parametrize("inside", ["", "s"])
def test_a_store_on_a_disk_too_small_is_refused_and_not_made(tmp_path: Path, inside: str) -> None:
    code = CREATE_ON_A_SMALL_DISK.replace("INSIDE", repr(inside))
    for kib in range(8, 400, 24):
        mounts = f"mkdir -p disk; mount -t tmpfs -o size={kib}k none disk"
        shown = run_with_mounts(mounts, code, tmp_path).strip()
        if shown == "made":
            break
        assert "o space left on" in shown
        assert str(Path("disk", inside)) in shown
        assert shown.endswith("|")
    assert (shown, kib > 64) == ("made", True)


def test_threads_share_one_writer(tmp_path: Path) -> None:
    failures: list[BaseException] = []
    model: dict[str, int] = {}
    with Sizes(**SMALL).create(tmp_path / "s") as store:

        def work(number: int) -> None:
            records = tuple((f"{number}-{at}", at) for at in range(24))
            try:
                for start in range(0, 24, 4):
                    part = records[start : start + 4]
                    store.append([i for i, _ in part], tokens_of(part, store.layout))
                    store.delete([part[0][0]])
                    store.compact(0.2)
            except BaseException as error:
                failures.append(error)
            model.update(record for at, record in enumerate(records) if at % 4)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert differences(served_bytes(store), expected_bytes(model, store.layout)) == ""
    assert Witness(tmp_path / "s", model).check(None) == []


def test_arrays_of_another_dtype_or_shape_are_refused(witness: Witness) -> None:
    with TokenStore.open(witness.path, mode="a") as store:
        m, hidden = store.record_shape
        good = np.zeros((1, m, hidden), np.float16)
        for tokens, scales in (
            (good.astype(np.float32), None),
            (good[:, :-1], None),
            (good[:0], None),
            (good.astype(np.int8), None),
            (good, np.ones((1, m), np.float16)),
            (good.astype(np.int8), np.ones((1, m + 1), np.float16)),
            (good.astype(np.int8), np.ones((1, m), np.float32)),
        ):
            with pytest.raises(StoreError, match="nothing has changed"):
                store.append(["new"], tokens, scales)
    assert witness.check(None) == []
