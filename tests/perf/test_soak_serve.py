"""The soak of a server: what counts as growth, and that a server that leaks is caught."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from edje.perf import soak_serve as soak
from edje.perf.serve_traffic import ENGINE, STORE

LEAKING = Path(__file__).parents[1] / "support" / "leaking_server.py"


def samples_of(values: np.ndarray) -> list[dict[str, float]]:
    return [{"rss_mb": float(value), "fds": 20.0, "threads": 9.0} for value in values]


def faults_of(values: np.ndarray) -> list[str]:
    samples = samples_of(values)
    return soak.faults_of({name: soak.growth_of(samples, name) for name in soak.ALLOWED})


def test_a_line_is_growth_and_noise_and_warm_up_are_none():
    noise = np.random.default_rng(3).normal(0, 5, 900)
    assert not faults_of(300 + noise)
    assert not faults_of(300 + noise + np.minimum(np.arange(900), 250))  # of the first third
    assert not faults_of(300 + noise + np.where(np.arange(900) % 40 < 8, 80, 0))  # reloads
    (fault,) = faults_of(300 + noise + np.arange(900) * 0.05)
    assert fault.startswith("rss_mb grew by")


def test_few_samples_say_nothing():
    assert not faults_of(np.array([300.0, 310.0, 320.0]))


@pytest.fixture
def demo(tmp_path: Path, tiny_engine: Path, tiny_store: Path) -> Path:
    (tmp_path / ENGINE).symlink_to(tiny_engine)
    (tmp_path / STORE).symlink_to(tiny_store)
    queries = "".join(f'{{"query": "a photo of {word}"}}\n' for word in ("cats", "dogs"))
    (tmp_path / "queries.jsonl").write_text(queries, encoding="utf-8")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("leaks", [False, True])
def test_a_server_that_leaks_is_caught_and_a_sound_one_is_not(demo, tmp_path, monkeypatch, leaks):
    monkeypatch.setattr(soak, "SAMPLE_EVERY_S", 0.05)
    monkeypatch.setattr(soak, "RELOAD_EVERY_S", 4.0)
    if not leaks:  # in seconds memory still finds its level; files, threads and answers have theirs
        monkeypatch.setitem(soak.ALLOWED, "rss_mb", (0.0, 60.0))
        monkeypatch.setitem(soak.ALLOWED, "fds", (0.0, 10.0))
        monkeypatch.setitem(soak.ALLOWED, "threads", (0.0, 10.0))
    command = [sys.executable, str(LEAKING)] if leaks else soak.EDJE
    result = soak.measure(demo, 0.12, command, tmp_path, lambda line: None)
    assert result["answers_checked"] > 500
    faults = [fault.partition(" ")[0] for fault in result["faults"]]
    assert faults == (["rss_mb", "fds", "threads"] if leaks else []), soak.summary(result)
