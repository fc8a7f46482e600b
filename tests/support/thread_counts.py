"""A machine with a CPU quota, and how many threads the real libraries are told to start on it."""

from __future__ import annotations

import os

import onnxruntime
import openvino
import pytest

LIBRARYS_CHOICE = 0


def pretend_quota(monkeypatch: pytest.MonkeyPatch, quota: float | None) -> None:
    """Pretend eight cores, of which this process may use the time of `quota`."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr("edje.machine.cpu_quota", lambda root: quota)


def watch_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the threads of every model that either library opens."""
    started: list[int] = []
    session, compiled = onnxruntime.InferenceSession, openvino.Core.compile_model

    def open_session(model, options, **more):
        started.append(options.intra_op_num_threads)
        return session(model, options, **more)

    def compile_model(core, model, device, settings):
        started.append(int(settings.get("INFERENCE_NUM_THREADS", LIBRARYS_CHOICE)))
        return compiled(core, model, device, settings)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    monkeypatch.setattr(openvino.Core, "compile_model", compile_model)
    return started
