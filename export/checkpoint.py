"""The official EDJE checkpoint: read it, name its tensors one way, infer and check every size."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .checkpoint_file import own_name, read_state_dict

if TYPE_CHECKING:
    from torch import Tensor

BERT = "language_model.bert."
ADAPTER = "vision_projection."
HEAD = "classification_head."
VISION = "vision_encoder."
MOST_FAULTS = 20  # shown of tensors that are there twice
MAX_TEXT = 64  # the official MAX_TEXT_CONTEXT_LENGTH: CLS, wordpieces and two SEP

Tensors = Mapping[str, "Tensor"]
Shape = tuple["int | None", ...]  # None: any size, where the checkpoint tells none


@dataclass(frozen=True, slots=True)
class CheckpointSizes:
    """Every size that the tensors of a checkpoint tell by themselves."""

    num_tokens: int
    feature_dim: int
    adapter_intermediate: int
    hidden: int
    num_layers: int
    intermediate: int
    vocab_size: int
    max_positions: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of an official checkpoint that scoring and indexing need, in float32.

    `bert`, `adapter`, `head` and `vision` hold tensors by name without their prefix; `vision` has
    no pooling head and is named as transformers 5 names it. `dropped` counts the keys that a
    wrapper's part (`module.`, `_orig_mod.`) was dropped from.
    """

    path: Path
    sizes: CheckpointSizes
    bert: Tensors
    adapter: Tensors
    head: Tensors
    vision: Tensors
    dropped: Mapping[str, int]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint as the official training script saves it.

    `{"model": state_dict, ...}`, float32 or bfloat16, either spelling of the vision keys, with or
    without the parts that wrappers (DDP, torch.compile, FSDP) put into keys; other top-level
    entries and the tensors that no graph needs are ignored. Nothing is unpickled but tensors and
    plain values.

    Raises:
        CheckpointError: not such a file, or tensors missing, of the wrong shape or there twice
            (all listed).
    """
    tensors, dropped = read_state_dict(path)
    groups = _groups(path, tensors)
    if "query" not in groups[ADAPTER] and "0.weight" in groups[ADAPTER]:
        raise CheckpointError(
            f"{path} is a local (uncompressed) EDJE checkpoint: vision_projection is a plain MLP, "
            "expected an adapter with learned queries (vision_projection.query)",
            hint="export a checkpoint that was trained with num_compressed_tokens",
        )
    sizes = _infer_sizes(groups)
    faults = list(_group_faults(groups, sizes))
    if faults:
        raise CheckpointError(f"{path} is not a whole EDJE checkpoint", faults=faults)
    known = CheckpointSizes(**{name: size or 0 for name, size in sizes.items()})
    # Copied out of the mapped file, which a running training may write again.
    bert, adapter, head, vision = (
        {name: tensor.clone().float() for name, tensor in group.items()}
        for group in groups.values()
    )
    return Checkpoint(path, known, bert, adapter, head, vision, dropped)


def tensor_faults(prefix: str, tensors: Tensors, expected: Mapping[str, Shape]) -> Iterator[str]:
    """Yield one sentence for every tensor that is missing, misshapen, not float or not finite."""
    if not tensors:
        yield f"{prefix}*: all {len(expected)} tensors are missing"
        return
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            yield f"{prefix}{name}: missing, expected {_shown(shape)}"
        elif not _fits(tuple(tensor.shape), shape):
            yield f"{prefix}{name}: got {list(tensor.shape)}, expected {_shown(shape)}"
        elif not tensor.is_floating_point():
            yield f"{prefix}{name}: got {tensor.dtype}, expected float32 or bfloat16"
        elif fault := _value_fault(tensor):
            yield f"{prefix}{name}: {fault}"


def _value_fault(tensor: Tensor) -> str | None:
    if tensor.is_meta:
        return "has no values (it is on the meta device)"
    return None if tensor.isfinite().all() else "holds NaN or infinite values"


def _groups(path: Path, tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """Sort the tensors that matter by prefix; name the vision tower's as transformers 5 does."""
    groups: dict[str, dict[str, Tensor]] = {BERT: {}, ADAPTER: {}, HEAD: {}, VISION: {}}
    keys: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        full_name, _ = own_name(key)
        prefix = next((prefix for prefix in groups if full_name.startswith(prefix)), None)
        if prefix is None:
            continue
        name = full_name.removeprefix(prefix)
        if prefix == VISION:
            name = name.removeprefix("vision_model.")
            if name.startswith("head."):
                continue
        groups[prefix][name] = tensor
        keys.setdefault(prefix + name, []).append(key)
    twice = [f"{name}: {' and '.join(same)}" for name, same in keys.items() if len(same) > 1]
    if twice:
        rest = len(twice) - MOST_FAULTS
        raise CheckpointError(
            f"{path} holds several tensors of one name, once the parts that wrappers put into "
            "keys are dropped",
            faults=[*twice[:MOST_FAULTS], f"and {rest} more names"] if rest > 0 else twice,
            hint="save the checkpoint again from the unwrapped model: one key a tensor",
        )
    return groups


def _infer_sizes(groups: Mapping[str, Tensors]) -> dict[str, int | None]:
    """Return every size that the tensors tell; where they differ, what most of them tell."""
    bert, adapter = groups[BERT], groups[ADAPTER]
    return {
        "num_tokens": _vote(adapter, r"query", 1),
        "feature_dim": _vote(
            adapter, r"(key|value|attention\.out_proj|layernorm|mlp\.fc2)\.bias", 0
        ),
        "adapter_intermediate": _vote(adapter, r"mlp\.fc1\.bias", 0),
        "hidden": _vote(bert, r".*LayerNorm\.weight", 0),
        "num_layers": _num_layers(bert, r"encoder\.layer\.(\d+)\."),
        "intermediate": _vote(bert, r".*intermediate\.dense\.bias", 0),
        "vocab_size": _vote(bert, r"embeddings\.word_embeddings\.weight", 0),
        "max_positions": _vote(bert, r"embeddings\.position_embeddings\.weight", 0),
    }


