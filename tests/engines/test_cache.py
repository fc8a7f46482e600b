"""The engine cache: one build a key, whole or not at all, and every option in the key."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import pytest

from edje.bundle import BundleManifest
from edje.engines.build_options import BuildOptions
from edje.engines.builder import cache
from edje.engines.builder.cache import cached_engine, default_root, entry_name, is_sound, key_parts
from edje.engines.builder.options import EngineOptions, EngineRequest
from edje.engines.fidelity import FidelityLimits
from edje.engines.manifest import EngineManifest
from edje.engines.registry import open_engine
from edje.engines.samples import RandomSamples
from edje.errors import CheckpointError, EngineError
from edje.files import open_lock, try_lock
from waiting import wait_until

PLAIN = {"backend": "onnxruntime", "precision": "fp32"}

# A builder in a process of its own. It says when it waits and when it builds, and goes on building
# while `hold` exists.
BUILDER = """
import sys, time
from pathlib import Path
from edje.engines.builder.cache import cached_engine
bundle, root, told = map(Path, sys.argv[1:])
def tell(step):
    word = step.split()[0]
    with (told / word).open("a") as file:
        file.write(word + "\\n")
    if word == "building":
        while (told / "hold").exists():
            time.sleep(0.01)
print(cached_engine(bundle, root, backend="onnxruntime", precision="fp32", progress=tell))
"""


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def start(tiny_bundle, tmp_path, root):
    """Start a builder process; what it does is a line of `tmp_path/building` or `waiting`."""
    running = []

    def begin():
        words = [sys.executable, "-c", BUILDER, str(tiny_bundle), str(root), str(tmp_path)]
        running.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def builds(monkeypatch, tmp_path, built_engines):
    """Builds by copying, counted: the list of engines that were built."""
    done = []

    def copy(request, out, *, progress, shallow):
        shutil.copytree(built_engines[request.backend], out)
        done.append(out)

    monkeypatch.setattr(cache, "build_one", copy)
    return done


def plain_request(bundle):
    return EngineRequest(bundle, **PLAIN, calibration=None, options=EngineOptions())


def num_lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def visible(root):
    return sorted(path.name for path in root.iterdir() if not path.name.startswith("."))


def test_an_entry_is_an_engine_and_is_found_again(tiny_bundle, root):
    steps = []
    folder = cached_engine(tiny_bundle, root, **PLAIN, progress=steps.append)
    assert folder.parent == root
    assert folder.name.endswith("-onnxruntime-fp32")
    assert len(folder.name) == 16 + len("-onnxruntime-fp32")
    assert any(step.startswith("building onnxruntime") for step in steps)
    open_engine(folder).close()
    again = []
    assert cached_engine(tiny_bundle, root, **PLAIN, progress=again.append) == folder
    assert again == []


def test_eight_processes_build_one_engine_once(start, tmp_path, root):
    (tmp_path / "hold").touch()
    processes = [start() for _ in range(8)]
    wait_until(lambda: num_lines(tmp_path / "waiting") >= 7)
    (tmp_path / "hold").unlink()
    folders = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0] * 8
    assert folders == {str(root / name) for name in visible(root)}
    assert len(folders) == 1
    assert (tmp_path / "building").read_text() == "building\n"
    open_engine(folders.pop()).close()


def test_a_killed_builder_leaves_no_engine_and_is_swept(start, tmp_path, root, tiny_bundle):
    (tmp_path / "hold").touch()
    process = start()
    wait_until(lambda: num_lines(tmp_path / "building") >= 1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert visible(root) == []
    assert [path for path in root.iterdir() if path.is_dir()]  # its half-built folder
    folder = cached_engine(tiny_bundle, root, **PLAIN)
    assert visible(root) == [folder.name]
    assert [path for path in root.iterdir() if path.is_dir()] == [folder]
    open_engine(folder).close()


def test_threads_build_once_and_different_engines_apart(tiny_bundle, root, builds):
    waiting = threading.Barrier(8)

    def ask(number):
        waiting.wait()
        options = EngineOptions(max_pairs=1 + number % 2)
        return cached_engine(tiny_bundle, root, **PLAIN, options=options)

    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(ask, range(8)))
    assert len(folders) == 2
    assert sorted(builds) == sorted(folders)


def test_leftovers_of_other_keys_are_swept_unless_they_are_being_built(tiny_bundle, root, builds):
    other = "0123456789abcdef-tensorrt-rtx-fp8"
    left, unrelated = root / f".{other}.xyz", root / ".trash"
    for folder in (left, unrelated):
        (folder / "deep").mkdir(parents=True)
    lock = open_lock(root / f".{other}.lock")
    assert try_lock(lock) is None
    cached_engine(tiny_bundle, root, **PLAIN)
    assert left.exists()
    os.close(lock)
    cached_engine(tiny_bundle, root, **PLAIN, options=EngineOptions(max_pairs=3))
    assert not left.exists()
    assert unrelated.exists()


@pytest.mark.parametrize("damage", ["flip", "lose", "manifest", "foreign", "empty"])
def test_a_damaged_entry_is_built_again(tiny_bundle, root, builds, built_engines, damage):
    folder = cached_engine(tiny_bundle, root, **PLAIN)
    model = folder / "joint_encoder.onnx"
    if damage == "flip":
        model.write_bytes(model.read_bytes()[:-1] + b"!")
    elif damage == "lose":
        model.unlink()
    elif damage == "manifest":
        (folder / "engine.json").write_text("{")
    elif damage == "foreign":
        shutil.rmtree(folder)
        shutil.copytree(built_engines["openvino"], folder)
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    assert cached_engine(tiny_bundle, root, **PLAIN) == folder
    assert len(builds) == 2
    assert is_sound(folder, key_parts(plain_request(tiny_bundle)))


def test_a_failed_build_leaves_nothing_and_the_next_one_runs(tiny_bundle, root, monkeypatch):
    def fail(job):
        (job.out / "half").touch()
        raise EngineError("no luck")

    with monkeypatch.context() as broken:
        broken.setattr("edje.engines.onnxruntime.build", fail)
        with pytest.raises(EngineError, match="no luck"):
            cached_engine(tiny_bundle, root, **PLAIN)
    assert [path for path in root.iterdir() if path.is_dir()] == []
    assert cached_engine(tiny_bundle, root, **PLAIN).is_dir()


def test_a_bundle_that_changes_meanwhile_gives_no_entry(tiny_bundle, root, builds, tmp_path):
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    graph = bundle / "joint_encoder.onnx"
    graph.write_bytes(graph.read_bytes() + b"!")  # the copied engine is of the graph before
    with pytest.raises(EngineError, match="changed while"):
        cached_engine(bundle, root, **PLAIN)
    assert visible(root) == []


def test_a_root_without_locks_is_named(tiny_bundle, root, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(EngineError, match="its file system offers no locks") as caught:
        cached_engine(tiny_bundle, root, **PLAIN)
    assert str(root) in str(caught.value)
    assert "EDJE_CACHE" in caught.value.hint


def test_the_root_comes_from_the_environment_or_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("EDJE_CACHE", str(tmp_path / "there"))
    assert default_root() == tmp_path / "there"
    monkeypatch.delenv("EDJE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root() == tmp_path / ".cache" / "edje" / "engines"


def test_what_cannot_be_is_refused_before_anything_is_written(tiny_bundle, root, tmp_path):
    with pytest.raises(CheckpointError):
        cached_engine(tmp_path / "nowhere", root, **PLAIN)
    with pytest.raises(EngineError, match="unknown backend"):
        cached_engine(tiny_bundle, root, backend="abacus", precision="fp32")
    with pytest.raises(EngineError, match="no engine can have this profile"):
        cached_engine(tiny_bundle, root, **PLAIN, options=EngineOptions(max_pairs=0))
    with pytest.raises(EngineError, match="unknown backend 'auto'"):
        cached_engine(tiny_bundle, root, backend="auto", precision="fp32")
    assert not root.exists()
    with pytest.raises(EngineError, match="EDJE_CACHE"):
        cached_engine(tiny_bundle, Path("/proc/cache"), **PLAIN)


# Another value for every option of a build. Those of the backend have their own list below.
OTHERS = {
    "max_pairs": 7,
    "text_buckets": (16, 64),
    "token_dtype": "int8",
    "limits": FidelityLimits(min_kendall_tau=0.5),
    "role": "first",
    "layers": 1,
    "image_encoder": True,
}
OPTIONS = {
    "workspace_bytes": 1,
    "optimization_level": 3,
    "compute_capabilities": ("8.9",),
    "hardware_compatible": True,
    "version_compatible": True,
    "report": True,
}


@contextmanager
def any_backend():
    """A backend that takes every precision and option."""

    class Anything:
        version = staticmethod(lambda: "1")
        device = staticmethod(lambda precision, options: {"kind": "cpu"})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "require_builder", lambda *_: Anything)
        yield


def name_of(bundle, options=None, **changes):
    request = replace(plain_request(bundle), options=options or EngineOptions())
    return entry_name(key_parts(replace(request, **changes)))


def test_the_tables_know_every_argument_and_every_option():
    names = {field.name for field in fields(EngineOptions)}
    assert names == OTHERS.keys() | {"backend_options"}
    asked = {field.name for field in fields(EngineRequest)}
    assert asked == {"bundle", "backend", "precision", "calibration", "options"}
    assert OPTIONS.keys() == {field.name for field in fields(BuildOptions)}


def test_every_option_of_its_own_changes_the_key(tiny_bundle):
    bundle = BundleManifest.read(tiny_bundle)
    backend_options = [BuildOptions(**{name: value}) for name, value in OPTIONS.items()]
    options = [{name: value} for name, value in OTHERS.items()]
    options += [{"backend_options": one} for one in backend_options]
    changes = [{}, {"precision": "int8"}, {"backend": "openvino"}]
    changes += [{"options": EngineOptions(**one)} for one in options]
    changes += [{"calibration": RandomSamples(bundle, count)} for count in (2, 3)]
    with any_backend():
        keys = {name_of(tiny_bundle, **change)[:16] for change in changes}
    assert len(keys) == len(changes)


def test_the_same_build_in_other_words_has_the_same_key(tiny_bundle):
    plain = name_of(tiny_bundle)
    buckets = [63, 15, 23, 31, 47, 15]
    limits = EngineOptions().limits_to_hold
    said = EngineOptions(text_buckets=buckets, max_pairs=256, limits=limits)
    assert name_of(tiny_bundle, said) == plain


def test_the_bundle_the_library_and_the_device_are_in_the_key(tiny_bundle, tmp_path, monkeypatch):
    keys = [name_of(tiny_bundle)]
    for name in ("joint_encoder.onnx", "tokenizer.json"):
        bundle = Path(shutil.copytree(tiny_bundle, tmp_path / name))
        (bundle / name).write_bytes((bundle / name).read_bytes() + b" ")
        keys.append(name_of(bundle))
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "text"))
    values = json.loads((bundle / "edje.json").read_text())
    values["text"]["normalization"] = "none"
    (bundle / "edje.json").write_text(json.dumps(values))
    keys.append(name_of(bundle))
    for name, other in (("version", "0.0"), ("device", {"kind": "cpu", "model": "other"})):
        with monkeypatch.context() as patch:
            patch.setattr(f"edje.engines.onnxruntime.{name}", lambda *_, other=other: other)
            keys.append(name_of(tiny_bundle))
    assert len(set(keys)) == len(keys)
    values["provenance"] = {"made": "elsewhere"}
    (bundle / "edje.json").write_text(json.dumps(values))
    assert name_of(bundle) == keys[3]
    with pytest.raises(EngineError, match="limits"):
        name_of(tiny_bundle, EngineOptions(limits=object()))


def test_the_engine_of_an_entry_is_that_of_a_plain_build(tiny_bundle, root, built_engines):
    folder = cached_engine(tiny_bundle, root, **PLAIN)
    cached, plain = (EngineManifest.read(f) for f in (folder, built_engines["onnxruntime"]))
    assert replace(cached, build_seconds=0.0) == replace(plain, build_seconds=0.0)
