"""Tars through a whole run: right records, or a line in skipped.jsonl; and what it says later."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edje.engines.image import ImageEncoder, pixels_from_rgb
from edje.runtime.indexing.flow import SkippedLog, read_skipped
from edje.runtime.indexing.images import rgb_from_image
from edje.runtime.indexing.index import index_images
from edje.runtime.indexing.sources import SkippedImage
from image_files import encoded, noise, write_tar
from mean_bundle import make_bundle, records, scale_of


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> ImageEncoder:
    """A tiny image encoder: tokens are mean colours times constants."""
    return ImageEncoder.open(make_bundle(tmp_path_factory.mktemp("encoder") / "bundle"))


def bomb(side: int) -> bytes:
    """A PNG that says it has `side` x `side` pixels, in a hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def nasty_members() -> dict[str, bytes]:
    jpeg = encoded(noise("RGB"), "JPEG")
    frames = [noise("RGB", 20, 20).rotate(90 * n) for n in range(3)]
    return {
        "plain.jpg": jpeg,
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "zero.png": b"",
        "cmyk.jpg": encoded(noise("CMYK"), "JPEG"),
        "sixteen.png": encoded(noise("I;16"), "PNG"),
        "palette.png": encoded(noise("RGB").convert("P"), "PNG", transparency=3),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "large.bomb.png": bomb(10_000),  # Pillow itself only warns of this one
        "huge.bomb.png": bomb(60_000),
        "plain.txt": b"a caption",
        "plain.json": b"{}",
        "plain.cls": b"3",
        "text.png": b"this is no image",
        "bits.tif": encoded(noise("1"), "TIFF"),
        "sub/alpha.png": encoded(noise("RGBA"), "PNG"),
    }


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_nasty_members_give_right_records_or_a_reason(
    tmp_path: Path, encoder: ImageEncoder, suffix: str
) -> None:
    members = nasty_members()
    path = write_tar(tmp_path / f"nasty{suffix}", members.items())
    report = index_images(encoder, path, tmp_path / "s", batch_size=4, workers=2)
    reasons = {entry.id: entry.reason for entry in report.skipped}
    assert reasons.pop("truncated.jpg").startswith("cannot be decoded: image file is truncated")
    assert reasons.pop("large.bomb.png").startswith("has 10,000 x 10,000 pixels, more than")
    assert reasons.pop("huge.bomb.png").startswith("has 3,600,000,000 pixels, more than")
    assert reasons == {"zero.png": "is empty", "text.png": "not an image of a known format"}
    assert report.num_ignored == 3
    found = records(tmp_path / "s")
    good = ["plain.jpg", "cmyk.jpg", "sixteen.png", "palette.png"]
    good += ["animated.gif", "animated.webp", "bits.tif", "sub/alpha.png"]
    assert list(found) == good, "in the order of the tar"
    for name, tokens in found.items():
        with Image.open(io.BytesIO(members[name])) as image:
            pixels = pixels_from_rgb(rgb_from_image(image, encoder.image), encoder.image)
        expected = pixels.mean(axis=(1, 2)) @ scale_of(3)
        found_tokens = np.frombuffer(tokens, np.float16)
        np.testing.assert_allclose(found_tokens, expected, rtol=2e-3, atol=2e-3, err_msg=name)
    again = index_images(encoder, path, tmp_path / "s", batch_size=4)
    assert (again.indexed, again.already_present, again.num_skipped) == (0, 8, 5)
    assert sorted(again.skipped) == sorted(report.skipped)


def test_a_cut_tar_is_indexed_as_far_as_it_goes_and_again_when_it_is_whole(
    tmp_path: Path, encoder: ImageEncoder
) -> None:
    members = {f"{n}.png": encoded(noise("RGB", 10 + n), "PNG") for n in range(6)}
    path = write_tar(tmp_path / "shard.tar", members.items())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    report = index_images(encoder, path, tmp_path / "s")
    assert 0 < report.indexed < 6
    (entry,) = read_skipped(tmp_path / "s")
    assert (entry.id, entry.source) == ("shard.tar", str(path))
    assert "damaged or cut off after" in entry.reason
    path.write_bytes(whole)
    report = index_images(encoder, path, tmp_path / "s")
    assert report.indexed + report.already_present == 6
    assert read_skipped(tmp_path / "s") == []
    assert not (tmp_path / "s/skipped.jsonl").exists()


