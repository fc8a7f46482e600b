"""The checkpoint's file: its `model` entry, read without running code or wrappers' names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

# What wraps a model puts its own attribute into the keys below it: DistributedDataParallel and
# DataParallel, torch.compile, FSDP, activation checkpointing. No EDJE tensor has such a part.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
TRAINER = "model"  # the attribute of a trainer's class (Lightning) that holds the whole model
_REFUSED_TYPE = re.compile(r"Unsupported global: GLOBAL (\S+) was not an allowed global")
_MOST_NAMES = 8
# Where it may not be looked into a file: a state dict or a whole module, alone, under one of these
# names or under one inside the other.
_FIND_MODEL = (
    'for name in ("model", "state_dict", "model"): model = '
    "model.get(name, model) if isinstance(model, dict) else model"
)
_TENSORS_OF_MODEL = (
    '{key: value for key, value in getattr(model, "state_dict", lambda: model)().items() '
    "if torch.is_tensor(value)}"
)


def read_state_dict(path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the tensors of the `model` entry by their keys, and what `own_name` drops of these.

    The second counts, by wrapper, the keys that its part is dropped from.

    Raises:
        CheckpointError: not a checkpoint, or one that needs code to be run when loaded.
    """
    import torch

    try:
        content = _load(path)
    except Exception as error:  # torch.load raises a dozen kinds on files that are not its own
        raise _unreadable(path, error) from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or (_states(model) and not _holds_tensors(model)):
        raise _without_model(path, content)
    tensors = {str(key): value for key, value in model.items() if isinstance(value, torch.Tensor)}
    dropped = Counter(f"{part}." for key in tensors for part in own_name(key)[1])
    return tensors, dict(sorted(dropped.items()))


def _load(path: Path) -> Any:
    """Load with only the tensors that are used read from disk, where the format allows it."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # files from before PyTorch 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)


def own_name(key: str) -> tuple[str, set[str]]:
    """Return the model's own name of a tensor, and the wrappers' parts that stand in its key."""
    parts = key.split(".")
    own = [part for part in parts if part not in WRAPPERS]
    wrappers = set(parts) - set(own)
    if own[:1] == [TRAINER]:
        return ".".join(own[1:]), wrappers | {TRAINER}
    return ".".join(own), wrappers


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    """Say it in our words: torch's own advise to load with code execution allowed."""
    if types := _types_that_need_code(path, error):
        return _needs_code(path, types)
    if isinstance(error, OSError):
        why = error.strerror or str(error)
    elif not _is_archive(path):
        why = "it is not an archive as torch.save writes it"
    elif isinstance(error, UnpicklingError):
        why = "it needs code to be run when loaded, which is refused (weights_only=True)"
    else:
        why = "its archive is truncated or damaged"
    return CheckpointError(
        f"{path} is not a readable PyTorch checkpoint: {why}",
        hint="pass the whole file that the official training saved with torch.save",
    )


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _types_that_need_code(path: Path, error: Exception) -> list[str]:
    """Return the types in the file that torch does not load without running their code."""
    match = _REFUSED_TYPE.search(str(error)) if isinstance(error, UnpicklingError) else None
    if match is None:
        return []
    if not _is_archive(path):  # torch lists the types of archives only, and stops at the first
        return [match[1]]
    from torch.serialization import get_unsafe_globals_in_checkpoint

    return sorted(get_unsafe_globals_in_checkpoint(str(path))) or [match[1]]


def _needs_code(path: Path, types: list[str]) -> CheckpointError:
    shown = ", ".join(types[:_MOST_NAMES])
    if len(types) > _MOST_NAMES:
        shown += f" and {len(types) - _MOST_NAMES} more"
    load = f"model = {_loading(path, weights_only=False)}\n  {_FIND_MODEL}"
    return CheckpointError(
        f"{path} holds {shown} beside plain tensors: it needs code to be run when loaded, which "
        "is refused (weights_only=True)",
        hint="if you trust the file (this runs its code, so the training's own environment is "
        "the place), save its tensors alone and export that:\n"
        f"  import torch; {load}\n  {_saving(path, _TENSORS_OF_MODEL)}",
    )


def _without_model(path: Path, content: Any) -> CheckpointError:
    """Say what the file holds instead, and how to save the tensors that it does hold."""
    entries = content if isinstance(content, dict) else {}
    got = sorted(map(str, entries))[:_MOST_NAMES] if entries else type(content).__name__
    states = ["content"] if _holds_tensors(entries) else _states(entries, "content")
    hint = None
    if len(states) == 1:
        load = f"content = {_loading(path, weights_only=True)}"
        hint = (
            "save its tensors as the training does:\n"
            f"  import torch; {load}\n  {_saving(path, states[0])}"
        )
    inside = f" with its tensors in {', '.join(states[:_MOST_NAMES])}" if states else ""
    return CheckpointError(
        f"{path} is not an EDJE checkpoint: got {got}{inside}, "
        'expected {"model": state_dict, ...}',
        hint=hint,
    )


def _states(entries: Mapping[Any, Any], place: str = "") -> list[str]:
    """Return as Python where `entries` hold state dicts, up to one level further down."""
    found = []
    for key, value in entries.items():
        at = f"{place}[{key!r}]"
        if _holds_tensors(value):
            found.append(at)
        elif isinstance(value, dict):
            found += [f"{at}[{name!r}]" for name, held in value.items() if _holds_tensors(held)]
    return found


def _holds_tensors(value: Any) -> bool:
    import torch

    return isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values())


def _loading(path: Path, *, weights_only: bool) -> str:
    return f"torch.load({path.name!r}, map_location='cpu', weights_only={weights_only})"


def _saving(path: Path, model: str) -> str:
    """Return the Python that saves the tensors `model`, which is Python too, beside `path`."""
    clean = path.with_name(f"{path.stem}-tensors.pth").name
    return f'torch.save({{"model": {model}}}, {clean!r})'
