"""Stages on a tiny engine: each is there, handles what it says, and finds wrong results."""

from __future__ import annotations

import numpy as np
import pytest

from edje.engines.manifest import Profile
from edje.errors import EdjeError
from edje.perf import stages as perf_stages
from edje.perf.free_engine import FreeEngine, write_free_engine
from edje.perf.gpu_engines import manifest_of
from edje.perf.stages import NAMES, open_stages
from edje.runtime.store import TokenStore
from on_addresses import OnAddresses

ON_THE_HOST = [name for name in NAMES if name not in ("upload", "download")]


@pytest.fixture
def free_engine(tiny_bundle, tmp_path):
    """Engine folder whose engine takes no time, of the tiny model's sizes."""
    return write_free_engine(tiny_bundle, tmp_path / "free", Profile(16, (16, 32, 64)))


@pytest.mark.parametrize("engine", ["tiny_engine", "free_engine"])
def test_every_stage_runs_is_right_and_knows_its_pairs(engine, request, tmp_path):
    folder = request.getfixturevalue(engine)
    given = {"candidates": 20, "batch": 8, "images": 30, "wordpieces": 3}
    with open_stages(folder, scratch=tmp_path, **given) as stages:
        assert list(stages) == ON_THE_HOST
        for stage in stages.values():
            stage.run()
            stage.check()
        pairs = {name: stage.pairs for name, stage in stages.items()}
    assert pairs.pop("read") == pairs.pop("forward") == pairs.pop("enqueue") == 7  # 7 + 7 + 6
    assert set(pairs.values()) == {20}


def test_a_store_and_a_query_of_the_users_own(tiny_engine, tiny_store, tmp_path):
    given = {"candidates": 5, "store": tiny_store, "query": "a dog", "only": ["resolve", "rank"]}
    with open_stages(tiny_engine, scratch=tmp_path, **given) as stages:
        assert list(stages) == ["resolve", "rank"]
        stages["rank"].run()
        stages["rank"].check()


@pytest.mark.parametrize("residency", [None, "device"])
def test_a_gpu_has_both_copies_as_well(
    tiny_bundle, tmp_path, pretended_gpu, monkeypatch, residency
):
    """Without `serve`, whose process would need a real one."""
    manifest = manifest_of(tiny_bundle, "stand-in", "0", "fp16", Profile(16, (16, 32, 64)))
    folder = write_free_engine(tiny_bundle, tmp_path / "gpu", manifest.profile)
    manifest.write(folder)
    engine = OnAddresses(manifest, lambda batch: batch.visual_tokens[:, 0, 0].astype(np.float32))
    monkeypatch.setattr(perf_stages, "open_engine", lambda folder, options: engine)
    only = [name for name in NAMES if name != "serve"]
    given = {"candidates": 20, "images": 30, "wordpieces": 3, "residency": residency}
    with open_stages(folder, scratch=tmp_path, only=only, **given) as stages:
        assert list(stages) == only
        for stage in stages.values():
            stage.run()
            stage.check()


def test_wrong_scores_are_found(free_engine, tmp_path, monkeypatch):
    given = {"candidates": 20, "images": 30, "wordpieces": 3, "only": ["forward", "rank"]}
    with open_stages(free_engine, scratch=tmp_path, warm=False, **given) as stages:
        wrong = iter(range(10_000))

        def infer(self, batch, scores):
            scores[:] = next(wrong)

        monkeypatch.setattr(FreeEngine, "_infer", infer)
        for stage in stages.values():
            with pytest.raises(EdjeError, match=f"{stage.name}: .*nothing is reported"):
                stage.check()


def test_a_damaged_record_is_found(free_engine, tmp_path):
    given = {"candidates": 20, "images": 30, "wordpieces": 3, "only": ["read"]}
    with open_stages(free_engine, scratch=tmp_path, **given) as stages:
        for file in (tmp_path / "tokens.store" / "segments").iterdir():
            content = bytearray(file.read_bytes())
            content[4096::64] = bytes(len(content[4096::64]))
            file.write_bytes(content)
        with pytest.raises(EdjeError, match="read: damaged records"):
            stages["read"].run()


def test_records_beyond_the_real_ones_are_holes(free_engine, tmp_path, monkeypatch):
    monkeypatch.setattr(perf_stages, "MAX_KNOWN", 10)
    monkeypatch.setattr("edje.perf.subjects.MAX_KNOWN", 10)
    given = {"candidates": 40, "images": 50, "wordpieces": 3, "only": ["resolve", "read", "rank"]}
    with open_stages(free_engine, scratch=tmp_path, **given) as stages:
        assert len(stages) == 3
    with TokenStore.open(tmp_path / "tokens.store") as store:
        assert len(store) == 50
        tokens = np.empty((1, *store.record_shape), np.float16)
        assert store.read(store.live_rows()[:1], tokens) == []
        assert tokens.any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"only": ["reed"]}, "no stage is called reed, expected tokenise, resolve"),
        ({"candidates": 40, "images": 30}, "40 candidates of 30 images, expected 1 to 30"),
        ({"wordpieces": 400}, "no text of 400 wordpieces"),
        ({"free": True}, "name none"),
    ],
)
def test_what_cannot_be_measured_is_said(free_engine, tmp_path, given, message):
    whole = {"candidates": 20, "images": 30, "wordpieces": 3, **given}
    with (
        pytest.raises(EdjeError, match=message),
        open_stages(free_engine, scratch=tmp_path, **whole),
    ):
        pass
