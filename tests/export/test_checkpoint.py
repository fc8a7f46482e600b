"""Reading checkpoints: what is accepted, and one clear error for everything else."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from edje.errors import CheckpointError
from edje.export.checkpoint import read_checkpoint
from official_checkpoint import Sizes, official_state, write_checkpoint

SIZES = Sizes()


@pytest.fixture(scope="module")
def state():
    return official_state(SIZES)


def save(folder: Path, content: object) -> Path:
    path = folder / "checkpoint.pth"
    torch.save(content, path)
    return path


def error_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    return str(caught.value)


def test_every_size_is_told_by_the_tensors(tmp_path, state):
    sizes = read_checkpoint(save(tmp_path, {"model": state})).sizes
    assert (sizes.hidden, sizes.num_layers, sizes.intermediate) == (24, 3, 40)
    assert (sizes.vocab_size, sizes.max_positions) == (91, 512)
    assert (sizes.num_tokens, sizes.feature_dim, sizes.adapter_intermediate) == (16, 20, 28)


def test_what_no_graph_needs_is_left_out(tmp_path, state):
    extra = {"optimizer": {"lr": 1e-4}, "config": {"a": [1]}, "epoch": 3, "global_step": 7}
    read = read_checkpoint(save(tmp_path, {"model": state, **extra}))
    names = [*read.bert, *read.adapter, *read.head, *read.vision]
    assert not [name for name in names if "probe" in name or "predictions" in name]
    assert len(read.head) == 4


def test_clip_projection_and_mlm_head_may_be_absent(tmp_path, state):
    ignored = ("clip.", "text_projection.", "language_model.cls.", "text_embeddings.")
    needed = {name: value for name, value in state.items() if not name.startswith(ignored)}
    assert read_checkpoint(save(tmp_path, {"model": needed})).sizes.num_layers == 3


def test_both_spellings_of_the_vision_keys_read_alike(tmp_path, state):
    newer = read_checkpoint(save(tmp_path, {"model": state}))
    older = read_checkpoint(save(tmp_path, {"model": official_state(SIZES, spelling=4)}))
    assert newer.vision.keys() == older.vision.keys()
    assert all(torch.equal(newer.vision[name], older.vision[name]) for name in newer.vision)


def test_bfloat16_becomes_float32_of_the_same_values(tmp_path, state):
    rounded = {name: value.bfloat16() for name, value in state.items()}
    read = read_checkpoint(save(tmp_path, {"model": rounded}))
    assert {value.dtype for value in read.bert.values()} == {torch.float32}
    query = rounded["vision_projection.query"].float()
    assert torch.equal(read.adapter["query"], query)


@pytest.mark.parametrize("size", [0, 1, 1000, 100_000])
def test_a_truncated_file_is_refused(tmp_path, state, size):
    path = save(tmp_path, {"model": state})
    path.write_bytes(path.read_bytes()[:size])
    error = error_of(path)
    assert "is not a readable PyTorch checkpoint" in error
    assert ("truncated or damaged" if size >= 4 else "not an archive") in error


def test_files_of_another_kind_are_refused(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a checkpoint\n")
    archive = tmp_path / "other.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "hello")
    for path in (text, archive):
        assert "is not a readable PyTorch checkpoint" in error_of(path)


def test_code_in_a_file_is_refused_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    error = error_of(save(tmp_path, {"model": Attack()}))
    assert "it needs code to be run" in error
    assert "weights_only` set to `False`" not in error
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{"state": {}}, [1, 2], {"model": 3}, torch.zeros(2)])
def test_a_file_without_a_model_entry_is_refused(tmp_path, content):
    assert 'expected {"model": state_dict, ...}' in error_of(save(tmp_path, content))


def test_a_local_checkpoint_is_named_as_such(tmp_path, state):
    local = {k: v for k, v in state.items() if not k.startswith("vision_projection.")}
    local |= {"vision_projection.0.weight": torch.zeros(28, 20)}
    message = error_of(save(tmp_path, {"model": local}))
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
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(save(tmp_path, {"model": bad}))
    assert set(caught.value.faults) == {
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
    with pytest.raises(CheckpointError, match=str(path)) as caught:
        read_checkpoint(path)
    assert [fault.split(": ")[1] for fault in caught.value.faults] == [
        "holds NaN or infinite values",
        "has no values (it is on the meta device)",
    ]
    assert all(fault.startswith(group) for fault in caught.value.faults)


def test_another_models_state_dict_is_told_in_a_few_lines(tmp_path):
    message = error_of(save(tmp_path, {"model": {"fc.weight": torch.zeros(2, 2)}}))
    for prefix in ("language_model.bert.*", "vision_projection.*", "classification_head.*"):
        assert f"{prefix}: all" in message
    assert len(message.splitlines()) <= 5


def test_a_position_table_too_short_for_the_tokens_is_refused(tmp_path, state):
    name = "language_model.bert.embeddings.position_embeddings.weight"
    short = state | {name: torch.zeros(19, 24)}
    assert "19 positions, expected at least 20" in error_of(save(tmp_path, {"model": short}))


def test_a_written_checkpoint_is_the_one_read(tmp_path, state):
    folders = write_checkpoint(tmp_path / "in", SIZES, state=state)
    read = read_checkpoint(folders.checkpoint)
    assert torch.equal(read.head["1.bias"], state["classification_head.1.bias"])
