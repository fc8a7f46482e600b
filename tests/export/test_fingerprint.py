"""Fingerprints follow names, shapes, values and settings, and nothing else."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from edje.export.export import fingerprint

names = st.text("abc.", min_size=1, max_size=6)
values = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=6)
states = st.dictionaries(names, values, min_size=1, max_size=4)


def tensors(state: dict[str, list[float]], dtype: torch.dtype = torch.float32):
    return {name: torch.tensor(numbers, dtype=dtype) for name, numbers in state.items()}


@given(states)
def test_order_of_tensors_does_not_matter(state):
    backwards = dict(reversed(tensors(state).items()))
    assert fingerprint(tensors(state), {}) == fingerprint(backwards, {})


@given(states)
def test_bfloat16_and_its_float32_twin_are_one(state):
    rounded = tensors(state, torch.bfloat16)
    twin = {name: value.float() for name, value in rounded.items()}
    assert fingerprint(rounded, {}) == fingerprint(twin, {})


@given(states, st.data())
def test_any_changed_value_name_shape_or_setting_changes_it(state, data):
    before = fingerprint(tensors(state), {"heads": 4})
    name = data.draw(st.sampled_from(sorted(state)))
    changed = tensors(state)
    changed[name] = changed[name].clone()
    changed[name][0] = 2.5 if changed[name][0] != 2.5 else -1.0
    renamed = {f"{key}x" if key == name else key: value for key, value in tensors(state).items()}
    reshaped = tensors(state) | {name: tensors(state)[name][None]}
    others = [fingerprint(other, {"heads": 4}) for other in (changed, renamed, reshaped)]
    others.append(fingerprint(tensors(state), {"heads": 2}))
    assert before not in others
    assert len(set(others)) == 4


def test_a_transposed_view_hashes_its_values_not_its_memory():
    value = torch.arange(6.0).view(2, 3)
    assert fingerprint({"a": value.T}, {}) == fingerprint({"a": value.T.contiguous()}, {})