def _num_layers(tensors: Tensors, pattern: str) -> int | None:
    indices = [int(match[1]) for name in tensors if (match := re.match(pattern, name))]
    return max(indices) + 1 if indices else None


def _vote(tensors: Tensors, pattern: str, axis: int) -> int | None:
    """Return the most frequent size of `axis` among the tensors whose name matches."""
    votes = Counter(
        int(tensor.shape[axis])
        for name, tensor in tensors.items()
        if re.fullmatch(pattern, name) and tensor.ndim > axis
    )
    return votes.most_common(1)[0][0] if votes else None


def _group_faults(groups: Mapping[str, Tensors], sizes: Mapping[str, int | None]) -> Iterator[str]:
    yield from tensor_faults(BERT, groups[BERT], _bert_shapes(sizes))
    yield from tensor_faults(ADAPTER, groups[ADAPTER], _adapter_shapes(sizes))
    yield from tensor_faults(HEAD, groups[HEAD], _head_shapes(sizes["hidden"]))
    for name, tensor in groups[VISION].items():
        if fault := _value_fault(tensor):
            yield f"{VISION}{name}: {fault}"
    tokens, positions = sizes["num_tokens"], sizes["max_positions"]
    if tokens is not None and positions is not None and positions < tokens + 4:
        yield (
            f"{BERT}embeddings.position_embeddings.weight: {positions} positions, expected at "
            f"least {tokens + 4} for {tokens} visual tokens, CLS, one wordpiece and two SEP"
        )


def _bert_shapes(sizes: Mapping[str, int | None]) -> dict[str, Shape]:
    h, wide = sizes["hidden"], sizes["intermediate"]
    shapes: dict[str, Shape] = {
        "embeddings.word_embeddings.weight": (sizes["vocab_size"], h),
        "embeddings.position_embeddings.weight": (sizes["max_positions"], h),
        "embeddings.token_type_embeddings.weight": (2, h),
        **_norm("embeddings.LayerNorm", h),
    }
    for index in range(sizes["num_layers"] or 1):
        layer = f"encoder.layer.{index}."
        for name in ("query", "key", "value"):
            shapes |= _linear(f"{layer}attention.self.{name}", h, h)
        shapes |= _linear(f"{layer}attention.output.dense", h, h)
        shapes |= _norm(f"{layer}attention.output.LayerNorm", h)
        shapes |= _linear(f"{layer}intermediate.dense", wide, h)
        shapes |= _linear(f"{layer}output.dense", h, wide)
        shapes |= _norm(f"{layer}output.LayerNorm", h)
    return shapes


def _adapter_shapes(sizes: Mapping[str, int | None]) -> dict[str, Shape]:
    d, wide = sizes["feature_dim"], sizes["adapter_intermediate"]
    return {
        "query": (1, sizes["num_tokens"], d),
        **_linear("key", d, d),
        **_linear("value", d, d),
        "attention.in_proj_weight": (None if d is None else 3 * d, d),
        "attention.in_proj_bias": (None if d is None else 3 * d,),
        **_linear("attention.out_proj", d, d),
        **_norm("layernorm", d),
        **_linear("mlp.fc1", wide, d),
        **_linear("mlp.fc2", d, wide),
        **_linear("projection", sizes["hidden"], d),
    }


def _head_shapes(hidden: int | None) -> dict[str, Shape]:
    return {**_linear("0.dense", hidden, hidden), **_linear("1", 1, hidden)}


def vision_sizes(tower: Tensors) -> dict[str, int | None]:
    """Return the sizes that a vision tower's tensors tell, by their configuration names."""
    return {
        "hidden_size": _vote(tower, r".*layer_?norm1?\.weight", 0),
        "num_hidden_layers": _num_layers(tower, r"encoder\.layers\.(\d+)\."),
        "intermediate_size": _vote(tower, r".*mlp\.fc1\.bias", 0),
        "patch_size": _vote(tower, r"embeddings\.patch_embedding\.weight", 2),
        "num_features": _vote(tower, r"embeddings\.position_embedding\.weight", 0),
    }


def vision_shapes(sizes: Mapping[str, int | None]) -> dict[str, Shape]:
    """Return the expected tensors of a SigLIP vision tower, without its pooling head."""
    hidden, intermediate = sizes["hidden_size"], sizes["intermediate_size"]
    patch = sizes["patch_size"]
    shapes: dict[str, Shape] = {
        "embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        "embeddings.patch_embedding.bias": (hidden,),
        "embeddings.position_embedding.weight": (sizes["num_features"], hidden),
        **_norm("post_layernorm", hidden),
    }
    for index in range(sizes["num_hidden_layers"] or 1):
        layer = f"encoder.layers.{index}."
        shapes |= _norm(f"{layer}layer_norm1", hidden) | _norm(f"{layer}layer_norm2", hidden)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}self_attn.{name}", hidden, hidden)
        shapes |= _linear(f"{layer}mlp.fc1", intermediate, hidden)
        shapes |= _linear(f"{layer}mlp.fc2", hidden, intermediate)
    return shapes


def _linear(name: str, out: int | None, into: int | None) -> dict[str, Shape]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str, width: int | None) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _fits(shape: tuple[int, ...], expected: Shape) -> bool:
    return len(shape) == len(expected) and all(
        want is None or got == want for got, want in zip(shape, expected, strict=True)
    )


def _shown(shape: Shape) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"
