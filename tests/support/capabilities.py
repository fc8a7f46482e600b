"""Marks for tests of what not every CPU can do: they skip with the reason."""

from __future__ import annotations

import pytest

from edje.engines.registry import load_backend


def _needs_int8(backend: str) -> pytest.MarkDecorator:
    reason = load_backend(backend).why_not("int8")
    return pytest.mark.skipif(reason is not None, reason=str(reason))


needs_int8 = _needs_int8("onnxruntime")
needs_openvino_int8 = _needs_int8("openvino")