def test_skipped_jsonl_shows_the_truth_after_every_run(
    tmp_path: Path, encoder: ImageEncoder
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        for name in ("bad.png", "worse.png"):
            (folder / f"{folder.name}-{name}").write_text("no image")
        noise("RGB").save(folder / f"{folder.name}-good.png")
    bad_name = os.fsdecode(b"\xff.png")
    (one / bad_name).write_text("no image")
    index_images(encoder, one, tmp_path / "s")
    index_images(encoder, two, tmp_path / "s")
    lines = (tmp_path / "s/skipped.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {
        "id": "two-bad.png",
        "reason": "not an image of a known format",
        "source": str(two),
    }
    ids = [json.loads(line)["id"] for line in lines]
    assert ids == ["two-bad.png", "two-worse.png", *("\\udcff.png", "one-bad.png", "one-worse.png")]
    noise("RGB").save(one / "one-bad.png")  # mended
    (one / "one-worse.png").unlink()  # gone
    seen: list[SkippedImage] = []
    report = index_images(encoder, one, tmp_path / "s", on_skip=seen.append)
    assert (report.indexed, report.num_skipped) == (1, 1)
    assert [entry.id for entry in seen] == ["\\udcff.png"]
    ids = [entry.id for entry in read_skipped(tmp_path / "s")]
    assert ids == ["\\udcff.png", "two-bad.png", "two-worse.png"]


def test_a_kill_leaves_lines_that_the_next_run_replaces(tmp_path: Path) -> None:
    old = SkippedImage("a", "an earlier reason", "/images")
    with SkippedLog(tmp_path) as log:
        log.add(old)
        log.add(SkippedImage("b", "r", "/images"))
    with (tmp_path / "skipped.jsonl").open("ab") as file:
        file.write(b'{"id": "torn", "rea')
    with SkippedLog(tmp_path) as log:
        log.add(SkippedImage("a", "now", "/images"))
        log.add(SkippedImage("a", "twice in a run", "/images"))
        assert [entry.reason for entry in read_skipped(tmp_path)][:2] == ["an earlier reason", "r"]
        log.finish(lambda entry: entry.id == "c")
    assert [(e.id, e.reason) for e in read_skipped(tmp_path)] == [("a", "now"), ("b", "r")]
    assert [path.name for path in tmp_path.iterdir()] == ["skipped.jsonl"]


def test_only_listed_ids_are_indexed_and_ids_that_are_not_there_are_named(
    tmp_path: Path, encoder: ImageEncoder
) -> None:
    members = {f"{n}.png": encoded(noise("RGB", 10 + n), "PNG") for n in range(6)}
    path = write_tar(tmp_path / "shard.tar", members.items())
    with pytest.raises(Exception, match=r"2 of 3 ids are not in .*shard\.tar: 'x', 'y'"):
        index_images(encoder, path, tmp_path / "s", only={"y", "1.png", "x"})
    assert not (tmp_path / "s").exists()
    calls: list[tuple[int, int]] = []
    report = index_images(
        encoder,
        path,
        tmp_path / "s",
        only={"4.png", "1.png"},
        progress=lambda done, total: calls.append((done, total)),
    )
    assert (report.indexed, list(records(tmp_path / "s"))) == (2, ["1.png", "4.png"])
    assert calls[-1] == (2, 2)


def test_a_tar_without_images_is_an_error(tmp_path: Path, encoder: ImageEncoder) -> None:
    path = write_tar(tmp_path / "captions.tar", [("a.txt", b"a caption")])
    with pytest.raises(Exception, match=r"captions\.tar holds no images"):
        index_images(encoder, path, tmp_path / "s")
