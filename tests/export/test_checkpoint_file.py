"""The checkpoint's file: wrapped keys are unwrapped and said, code is named and never run."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from edje.errors import CheckpointError
from edje.export.checkpoint import Checkpoint, read_checkpoint
from official_checkpoint import Sizes, official_state

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return official_state(Sizes())


class Trainer:
    """A class of the training's own code."""


def save(folder: Path, model: object, **entries: object) -> Path:
    path = folder / "checkpoint_03.pth"
    torch.save({"model": model, **entries}, path)
    return path


def refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    return caught.value


def run_lines(error: CheckpointError) -> None:
    """Run the Python that an error gives, as a user does who trusts the file."""
    exec("\n".join(line.strip() for line in (error.hint or "").splitlines()[1:]), {})


def same_tensors(one: Checkpoint, two: Checkpoint) -> bool:
    groups = [(getattr(one, g), getattr(two, g)) for g in ("bert", "adapter", "head", "vision")]
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in groups
    )


def inside(key: str, after: str, part: str) -> str:
    """Put a wrapper's part into a key where a submodule was wrapped."""
    return key.replace(after, f"{after}{part}", 1)


@pytest.mark.parametrize(
    ("wrap", "dropped"),
    [
        (lambda key: f"module.{key}", {"module."}),
        (lambda key: f"_orig_mod.{key}", {"_orig_mod."}),
        (lambda key: f"module._orig_mod.{key}", {"module.", "_orig_mod."}),
        (lambda key: f"_orig_mod.module.{key}", {"module.", "_orig_mod."}),
        (lambda key: f"model.{key}", {"model."}),
        (lambda key: f"model._orig_mod.{key}", {"model.", "_orig_mod."}),
        (lambda key: f"_fsdp_wrapped_module.{key}", {"_fsdp_wrapped_module."}),
        (
            lambda key: inside(
                inside(key, ".layer.1.", "_fsdp_wrapped_module."),
                ".encoder.",
                "_checkpoint_wrapped_module.",
            ),
            {"_fsdp_wrapped_module.", "_checkpoint_wrapped_module."},
        ),
        (lambda key: inside(key, "vision_projection.", "_orig_mod."), {"_orig_mod."}),
        (lambda key: inside(key, "vision_encoder.", "module."), {"module."}),
        (lambda key: f"module.{key}" if "bert" in key else key, {"module."}),
    ],
)
def test_wrapped_keys_read_like_plain_ones_and_are_counted(tmp_path, state, wrap, dropped):
    plain = read_checkpoint(save(tmp_path, state))
    wrapped = {wrap(key): value for key, value in state.items()}
    read = read_checkpoint(save(tmp_path, wrapped))
    assert same_tensors(read, plain)
    assert plain.dropped == {}
    assert read.dropped.keys() == dropped
    assert all(
        count == sum(f".{part}" in f".{key}" for key in wrapped)
        for part, count in read.dropped.items()
    )


def test_a_really_wrapped_module_reads_like_the_plain_one(tmp_path, state):
    head = torch.nn.Sequential(torch.nn.ModuleDict({"dense": torch.nn.Linear(24, 24)}))
    head.append(torch.nn.Linear(24, 1))
    model = torch.nn.ModuleDict({"classification_head": torch.compile(head)})
    wrapped = torch.nn.DataParallel(model).state_dict()
    assert "module.classification_head._orig_mod.1.weight" in wrapped
    rest = {key: value for key, value in state.items() if not key.startswith("classification")}
    read = read_checkpoint(save(tmp_path, {**rest, **wrapped}))
    assert torch.equal(read.head["1.weight"], head[1].weight.detach())
    assert read.dropped == {"_orig_mod.": 4, "module.": 4}


