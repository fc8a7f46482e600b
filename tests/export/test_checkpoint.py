"""Reading checkpoints: what is accepted, how it is unwrapped, and one clear error for the rest."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from edje.errors import CheckpointError
from edje.export.checkpoint import Checkpoint, read_checkpoint
from official_checkpoint import Sizes, official_state

State = dict[str, torch.Tensor]
ENTRY = 'expected {"model": state_dict, ...}'


@pytest.fixture(scope="module")
def state() -> State:
    return official_state(Sizes())


def save(folder: Path, content: object, **options: object) -> Path:
    path = folder / "checkpoint_03.pth"
    torch.save(content, path, **options)
    return path


def read(folder: Path, state: object, **entries: object) -> Checkpoint:
    return read_checkpoint(save(folder, {"model": state, **entries}))


def refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    return caught.value


def same_tensors(one: Checkpoint, two: Checkpoint) -> bool:
    groups = [(getattr(one, g), getattr(two, g)) for g in ("bert", "adapter", "head", "vision")]
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in groups
    )


def test_sizes_are_told_by_the_tensors_and_what_no_graph_needs_is_left_out(tmp_path, state):
    extra = {"optimizer": {"lr": 1e-4}, "config": {"a": [1]}, "epoch": 3, "global_step": 7}
    found = read(tmp_path, state, **extra)
    sizes = found.sizes
    assert (sizes.hidden, sizes.num_layers, sizes.intermediate) == (24, 3, 40)
    assert (sizes.vocab_size, sizes.max_positions) == (91, 512)
    assert (sizes.num_tokens, sizes.feature_dim, sizes.adapter_intermediate) == (16, 20, 28)
    names = [*found.bert, *found.adapter, *found.head, *found.vision]
    assert not [name for name in names if "probe" in name or "predictions" in name]
    assert torch.equal(found.head["1.bias"], state["classification_head.1.bias"])
    ignored = ("clip.", "text_projection.", "language_model.cls.", "text_embeddings.")
    needed = {name: value for name, value in state.items() if not name.startswith(ignored)}
    assert same_tensors(read(tmp_path, needed), found)


def test_both_spellings_and_both_types_read_alike(tmp_path, state):
    assert same_tensors(read(tmp_path, official_state(Sizes(), spelling=4)), read(tmp_path, state))
    rounded = {name: value.bfloat16() for name, value in state.items()}
    found = read(tmp_path, rounded)
    assert {value.dtype for value in found.bert.values()} == {torch.float32}
    assert same_tensors(found, read(tmp_path, {n: value.float() for n, value in rounded.items()}))


@pytest.mark.parametrize("size", [0, 1, 1000, 100_000])
def test_a_truncated_file_is_refused(tmp_path, state, size):
    path = save(tmp_path, {"model": state})
    path.write_bytes(path.read_bytes()[:size])
    error = str(refusal(path))
    assert "is not a readable PyTorch checkpoint" in error
    assert ("truncated or damaged" if size >= 4 else "not an archive") in error


def test_files_of_another_kind_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("not a checkpoint\n")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("a.txt", "hello")
    for name in ("notes.txt", "other.zip"):
        assert "is not a readable PyTorch checkpoint" in str(refusal(tmp_path / name))


@pytest.mark.parametrize("place", ["model", "args"])
def test_code_in_a_file_is_refused_not_run(tmp_path, state, place):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    error = str(refusal(save(tmp_path, {"model": state, place: Attack()})))
    assert "it needs code to be run" in error
    assert "weights_only` set to `False`" not in error
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{"state": {}}, [1, 2], {"model": 3}, torch.zeros(2)])
def test_a_file_without_a_model_entry_is_refused(tmp_path, content):
    assert ENTRY in refusal(save(tmp_path, content)).message


def test_a_local_checkpoint_is_named_as_such(tmp_path, state):
    local = {k: v for k, v in state.items() if not k.startswith("vision_projection.")}
    local |= {"vision_projection.0.weight": torch.zeros(28, 20)}
    message = str(refusal(save(tmp_path, {"model": local})))
    assert "local (uncompressed)" in message
    assert "num_compressed_tokens" in message


def test_all_faults_are_listed_at_once(tmp_path, state):
    bad = dict(state)
    del bad["vision_projection.mlp.fc1.weight"]
    del bad["language_model.bert.encoder.layer.1.output.dense.bias"]
    bad["vision_projection.projection.weight"] = torch.zeros(25, 20)
    bad["classification_head.1.weight"] = torch.full((1, 24), float("nan"))
    bad["language_model.bert.embeddings.word_embeddings.weight"] = torch.zeros(91, 23)
    bad["classification_head.1.bias"] = torch.zeros(1, dtype=torch.int64)
    assert set(refusal(save(tmp_path, {"model": bad})).faults) == {
        "vision_projection.mlp.fc1.weight: missing, expected [28, 20]",
        "language_model.bert.encoder.layer.1.output.dense.bias: missing, expected [24]",
        "vision_projection.projection.weight: got [25, 20], expected [24, 20]",
        "classification_head.1.weight: holds NaN or infinite values",
        "language_model.bert.embeddings.word_embeddings.weight: got [91, 23], expected [91, 24]",
        "classification_head.1.bias: got torch.int64, expected float32 or bfloat16",
    }


@pytest.mark.parametrize("group", ["vision_encoder.", "classification_head."])
def test_tensors_without_finite_values_are_the_checkpoints_fault(tmp_path, state, group):
    names = [name for name in state if name.startswith(group) and ".head." not in name][:2]
    bad = {names[0]: state[names[0]] * float("nan"), names[1]: state[names[1]].to("meta")}
    path = save(tmp_path, {"model": state | bad})
    error = refusal(path)
    assert str(path) in error.message
    assert [fault.split(": ")[1] for fault in error.faults] == [
        "holds NaN or infinite values",
        "has no values (it is on the meta device)",
    ]
    assert all(fault.startswith(group) for fault in error.faults)


def test_another_models_state_dict_is_told_in_a_few_lines(tmp_path):
    message = str(refusal(save(tmp_path, {"model": {"fc.weight": torch.zeros(2, 2)}})))
    for prefix in ("language_model.bert.*", "vision_projection.*", "classification_head.*"):
        assert f"{prefix}: all" in message
    assert len(message.splitlines()) <= 5


def test_a_position_table_too_short_for_the_tokens_is_refused(tmp_path, state):
    name = "language_model.bert.embeddings.position_embeddings.weight"
    short = state | {name: torch.zeros(19, 24)}
    assert "19 positions, expected at least 20" in str(refusal(save(tmp_path, {"model": short})))


def inside(key: str, after: str, part: str) -> str:
    """Put a wrapper's part into a key where a submodule was wrapped."""
    return key.replace(after, f"{after}{part}", 1)


