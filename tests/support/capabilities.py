"""Marks for tests of what not every CPU can do: they skip with the reason."""

from __future__ import annotations

import pytest

from edje.engines.cpu import why_no_int8

needs_int8 = pytest.mark.skipif(why_no_int8() is not None, reason=str(why_no_int8()))
