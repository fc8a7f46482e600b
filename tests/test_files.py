"""Files and folders are written whole or not at all; locks are taken, taken by others, or none."""

from __future__ import annotations

import codecs
import errno
import fcntl
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from edje.errors import EdjeError
from edje.files import (
    Closing,
    lock_fault,
    open_lock,
    publish_folder,
    rewrite_file,
    try_lock,
    wait_lock,
)
from mounts import run_with_mounts


def listing(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def publish_half(target: Path, error: type[BaseException]) -> None:
    with publish_folder(target, manifest="it.json", overwrite=True) as folder:
        (folder / "half.txt").write_text("half")
        raise error


def test_a_block_that_ends_well_publishes_everything(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with publish_folder(target, manifest="it.json") as folder:
        assert not target.exists()
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
    assert listing(tmp_path) == {"deep/target/sub/a.txt": "a"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("there", [False, True])
def test_a_block_that_fails_leaves_what_was_there(
    tmp_path: Path, error: type[BaseException], there: bool
) -> None:
    target = tmp_path / "target"
    if there:
        target.mkdir()
        (target / "it.json").write_text("old")
    before = listing(tmp_path)
    with pytest.raises(error):
        publish_half(target, error)
    assert listing(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["target"] if there else [])


def test_an_existing_folder_is_replaced_only_on_demand(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "it.json").write_text("old")
    with pytest.raises(EdjeError, match="--overwrite"), publish_folder(target, manifest="it.json"):
        pytest.fail("the block must not run")
    assert listing(tmp_path) == {"target/it.json": "old"}
    with publish_folder(target, manifest="it.json", overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
    assert listing(tmp_path) == {"target/new.txt": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_a_swap_that_fails_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "it.json").write_text("old")
    rename, calls = os.rename, []

    def second_fails(source: object, destination: object) -> None:
        calls.append(destination)
        if len(calls) == 2:
            raise OSError("no space")
        rename(source, destination)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", second_fails)
    with (
        pytest.raises(OSError, match="no space"),
        publish_folder(target, manifest="it.json", overwrite=True) as folder,
    ):
        (folder / "new.txt").write_text("new")
    assert listing(tmp_path) == {"target/it.json": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_others_may_read_a_published_folder(tmp_path: Path) -> None:
    with publish_folder(tmp_path / "target", manifest="it.json"):
        pass
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(EdjeError, match=r"cannot write .*target"),
        publish_folder(tmp_path / "file" / "target", manifest="it.json"),
    ):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_is_a_place_and_keeps_its_rights(tmp_path: Path, overwrite: bool) -> None:
    target = tmp_path / "target"
    target.mkdir()
    target.chmod(0o2750)
    with publish_folder(target, manifest="it.json", overwrite=overwrite) as folder:
        (folder / "it.json").write_text("{}")
        assert listing(target) == {}, "nothing shows before everything is there"
    assert listing(tmp_path) == {"target/it.json": "{}"}
    assert target.stat().st_mode & 0o7777 == 0o2750
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "target").symlink_to(tmp_path / "disk")
    with publish_folder(tmp_path / "target", manifest="it.json") as folder:
        (folder / "it.json").write_text("{}")
    assert (tmp_path / "target").is_symlink()
    assert listing(tmp_path / "disk") == {"it.json": "{}"}


def test_only_a_folder_of_the_same_kind_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "home"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with (
            pytest.raises(EdjeError, match=r"holds other files \(no it.json\)") as caught,
            publish_folder(target, manifest="it.json", overwrite=overwrite),
        ):
            pytest.fail("the block must not run")
        assert "--overwrite" not in str(caught.value), "it would not help"
    assert listing(tmp_path) == {"home/thesis.txt": "years of work"}


def test_what_another_has_published_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "target"
    first, second = ExitStack(), ExitStack()
    for name, stack in (("second", second), ("first", first)):
        folder = stack.enter_context(publish_folder(target, manifest="it.json"))
        (folder / "it.json").write_text(name)
    first.close()
    with pytest.raises(EdjeError, match="somebody else has filled"):
        second.close()
    assert listing(tmp_path) == {"target/it.json": "first"}


PUBLISH = """
import sys
from pathlib import Path
from edje.errors import EdjeError
from edje.files import is_free, publish_folder
target = Path("disk")
try:
    with publish_folder(target, manifest="it.json", overwrite=OVERWRITE) as folder:
        print("began")
        (folder / "a").mkdir()
        (folder / "a/b.txt").write_text("b")
        (folder / "it.json").write_text("{}")
        FAULT
except (EdjeError, ValueError) as error:
    print(error)
print(*sorted(str(path) for path in target.rglob("*")), is_free(target))
"""
PUBLISHED = "disk/a disk/a/b.txt disk/it.json False"
TMPFS = "mkdir disk; mount -t tmpfs none disk"
# On the disk that its parent is on: neither the device number nor os.path.ismount tells.
BIND = "mkdir disk 'di sk'; mount --bind 'di sk' disk"


def publish_on(tmp_path: Path, mounts: str, *, overwrite: bool = False, fault: str = "") -> str:
    code = PUBLISH.replace("OVERWRITE", str(overwrite)).replace("FAULT", fault)
    return run_with_mounts(mounts, code, tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("mounts", [TMPFS, BIND])
def test_an_empty_mounted_folder_is_filled(tmp_path: Path, mounts: str, overwrite: bool) -> None:
    shown = publish_on(tmp_path, mounts, overwrite=overwrite)
    assert shown.splitlines() == ["began", PUBLISHED]


def test_a_fresh_disk_counts_as_empty(tmp_path: Path) -> None:
    shown = publish_on(tmp_path, f"{TMPFS}; mkdir disk/lost+found disk/.edje-partial-killed")
    assert shown.splitlines() == ["began", PUBLISHED.replace("json", "json disk/lost+found")]


@pytest.mark.parametrize("mounts", [TMPFS, BIND])
def test_a_mounted_folder_is_empty_again_after_a_failure(tmp_path: Path, mounts: str) -> None:
    shown = publish_on(tmp_path, mounts, fault="raise ValueError('failed')")
    assert shown.splitlines() == ["began", "failed", "True"]


@pytest.mark.parametrize("mounts", [TMPFS, BIND])
def test_replacing_a_mounted_folder_is_refused_before_the_work(tmp_path: Path, mounts: str) -> None:
    shown = publish_on(tmp_path, f"{mounts}; touch disk/it.json", overwrite=True).splitlines()
    assert "disk cannot be replaced, since a disk or folder is mounted there" in shown[0]
    assert "disk/new" in shown[1]
    assert shown[2:] == ["disk/it.json False"]


def test_an_empty_folder_whose_parent_cannot_be_written_is_filled() -> None:
    codecs.lookup("ascii")  # nobody may not read where Python keeps what it loads late
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder is closed to nobody
        parent, target = Path(name), Path(name, "volume")
        target.mkdir()
        target.chmod(0o777)
        parent.chmod(0o555)
        if user == 0:
            os.seteuid(65534)  # root, whom no mode stops, becomes nobody for the moment
        try:
            with publish_folder(target, manifest="it.json") as folder:
                (folder / "it.json").write_text("{}")
            with (
                pytest.raises(EdjeError, match="cannot write"),
                publish_folder(parent / "other", manifest="it.json"),
            ):
                pytest.fail("the block must not run")
            assert listing(parent) == {"volume/it.json": "{}"}
        finally:
            os.seteuid(user)
            parent.chmod(0o755)


@pytest.mark.parametrize(
    "fault",
    [
        "(folder / 'big').write_bytes(bytes(1 << 20))",
        "shutil.copyfile('big', folder / 'big')",
        "shutil.copytree('many', folder, dirs_exist_ok=True)",
        "Tokenizer(WordLevel({str(n): n for n in range(99999)})).save(str(folder / 'big'))",
    ],
)
def test_a_full_disk_is_said_of_the_target_not_of_what_was_copied(
    tmp_path: Path, fault: str
) -> None:
    (tmp_path / "many").mkdir()
    for path in (tmp_path / "big", tmp_path / "many/big"):
        path.write_bytes(bytes(1 << 20))
    imports = "import shutil; from tokenizers import Tokenizer; "
    imports += "from tokenizers.models import WordLevel; "
    mounts = "mkdir disk; mount -t tmpfs -o size=64k none disk"
    shown = publish_on(tmp_path, mounts, fault=imports + fault)
    assert shown.splitlines()[:2] == ["began", "cannot write disk: No space left on device"]
    assert shown.splitlines()[-1] == "True"


def test_a_full_disk_elsewhere_is_not_said_of_the_target(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "elsewhere")
    with (
        pytest.raises(OSError, match="elsewhere"),
        publish_folder(tmp_path / "out", manifest="it.json"),
    ):
        raise full
    assert not (tmp_path / "out").exists()


def fail_after(_: object) -> None:
    raise ZeroDivisionError


def test_a_file_is_rewritten_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    with rewrite_file(path) as file:
        file.write(b"old")
    path.chmod(0o640)
    with rewrite_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o640)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_rewritten_stays(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), rewrite_file(path) as file:
        fail_after(file.write(b"half"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_closes_is_closed_at_the_end_of_a_block_that_fails() -> None:
    class Held(Closing):
        is_open = True

        def close(self) -> None:
            self.is_open = False

    held = Held()
    with pytest.raises(ZeroDivisionError), held as entered:
        fail_after(held.is_open)
    assert entered is held
    assert not held.is_open


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