def in_fsdp(key: str) -> str:
    key = inside(key, ".layer.1.", "_fsdp_wrapped_module.")
    return inside(key, ".encoder.", "_checkpoint_wrapped_module.")


@pytest.mark.parametrize(
    ("wrap", "dropped"),
    [
        (lambda key: f"module._orig_mod.{key}", {"module.", "_orig_mod."}),
        (lambda key: f"_orig_mod.module.{key}", {"module.", "_orig_mod."}),
        (lambda key: f"model.{key}", {"model."}),
        (lambda key: f"model._orig_mod.{key}", {"model.", "_orig_mod."}),
        (in_fsdp, {"_fsdp_wrapped_module.", "_checkpoint_wrapped_module."}),
        (lambda key: inside(key, "vision_encoder.", "module."), {"module."}),
        (lambda key: f"module.{key}" if "bert" in key else key, {"module."}),
    ],
)
def test_wrapped_keys_read_like_plain_ones_and_are_counted(tmp_path, state, wrap, dropped):
    plain = read(tmp_path, state)
    wrapped = {wrap(key): value for key, value in state.items()}
    found = read(tmp_path, wrapped)
    assert same_tensors(found, plain)
    assert plain.dropped == {}
    assert found.dropped.keys() == dropped
    assert all(
        count == sum(f".{part}" in f".{key}" for key in wrapped)
        for part, count in found.dropped.items()
    )


