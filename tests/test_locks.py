"""Locks: taken, found taken, or said to be impossible; never the one for the other."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from edje.files import lock_fault, open_lock, try_lock, wait_lock

NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


def refuse_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Answer as a file system without locks does."""

    def refuse(descriptor: int, operation: int, *_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_taken_lock_names_its_holder(tmp_path: Path) -> None:
    first, second = open_lock(tmp_path / "lock"), open_lock(tmp_path / "lock")
    assert try_lock(first) is None
    assert try_lock(second) == f"process {os.getpid()} on {os.uname().nodename}"
    os.close(first)
    assert try_lock(second) is None
    os.close(second)


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_file_system_without_locks_is_no_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    descriptor = open_lock(tmp_path / "lock")
    refuse_locks(monkeypatch, number)
    for take in (try_lock, wait_lock):
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            take(descriptor)
        assert caught.value.errno == number
        said = lock_fault(tmp_path / "lock", caught.value)
        assert said.startswith(f"cannot lock {tmp_path / 'lock'}: its file system offers no locks")
    os.close(descriptor)


def test_another_fault_keeps_its_own_words(tmp_path: Path) -> None:
    error = OSError(errno.EIO, os.strerror(errno.EIO))
    said = lock_fault(tmp_path / "lock", error)
    assert said == f"cannot lock {tmp_path / 'lock'}: Input/output error"
