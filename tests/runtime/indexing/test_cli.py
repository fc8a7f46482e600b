"""`edje index` as users type it, and the devices that it can name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import toy_format
from edje.engines.image import ImageEncoder
from edje.errors import EngineError, RequestError
from edje.runtime.cli.app import main
from edje.runtime.store import TokenStore
from image_files import png, write_tar
from mean_bundle import FEATURE_DIM, HIDDEN, NUM_TOKENS, SIZE, make_bundle
from thread_counts import pretend_quota, watch_threads


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Thirty images, and thirty files that are none."""
    (tmp_path / "photos").mkdir()
    for number in range(30):
        Image.new("RGB", (5, 5), (8 * number,) * 3).save(tmp_path / f"photos/{number:02}.png")
        (tmp_path / f"photos/{number:02}.txt").write_text("a caption")
    return tmp_path / "photos"


def ids_of(store: Path) -> list[str]:
    with TokenStore.open(store) as opened:
        return opened.ids()


def test_many_skipped_files_are_counted_and_some_named(
    tmp_path: Path, bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", str(bundle), str(photos), "--store", str(tmp_path / "s"), "--json"]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert (report["indexed"], report["num_skipped"], len(report["skipped"])) == (30, 30, 30)
    assert report["encoder"].startswith("openvino ")
    assert report["encoder"].endswith(" cpu")
    assert shown.err.count("was skipped: not an image of a known format") == 20
    assert f"10 more were skipped: {tmp_path / 's/skipped.jsonl'} names all" in shown.err


def test_a_part_goes_into_a_new_store(
    tmp_path: Path, bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "redo.txt").write_text("04.png\n11.png\n")
    part = [str(bundle), str(photos), "--into", str(tmp_path / "new"), "--dtype", "int8"]
    assert main(["index", *part, "--from", str(tmp_path / "redo.txt"), "--workers", "1"]) == 0
    assert ids_of(tmp_path / "new") == ["04.png", "11.png"]
    with TokenStore.open(tmp_path / "new") as store:
        assert store.layout.dtype == "int8"
        out = np.empty((2, NUM_TOKENS, HIDDEN), np.int8)
        store.read(store.rows(["04.png", "11.png"]), out, np.empty((2, NUM_TOKENS), np.float16))
    assert np.abs(out).max() == 127
    assert main(["index", *part[:-1], "float16"]) == 2
    assert "holds int8 tokens, asked for were float16" in capsys.readouterr().err
    (tmp_path / "redo.txt").write_text("04.png\nno such.png\n")
    assert main(["index", *part, "--only", str(tmp_path / "redo.txt")]) == 2
    assert "1 of 2 ids are not in" in capsys.readouterr().err


def test_features_and_tars(
    tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "f.npy", np.ones((2, 3, FEATURE_DIM), np.float16))
    (tmp_path / "names").write_text("one\ntwo\n")
    features = ["--features", str(tmp_path / "f.npy"), "--ids", str(tmp_path / "names")]
    assert main(["index", str(bundle), *features, "--store", str(tmp_path / "s")]) == 0
    for number in (1, 2):
        write_tar(tmp_path / f"{number}.tar", [(f"{number}.png", png())])
    tars = [str(tmp_path / f"{number}.tar") for number in (1, 2)]
    assert main(["index", str(bundle), *tars, "--store", str(tmp_path / "s")]) == 0
    assert "2/2" in capsys.readouterr().err, "the bar ends at the number of images"
    assert ids_of(tmp_path / "s") == ["one", "two", "1.png", "2.png"]


def test_options_that_contradict_each_other_are_all_named(
    tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [str(bundle), "--store", str(tmp_path / "s")]
    assert main(["index", *common, "--ids", "ids.txt"]) == 2
    message = capsys.readouterr().err
    assert "IMAGES and --features: expected one of them" in message
    assert "--ids: it names the rows of --features" in message
    assert main(["index", *common, "photos", "--device", "tpu"]) == 2
    assert "device is 'tpu', expected one of auto, cpu, cuda" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_cuda_that_is_not_there_is_an_error_and_auto_says_what_ran(bundle: Path) -> None:
    with pytest.raises(EngineError, match="cannot run on CUDA here") as caught:
        ImageEncoder.open(bundle, device="cuda")
    assert "--device cpu" in str(caught.value)
    with pytest.raises(RequestError, match="device is 'gpu'"):
        ImageEncoder.open(bundle, device="gpu")
    assert ImageEncoder.open(bundle, device="cpu").name.endswith(" cpu")


def fake_onnxruntime(works: bool) -> SimpleNamespace:
    """An ONNX Runtime that was built with CUDA, on a machine where CUDA works or does not."""

    class InferenceSession:
        def __init__(self, path: str, providers: list[Any]):
            names = [p if isinstance(p, str) else p[0] for p in providers]
            self.providers = names if works else names[1:]
            assert ("CUDAExecutionProvider", {"use_tf32": "0"}) in providers

        def get_providers(self) -> list[str]:
            return self.providers

        def get_inputs(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(name="pixels")]

        def run(self, _: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [np.zeros((len(inputs["pixels"]), NUM_TOKENS, HIDDEN), np.float16)]

    return SimpleNamespace(
        __version__="1.99",
        InferenceSession=InferenceSession,
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )


@pytest.mark.parametrize("missing", [None, "openvino"])
def test_the_image_encoder_starts_the_threads_of_the_quota(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, missing: str | None
) -> None:
    pretend_quota(monkeypatch, 2.5)
    started = watch_threads(monkeypatch)
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    ImageEncoder.open(bundle, device="cpu")
    assert started == [3]


def test_auto_takes_cuda_only_where_it_really_runs(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", fake_onnxruntime(works=True))
    for device in ("auto", "cuda"):
        encoder = ImageEncoder.open(bundle, device=device)
        assert encoder.name == "onnxruntime 1.99 cuda"
        tokens = encoder.encode(np.zeros((2, 3, SIZE, SIZE), np.float32))
        assert tokens.shape == (2, NUM_TOKENS, HIDDEN)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake_onnxruntime(works=False))
    assert ImageEncoder.open(bundle).name.startswith("openvino ")
    with pytest.raises(EngineError, match="cannot start CUDAExecutionProvider"):
        ImageEncoder.open(bundle, device="cuda")


def index(bundle: Path, photos: Path, store: Path, *options: str) -> int:
    return main(["index", str(bundle), str(photos), "--store", str(store), *options])


def test_a_run_that_could_read_nothing_exits_with_1(
    tmp_path: Path, bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in photos.glob("*.png"):
        path.write_bytes(b"")
    assert index(bundle, photos, tmp_path / "s", "--json") == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["num_skipped"] == 60
    assert f"nothing could be read, 60 skipped: {tmp_path / 's/skipped.jsonl'}" in shown.err
    (photos / "00.png").write_bytes(png())
    assert index(bundle, photos, tmp_path / "s") == 0
    assert index(bundle, photos, tmp_path / "s") == 0, "what is there already counts"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], 0),
        (["--strict"], 1),
        (["--max-skipped", "30"], 0),
        (["--max-skipped", "29"], 1),
        (["--max-skipped", "0"], 1),
    ],
)
def test_skips_that_are_not_allowed_exit_with_1_when_all_else_is_indexed(
    tmp_path: Path,
    bundle: Path,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
) -> None:
    assert index(bundle, photos, tmp_path / "s", "--json", *options) == code
    shown = capsys.readouterr()
    assert json.loads(shown.out)["indexed"] == 30
    assert len(ids_of(tmp_path / "s")) == 30
    allowed = options[-1] if options[1:] else "0"
    assert (f"30 skipped, {allowed} allowed" in shown.err) == bool(code)