def test_a_really_wrapped_module_reads_like_the_plain_one(tmp_path, state):
    head = torch.nn.Sequential(torch.nn.ModuleDict({"dense": torch.nn.Linear(24, 24)}))
    head.append(torch.nn.Linear(24, 1))
    model = torch.nn.ModuleDict({"classification_head": torch.compile(head)})
    wrapped = torch.nn.DataParallel(model).state_dict()
    assert "module.classification_head._orig_mod.1.weight" in wrapped
    rest = {key: value for key, value in state.items() if not key.startswith("classification")}
    found = read(tmp_path, {**rest, **wrapped})
    assert torch.equal(found.head["1.weight"], head[1].weight.detach())
    assert found.dropped == {"_orig_mod.": 4, "module.": 4}


def test_two_keys_of_one_tensor_are_refused_by_both_names(tmp_path, state):
    twice = {"classification_head.1.bias", "vision_projection.query"}
    both = {**state, **{f"module.{key}": torch.zeros_like(state[key]) for key in twice}}
    error = refusal(save(tmp_path, {"model": both}))
    assert set(error.faults) == {f"{key}: {key} and module.{key}" for key in twice}
    spelled = "vision_encoder.vision_model.post_layernorm.bias"
    error = refusal(save(tmp_path, {"model": {**state, spelled: torch.zeros(20)}}))
    assert f"vision_encoder.post_layernorm.bias and {spelled}" in error.faults[0]
    hundreds = {**state, **{f"module.{key}": state[key] for key in state}}
    error = refusal(save(tmp_path, {"model": hundreds}))
    assert len(error.faults) == 21, "a page of them"
    assert error.faults[-1].endswith("more names")


class Trainer:
    """A class of the training's own code."""


@pytest.mark.parametrize("legacy", [False, True])
def test_entries_that_need_code_are_named_with_the_lines_that_mend_it(tmp_path, state, legacy):
    named = {
        "argparse.Namespace": argparse.Namespace(lr=1e-4),
        "pathlib.": Path("/data"),
        "numpy._core.multiarray.scalar": np.float64(0.87),
        f"{Trainer.__module__}.Trainer": {"inner": [Trainer()]},
    }
    format_ = {"_use_new_zipfile_serialization": not legacy}
    contents = [{"model": state, "args": entry} for entry in named.values()]
    errors = [refusal(save(tmp_path, content, **format_)) for content in contents]
    for error, name in zip(errors, named, strict=True):
        assert name in error.message
        assert "weights_only=True" in error.message
        assert "if you trust the file" in (error.hint or "")
        assert len((error.hint or "").splitlines()) == 4
    if not legacy:  # torch stops at the first of an old file
        message = refusal(save(tmp_path, {"model": state, "all": list(named.values())})).message
        assert [name for name in named if name not in message] == []


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
    "state dict": lambda s: {"state_dict": s, "epoch": 3},
    "inside": lambda s: {"model": {"state_dict": s}},
    "outside": lambda s: {"state_dict": {"model": s}},
    "bare": lambda s: s,
}
NEEDS_CODE = {"hyper_parameters": argparse.Namespace(lr=1)}
FILES = {
    **{f"{name}, code": lambda s, lay=lay: lay(s) | NEEDS_CODE for name, lay in LAYOUTS.items()},
    **{name: lay for name, lay in LAYOUTS.items() if name not in ("model", "lightning")},
    "module": Whole,
    "module in model": lambda s: {"model": Whole(s)},
    "module in state dict": lambda s: {"state_dict": Whole(s)},
}


@pytest.mark.parametrize("layout", FILES)
def test_the_given_lines_save_a_checkpoint_that_reads(tmp_path, state, monkeypatch, layout):
    """They are run here as by a user who trusts the file."""
    monkeypatch.chdir(tmp_path)
    error = refusal(save(tmp_path, FILES[layout](state)))
    assert layout not in LAYOUTS or ENTRY in error.message
    exec("\n".join(line.strip() for line in (error.hint or "").splitlines()[1:]), {})
    again = read_checkpoint(tmp_path / "checkpoint_03-tensors.pth")
    assert same_tensors(again, read(tmp_path, state))