def test_two_keys_of_one_tensor_are_refused_by_both_names(tmp_path, state):
    twice = {"classification_head.1.bias", "vision_projection.query"}
    both = {**state, **{f"module.{key}": torch.zeros_like(state[key]) for key in twice}}
    error = refusal(save(tmp_path, both))
    assert set(error.faults) == {f"{key}: {key} and module.{key}" for key in twice}
    spelled = "vision_encoder.vision_model.post_layernorm.bias"
    error = refusal(save(tmp_path, {**state, spelled: torch.zeros(20)}))
    assert f"vision_encoder.post_layernorm.bias and {spelled}" in error.faults[0]


def test_hundreds_of_doubled_tensors_are_told_in_a_page(tmp_path, state):
    error = refusal(save(tmp_path, {**state, **{f"module.{k}": state[k] for k in state}}))
    assert len(error.faults) == 21
    assert error.faults[-1].endswith("more names")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("entry", "name"),
    [
        (argparse.Namespace(lr=1e-4), "argparse.Namespace"),
        (Path("/data"), "pathlib."),
        (np.float64(0.87), "numpy._core.multiarray.scalar"),
        ({"inner": [Trainer()]}, f"{Trainer.__module__}.Trainer"),
    ],
    ids=["namespace", "path", "numpy", "own-class"],
)
def test_an_entry_that_needs_code_is_named_with_the_lines_that_mend_it(
    tmp_path, state, entry, name, legacy
):
    path = tmp_path / "c.pth"
    content = {"model": state, "args": entry}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    error = refusal(path)
    assert name in error.message
    assert "weights_only=True" in error.message
    lines = [line.strip() for line in (error.hint or "").splitlines()[1:]]
    assert len(lines) == 3
    assert "if you trust the file" in (error.hint or "")


def test_every_type_is_named_at_once(tmp_path, state):
    entries = {"args": argparse.Namespace(), "best": np.float64(1), "trainer": Trainer()}
    message = refusal(save(tmp_path, state, **entries)).message
    for name in ("argparse.Namespace", "numpy._core.multiarray.scalar", "Trainer"):
        assert name in message


class Whole(torch.nn.Module):
    """A module of nothing but given tensors, under their own names."""

    def __init__(self, state: State):
        super().__init__()
        for key, tensor in state.items():
            *path, name = key.split(".")
            place: torch.nn.Module = self
            for part in path:
                if part not in dict(place.named_children()):
                    place.add_module(part, torch.nn.Module())
                place = place.get_submodule(part)
            place.register_buffer(name, tensor)


LAYOUTS = {
    "model": lambda s: {"model": s},
    "lightning": lambda s: {"state_dict": {f"model.{key}": s[key] for key in s}},
    "state dict": lambda s: {"state_dict": s},
    "inside": lambda s: {"model": {"state_dict": s}},
    "bare": lambda s: s,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_given_lines_save_a_checkpoint_that_reads(tmp_path, state, monkeypatch, layout):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint_03.pth"
    torch.save({**LAYOUTS[layout](state), "hyper_parameters": argparse.Namespace(lr=1)}, path)
    run_lines(refusal(path))
    again = read_checkpoint(tmp_path / "checkpoint_03-tensors.pth")
    assert same_tensors(again, read_checkpoint(save(tmp_path, state)))


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"model": m}, lambda m: {"state_dict": m}])
def test_the_given_lines_save_the_tensors_of_a_whole_module(tmp_path, state, monkeypatch, wrap):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint_03.pth"
    torch.save(wrap(Whole(state)), path)
    run_lines(refusal(path))
    again = read_checkpoint(tmp_path / "checkpoint_03-tensors.pth")
    assert same_tensors(again, read_checkpoint(save(tmp_path, state)))


def test_code_in_another_entry_is_never_run(tmp_path, state):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    assert "pathlib" in refusal(save(tmp_path, state, args=Attack())).message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {"state_dict": {"model": s}},
    ],
)
def test_tensors_under_another_entry_come_with_the_lines_that_move_them(
    tmp_path, state, wrap, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    torch.save(wrap(state), tmp_path / "bare.pth")
    error = refusal(tmp_path / "bare.pth")
    assert 'expected {"model": state_dict, ...}' in error.message
    run_lines(error)
    assert read_checkpoint(tmp_path / "bare-tensors.pth").sizes.num_layers == 3