def test_a_run_without_skips_is_well_however_strict(
    tmp_path: Path, bundle: Path, photos: Path
) -> None:
    for path in photos.glob("*.txt"):
        path.unlink()
    for option in (["--strict"], ["--max-skipped", "0"]):
        assert index(bundle, photos, tmp_path / "s", *option) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strict", "--max-skipped", "3"], "give one of them"),
        (["--max-skipped", "-1"], "--max-skipped is -1"),
        (["--max-pixels", "-1"], "max_pixels is -1"),
        (["--plugin", "no_such_plugin"], "the plugin no_such_plugin cannot be loaded"),
    ],
)
def test_options_that_cannot_be_are_refused(
    tmp_path: Path,
    bundle: Path,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert index(bundle, photos, tmp_path / "s", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_pixels_and_formats_are_options(tmp_path: Path, bundle: Path, photos: Path) -> None:
    with (photos / "grey.toy").open("wb") as file:
        toy_format.write_toy(file, 77)
    try:
        plugin = ["--plugin", "toy_format:register"]
        assert index(bundle, photos, tmp_path / "s", "--max-pixels", "24", *plugin) == 0
    finally:
        toy_format.unregister()
    assert ids_of(tmp_path / "s") == ["grey.toy"]
    assert index(bundle, photos, tmp_path / "all", "--max-pixels", "0") == 0
    assert len(ids_of(tmp_path / "all")) == 30


def test_links_to_folders_are_said_or_followed(
    tmp_path: Path, bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/x.png").write_bytes(png())
    (photos / "linked").symlink_to(tmp_path / "more")
    (tmp_path / "more/back").symlink_to(photos)
    assert index(bundle, photos, tmp_path / "s", "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["num_links"] == 1
    assert "1 links to folders were not followed; --follow-links follows them" in shown.err
    assert index(bundle, photos, tmp_path / "s", "--follow-links") == 0
    assert "1 links to folders lead back to one above" in capsys.readouterr().err
    assert "linked/x.png" in ids_of(tmp_path / "s")


def test_links_to_folders_of_features_are_followed_too(
    tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("features/a.npy", "else/b.npy"):
        (tmp_path / name).parent.mkdir()
        np.save(tmp_path / name, np.ones((3, FEATURE_DIM), np.float16))
    (tmp_path / "features/linked").symlink_to(tmp_path / "else")
    common = ["index", str(bundle), "--features", str(tmp_path / "features")]
    assert main([*common, "--store", str(tmp_path / "s")]) == 0
    assert "1 links to folders were not followed" in capsys.readouterr().err
    assert main([*common, "--store", str(tmp_path / "s"), "--follow-links"]) == 0
    assert ids_of(tmp_path / "s") == ["a", "linked/b"]


def test_nobody_at_the_address_of_ray_is_one_sentence(
    tmp_path: Path, bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray.data", reason="needs edje-runtime[cluster]")
    assert index(bundle, photos, tmp_path / "s", "--ray", "127.0.0.1:1") == 2
    shown = capsys.readouterr().err
    assert "cannot connect to the Ray cluster 127.0.0.1:1: Connection refused" in shown
    assert not (tmp_path / "s").exists()
