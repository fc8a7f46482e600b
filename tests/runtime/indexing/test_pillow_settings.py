"""What the calling process has set in Pillow holds in the processes that decode for it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageFile, PngImagePlugin

import toy_format
from edje.bundle import ImageSpec
from edje.errors import RequestError
from edje.runtime.indexing.decoders import Decoded, DecoderPool
from edje.runtime.indexing.images import PillowSettings, Unreadable, pillow_set
from edje.runtime.indexing.sources import ImageFile as Entry
from edje.runtime.indexing.sources import open_source

SPEC = ImageSpec(8, 2, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Leave Pillow as it was."""
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    yield
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before
    toy_format.unregister()


def decoded(path: Path, settings: PillowSettings | None = None) -> Decoded:
    with DecoderPool(SPEC, 1, settings=settings) as pool:
        return pool.submit([Entry(path.name, path)]).result()[0]


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """An image of 120 pixels."""
    Image.new("RGB", (12, 10)).save(tmp_path / "large.png")
    return tmp_path / "large.png"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    with (tmp_path / "grey.toy").open("wb") as file:
        toy_format.write_toy(file, 77)
    return tmp_path / "grey.toy"


def test_the_pixel_limit_is_the_callers(large: Path) -> None:
    Image.MAX_IMAGE_PIXELS = 119
    found = decoded(large)
    assert found == Unreadable(
        "has 12 x 10 pixels, more than the limit of 119; --max-pixels raises it"
    )
    Image.MAX_IMAGE_PIXELS = None
    assert not isinstance(decoded(large), Unreadable)


def test_truncated_images_are_read_where_the_caller_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    assert isinstance(decoded(path), Unreadable)
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    assert not isinstance(decoded(path), Unreadable)


def test_other_limits_of_pillow_are_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = PngImagePlugin.PngInfo()
    note.add_text("note", "x" * 5000, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "noted.png", pnginfo=note)
    assert not isinstance(decoded(tmp_path / "noted.png"), Unreadable)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 100)
    assert isinstance(decoded(tmp_path / "noted.png"), Unreadable)


def test_a_registered_format_is_read(toy: Path) -> None:
    assert isinstance(decoded(toy), Unreadable)
    toy_format.register()
    found = decoded(toy)
    assert not isinstance(found, Unreadable)
    assert (found == 77).all()
    assert list(Image.ID).count("TOY") == 1


def test_settings_travel_as_bytes_to_other_machines(toy: Path) -> None:
    toy_format.register()
    sent = pickle.dumps(PillowSettings.of_this_process())
    toy_format.unregister()
    assert not isinstance(decoded(toy, pickle.loads(sent)), Unreadable)


def test_an_opener_that_a_decoder_has_not_got_is_named(toy: Path) -> None:
    missing = pickle.dumps(toy_format.ToyImageFile).replace(b"toy_format", b"toy_fotmar")
    settings = PillowSettings(openers=(("TOY", missing),))
    with pytest.raises(RequestError, match="the opener of TOY cannot be loaded") as caught:
        decoded(toy, settings)
    assert "No module named 'toy_fotmar'" in str(caught.value)


def test_an_opener_that_cannot_be_imported_elsewhere_is_refused(toy: Path) -> None:
    Image.register_open("TOY", lambda fp, name: toy_format.ToyImageFile(fp, name))
    with pytest.raises(RequestError, match="opener of TOY cannot reach the decoder processes"):
        DecoderPool(SPEC, 1)


def test_an_opener_of_the_script_itself_is_refused() -> None:
    code = (
        "from PIL import Image\n"
        "from edje.errors import RequestError\n"
        "from edje.runtime.indexing.images import PillowSettings\n"
        "class Mine: pass\n"
        "Image.register_open('MINE', Mine)\n"
        "try: PillowSettings.of_this_process()\n"
        "except RequestError as error: print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "defined in the script itself" in ran.stdout, ran.stderr


def test_a_plugin_is_loaded_by_its_name(toy: Path) -> None:
    with pillow_set(None, ["toy_format:register"]):
        assert not isinstance(decoded(toy), Unreadable)


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ("no_such_plugin", "No module named 'no_such_plugin'"),
        ("toy_format:no_such", "has no attribute 'no_such'"),
        ("toy_format", "registers no opener and sets nothing"),
    ],
)
def test_a_plugin_that_does_nothing_is_refused(plugin: str, message: str) -> None:
    with pytest.raises(RequestError, match=message), pillow_set(None, [plugin]):
        pytest.fail("the block must not run")


def test_the_limit_of_a_block_ends_with_it(large: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    with pillow_set(100, []):
        assert isinstance(decoded(large), Unreadable)
    with pillow_set(0, []):
        assert Image.MAX_IMAGE_PIXELS is None
    assert before == Image.MAX_IMAGE_PIXELS
    with pytest.raises(RequestError, match="max_pixels is -1"), pillow_set(-1, []):
        pytest.fail("the block must not run")


def test_members_of_tars_with_a_registered_ending_are_images(tmp_path: Path, toy: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(toy, "grey.toy")
    assert list(open_source(tmp_path / "t.tar").ids()) == []
    toy_format.register()
    assert list(open_source(tmp_path / "t.tar").ids()) == ["grey.toy"]
