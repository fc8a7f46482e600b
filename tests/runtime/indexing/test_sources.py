"""Sources: every file, line and member once, in a fixed order; damage is named, not fatal."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import pickle
import subprocess
import tarfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.errors import RequestError
from edje.runtime.indexing import tars
from edje.runtime.indexing.sources import ImageFile, SkippedImage, open_source
from image_files import png, write_tar
from mounts import run_with_mounts


def everything(_: str) -> bool:
    return True


def read(path: Path | list[Path]) -> tuple[dict[str, bytes], list[SkippedImage]]:
    """All that a source gives: the bytes of every entry, and what it skipped."""
    found = list(open_source(path).entries(everything))
    files = [pickle.loads(pickle.dumps(f)) for f in found if isinstance(f, ImageFile)]
    opened = {file.id: file.open() for file in files}
    content = {i: o.read_bytes() if isinstance(o, Path) else o.read() for i, o in opened.items()}
    return content, [entry for entry in found if isinstance(entry, SkippedImage)]


names = st.text("ab./-_ é0", min_size=1, max_size=4).filter(lambda name: set(name) - {".", "/"})


@settings(max_examples=50, deadline=None)
@given(paths=st.lists(st.lists(names.map(lambda n: n.replace("/", "-")), max_size=3), max_size=8))
def test_a_folder_is_walked_in_the_order_of_the_whole_paths(
    paths: list[list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("walk")
    (root / "always").touch()
    for parts in paths:
        folder = root.joinpath(*(f"{part}+" for part in parts))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "".join([*parts, ".png"])).touch()
    expected = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    source = open_source(root)
    assert list(source.ids()) == expected
    files = [entry for entry in source.entries(everything) if isinstance(entry, ImageFile)]
    assert [(file.id, file.path) for file in files] == [(i, root / i) for i in expected]


def test_links_to_folders_and_the_store_are_passed_by(tmp_path: Path) -> None:
    for name in ("a.png", "deep/b.png", "deep/s/segments"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "ring").symlink_to(tmp_path)
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    source = open_source(tmp_path, leave_out=tmp_path / "deep/s")
    assert list(source.ids()) == ["a.png", "deep/b.png", "link.png"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "gone/deep").mkdir(parents=True)
    entries = open_source(tmp_path).entries(everything)
    assert next(entries) == ImageFile("a.png", tmp_path / "a.png", str(tmp_path))
    (tmp_path / "gone/deep").rmdir()
    (tmp_path / "gone").rmdir()
    reason = "cannot be listed: No such file or directory"
    assert list(entries) == [SkippedImage("gone/", reason, str(tmp_path))]


def test_all_faults_of_a_list_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "list.tsv"
    path.write_text("only-a-path.png\nx\ta.png\n\ty.png\nx\tb.png\n")
    with pytest.raises(RequestError) as caught:
        open_source(path)
    assert len(caught.value.faults) == 3
    assert "line 1: got 'only-a-path.png'" in caught.value.faults[0]
    assert "line 3" in caught.value.faults[1]
    assert "1 ids come twice: 'x'" in caught.value.faults[2]
    (tmp_path / "image.png").write_bytes(png())
    with pytest.raises(RequestError, match="no UTF-8 text"):
        open_source(tmp_path / "image.png")
    path.write_text("no path\n" * 30)
    with pytest.raises(RequestError) as caught:
        open_source(path)
    assert (len(caught.value.faults), caught.value.faults[-1]) == (21, "and more faults")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_a_tar_gives_its_image_members(tmp_path: Path, suffix: str) -> None:
    members = [
        ("000.jpg", b"first"),
        ("000.txt", b"a caption"),
        ("000.left.PNG", b"second of the same key"),
        ("000.json", b"{}"),
        ("deep/001.webp", b"x" * 100_000),
        ("002.cls", b"7"),
        ("000.jpg", b"comes again"),
        ("empty.png", b""),
    ]
    path = write_tar(tmp_path / f"shard{suffix}", members)
    content, skipped = read(path)
    assert content == {
        "000.jpg": b"first",
        "000.left.PNG": b"second of the same key",
        "deep/001.webp": b"x" * 100_000,
        "empty.png": b"",
    }
    assert skipped == [
        SkippedImage("000.jpg", "comes a second time; the first one counts", str(path))
    ]
    source = open_source(path)
    assert list(source.ids()) == list(content)
    assert source.num_ignored == 3
    wanted = list(source.entries(lambda name: name.startswith("deep")))
    assert [entry.id for entry in wanted] == ["deep/001.webp", "000.jpg"]


def test_links_and_folders_in_a_tar_are_no_images(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, kind in (("d.png", tarfile.DIRTYPE), ("l.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere.png"
            tar.addfile(info)
    content, skipped = read(tmp_path / "t.tar")
    assert content == {}
    assert [(entry.id, entry.reason) for entry in skipped] == [
        ("l.png", "is a link or a device, not a file")
    ]


def test_several_tars_and_numbers_in_braces(tmp_path: Path) -> None:
    for number in range(8, 12):
        write_tar(tmp_path / f"s-{number:03}.tar", [(f"{number}.png", b"content")])
    content, _ = read(tmp_path / "s-{008..011}.tar")
    assert list(content) == ["8.png", "9.png", "10.png", "11.png"]
    content, _ = read([tmp_path / "s-011.tar", tmp_path / "s-008.tar"])
    assert list(content) == ["11.png", "8.png"]
    with pytest.raises(RequestError, match=r"1 of 5 tars are not there: .*s-012\.tar"):
        open_source(tmp_path / "s-{008..012}.tar")
    with pytest.raises(RequestError, match=r"the range \{009\.\.008\} names no file") as caught:
        open_source(tmp_path / "s-{009..008}.tar")
    assert "{008..009} names the same files" in str(caught.value)
    with pytest.raises(RequestError, match="got 2 sources"):
        open_source([tmp_path / "s-008.tar", tmp_path])


MEMBERS = [(f"{number}.png", bytes([number]) * 700) for number in range(4)]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_tar_cut_off_anywhere_gives_what_is_whole_and_names_the_damage(
    tmp_path: Path, suffix: str
) -> None:
    plain = write_tar(tmp_path / "whole.tar", MEMBERS).read_bytes()
    ends = 4 * (512 + 1024)
    for size in [0, 1, 511, 512, 700, *range(1024, ends + 1, 256), ends + 100]:
        whole = size // 1536 + (size % 1536 >= 512 + 700)
        path = tmp_path / f"cut-{size}{suffix}"
        path.write_bytes(plain[:size] if suffix == ".tar" else gzip.compress(plain[:size], mtime=0))
        content, skipped = read(path)
        assert content == dict(MEMBERS[:whole]), size
        assert [entry.id for entry in skipped] == [path.name]
        assert "damaged or cut off after" in skipped[0].reason


def test_a_compressed_tar_whose_compression_is_cut_gives_what_came_before(tmp_path: Path) -> None:
    noise = [(f"{number}.png", os.urandom(50_000)) for number in range(4)]
    whole = write_tar(tmp_path / "whole.tar.gz", noise).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) * 5 // 8])
    content, skipped = read(tmp_path / "cut.tar.gz")
    assert content == dict(noise[:2])
    assert [entry.id for entry in skipped] == ["cut.tar.gz"]
    assert "after '1.png'" in skipped[0].reason


def test_damaged_headers_and_what_is_no_tar_are_named(tmp_path: Path) -> None:
    plain = bytearray(write_tar(tmp_path / "whole.tar", MEMBERS).read_bytes())
    plain[2 * 1536 + 10] ^= 1
    (tmp_path / "flipped.tar").write_bytes(plain)
    content, skipped = read(tmp_path / "flipped.tar")
    assert list(content) == ["0.png", "1.png"]
    assert "no header where one belongs" in skipped[0].reason
    for name in ("text.tar", "text.tar.gz", "text.tar.xz"):
        (tmp_path / name).write_text("this is no tar at all" * 50)
        content, skipped = read(tmp_path / name)
        assert content == {}
        assert "damaged or cut off after its start" in skipped[0].reason


@pytest.mark.parametrize("kind", ["", "gz", "bz2", "xz"])
@pytest.mark.parametrize("name", ["right.tar.KIND", "no-ending", "wrong.tar", "wrong.tar.gz"])
def test_a_tar_is_known_by_what_it_holds(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / name.replace("KIND", kind).rstrip(".")
    write_tar(path, MEMBERS, kind)
    content, skipped = read(path)
    assert (content, skipped) == (dict(MEMBERS), [])


@pytest.mark.parametrize("kind", ["bz2", "xz"])
def test_a_damaged_compression_gives_what_came_before(tmp_path: Path, kind: str) -> None:
    noise = [(f"{number}.png", os.urandom(1_200_000)) for number in range(3)]
    path = write_tar(tmp_path / f"cut.tar.{kind}", noise, kind)
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[: len(whole) * 5 // 8])
    content, skipped = read(path)
    assert content == dict(noise[:1])
    assert "damaged or cut off after '0.png'" in skipped[0].reason


ARCHIVES = [
    ("shard.tar.zst", b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    ("shard", b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    ("list.tsv.gz", gzip.compress(b"a\ta.png\n", mtime=0), "compressed with gzip and holds no tar"),
    ("photos.zip", b"PK\3\4", "a zip archive"),
    ("photos.7z", b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    ("shard.tar.lzma", b"\x5d\0\0\x80\0" + b"\xff" * 8, "compressed with lzma"),
    ("shard.lz4", b"\x04\x22\x4d\x18", "compressed with lz4"),
]


@pytest.mark.parametrize(("name", "content", "what"), ARCHIVES)
def test_archives_that_are_not_read_are_refused_by_name(
    tmp_path: Path, name: str, content: bytes, what: str
) -> None:
    if "zstd" in what and find_spec("compression") is not None:
        pytest.skip("this Python reads zstd")
    (tmp_path / name).write_bytes(content + bytes(600))
    with pytest.raises(RequestError, match=what) as caught:
        open_source(tmp_path / name)
    assert "unpack it" in str(caught.value)


def linked_folders(tmp_path: Path) -> Path:
    """A folder with links to a folder elsewhere, to itself, and to what is above."""
    for name in ("photos/a.png", "photos/deep/b.png", "else/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "photos/deep/back").symlink_to(tmp_path / "photos")
    (tmp_path / "photos/more").symlink_to(tmp_path / "else")
    (tmp_path / "else/round").symlink_to(tmp_path / "photos/deep")
    (tmp_path / "photos/self.png").symlink_to("self.png")
    return tmp_path / "photos"


def test_links_to_folders_are_counted_where_they_are_not_followed(tmp_path: Path) -> None:
    source = open_source(linked_folders(tmp_path))
    assert list(source.ids()) == ["a.png", "deep/b.png", "self.png"]
    assert source.num_links == 2


def test_links_to_folders_are_followed_but_not_in_rings(tmp_path: Path) -> None:
    source = open_source(linked_folders(tmp_path), follow_links=True)
    ids = ["a.png", "deep/b.png", "more/c.png", "more/round/b.png", "self.png"]
    assert list(source.ids()) == ids
    assert source.num_links == 2, "each way to `photos`"
    assert [entry.id for entry in source.entries(everything)] == ids
    assert source.num_links == 2


def test_the_root_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(linked_folders(tmp_path))
    assert list(open_source(tmp_path / "link").ids()) == ["a.png", "deep/b.png", "self.png"]


def test_what_mkfs_left_in_a_disk_is_no_image(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from edje.runtime.indexing.sources import open_source\n"
        "print(*open_source(Path('disk')).ids())"
    )
    mounts = "mkdir disk; mount -t tmpfs none disk; mkdir -p disk/lost+found disk/b/lost+found"
    mounts += "; touch disk/a.png disk/lost+found/1.png disk/b/lost+found/2.png"
    assert run_with_mounts(mounts, code, tmp_path) == "a.png b/lost+found/2.png\n"


def test_a_size_that_leads_back_ends_the_tar(tmp_path: Path) -> None:
    info = tarfile.TarInfo("ring.png")
    info.pax_headers = {"size": "-2048"}
    with tarfile.open(tmp_path / "ring.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)
    _, skipped = read(tmp_path / "ring.tar")
    assert [entry.id for entry in skipped] == ["ring.tar"]


def test_an_id_is_known_again_however_many_came_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tars, "MAX_LATEST", 7)
    members = [(f"{number}.png", b"content") for number in range(60)]
    again = [members[number] for number in (59, 0, 33, 6, 7)]
    content, skipped = read(write_tar(tmp_path / "t.tar", [*members, *again]))
    assert list(content) == [name for name, _ in members]
    assert [entry.id for entry in skipped] == [name for name, _ in again]


def test_the_estimate_follows_the_bytes_read(tmp_path: Path) -> None:
    paths = [
        write_tar(tmp_path / f"{n}.tar", [(f"{n}-{i}.png", bytes(50_000)) for i in range(50)])
        for n in range(4)
    ]
    source = open_source(paths)
    estimates = [source.estimate(met) for met, _ in enumerate(source.entries(everything), 1)]
    assert estimates[49] == pytest.approx(200, rel=0.1)
    assert estimates[149] == pytest.approx(200, rel=0.1)
    assert source.estimate(200) == 200


@pytest.mark.parametrize("before", [b"", b"zero\tz.png\n"])
def test_a_byte_order_mark_in_a_list_is_no_part_of_an_id(tmp_path: Path, before: bytes) -> None:
    path = tmp_path / "list.tsv"
    path.write_bytes(before + b"\xef\xbb\xbfone\ta.png\r\ntwo\tb.png\r\n")
    assert list(open_source(path).ids())[-2:] == ["one", "two"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_a_list_in_utf_16_is_refused_with_what_makes_it_utf_8(
    tmp_path: Path, encoding: str
) -> None:
    path = tmp_path / "list.tsv"
    path.write_bytes("one\ta.png\n".encode(encoding))
    with pytest.raises(RequestError, match="is not a list of images") as caught:
        open_source(path)
    assert "iconv -f UTF-16" in str(caught.value)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_damage_that_only_the_checksum_shows_is_named(tmp_path: Path, kind: str) -> None:
    plain = write_tar(tmp_path / "whole.tar", MEMBERS).read_bytes()
    packed = bytearray(
        {"gz": partial(gzip.compress, compresslevel=0), "bz2": bz2.compress, "xz": lzma.compress}[
            kind
        ](plain)
    )
    if kind == "gz":
        packed[packed.index(bytes([2]) * 700) + 300] ^= 255  # stored: the pixels themselves
    else:
        packed[-6] ^= 255
    (tmp_path / f"flipped.tar.{kind}").write_bytes(packed)
    content, skipped = read(tmp_path / f"flipped.tar.{kind}")
    assert [entry.id for entry in skipped] == [f"flipped.tar.{kind}"]
    assert skipped[0].reason.startswith("the tar is damaged")
    if kind != "bz2":  # whose checksums stand before what they are of
        assert list(content) == [name for name, _ in MEMBERS]
        assert "any of them may be wrong" in skipped[0].reason


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_what_follows_the_end_of_a_tar_is_said_unless_it_is_zeros(
    tmp_path: Path, suffix: str
) -> None:
    first, second = (
        write_tar(tmp_path / f"{n}{suffix}", [MEMBERS[n]]).read_bytes() for n in range(2)
    )
    (tmp_path / f"cat{suffix}").write_bytes(first + second)
    content, skipped = read(tmp_path / f"cat{suffix}")
    assert content == dict(MEMBERS[:1])
    assert "more follows the mark of its end, which was not read" in skipped[0].reason
    (tmp_path / f"padded{suffix}").write_bytes(first + bytes(100_000))
    assert read(tmp_path / f"padded{suffix}") == (dict(MEMBERS[:1]), [])


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_a_sparse_member_is_read_and_so_is_what_follows(tmp_path: Path, kind: str) -> None:
    with (tmp_path / "sparse.png").open("wb") as file:
        file.write(b"head" * 1024)
        file.truncate(1 << 20)
    for name, content in MEMBERS:
        (tmp_path / name).write_bytes(content)
    command = ["tar", f"--format={kind}", "-S", "-cf", "s.tar", "sparse.png", *dict(MEMBERS)]
    if subprocess.run(command, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("this tar writes no sparse members")
    assert (tmp_path / "s.tar").stat().st_size < 1 << 20
    content, skipped = read(tmp_path / "s.tar")
    assert skipped == []
    assert content == {"sparse.png": (b"head" * 1024).ljust(1 << 20, b"\0"), **dict(MEMBERS)}
