"""The inputs of an export: a path on this machine, or else a name on the Hugging Face Hub."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..arguments import StrPath
from ..errors import CheckpointError
from .hub import HubName, fetch, list_files

Progress = Callable[[str], None]

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
HUB_FOLDER = "a name on the Hugging Face Hub (owner/name or owner/name@revision)"
HUB_FILE = "a name on the Hugging Face Hub (owner/name[@revision][:file])"
_MOST_NAMES = 12


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What an export needs of a Hugging Face folder.

    `files` are all that it reads (the weights are in the checkpoint); of each group in `needed`
    one must be there.
    """

    option: str
    what: str
    example: str
    files: tuple[str, ...]
    needed: tuple[tuple[str, ...], ...]


LANGUAGE = ModelFolder(
    "--language-model",
    "the language model's Hugging Face folder",
    "microsoft/MiniLM-L12-H384-uncased",
    (
        *("config.json", "tokenizer.json", "tokenizer_config.json"),
        *("vocab.txt", "special_tokens_map.json", "added_tokens.json"),
    ),
    (("config.json",), ("tokenizer.json", "vocab.txt")),
)
VISION = ModelFolder(
    "--vision-model",
    "the SigLIP model's Hugging Face folder",
    "google/siglip2-large-patch16-384",
    ("config.json", "processor_config.json", "preprocessor_config.json"),
    (("config.json",),),
)


@dataclass(frozen=True, slots=True)
class Source:
    """One input on this machine; `origin` is what the bundle's provenance says of it."""

    path: Path
    origin: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Sources:
    """All inputs of an export; `vision_model` is None where the bundle is to index no images."""

    checkpoint: Source
    language_model: Source
    vision_model: Source | None

    def to_json(self) -> dict[str, dict[str, str] | None]:
        """Return where each input came from, as plain JSON values."""
        vision = self.vision_model
        return {
            "checkpoint": dict(self.checkpoint.origin),
            "language_model": dict(self.language_model.origin),
            "vision_model": None if vision is None else dict(vision.origin),
        }


def locate(
    checkpoint: StrPath,
    language_model: StrPath,
    vision_model: StrPath | None,
    progress: Progress,
) -> Sources:
    """Find every input, and fetch those that are names on the Hub; a path here wins over a name.

    The checkpoint, which is large, is fetched last.

    Raises:
        CheckpointError: an input is neither here nor on the Hub, or lacks files (all listed).
    """
    faults: list[CheckpointError] = []
    language = _try(faults, lambda: _folder(language_model, LANGUAGE, progress))
    vision = None
    if vision_model is not None:
        vision = _try(faults, lambda: _folder(vision_model, VISION, progress))
    located = _try(faults, lambda: _checkpoint(checkpoint))
    if located is None or language is None or faults:
        raise _all_at_once(faults)
    if isinstance(located, HubName):
        located = _fetched(located, progress)
    return Sources(located, language, vision)


T = TypeVar("T")


def _try(faults: list[CheckpointError], find: Callable[[], T]) -> T | None:
    try:
        return find()
    except CheckpointError as error:
        faults.append(error)
        return None


def _all_at_once(faults: list[CheckpointError]) -> CheckpointError:
    if len(faults) == 1:
        return faults[0]
    hints = list(dict.fromkeys(fault.hint for fault in faults if fault.hint))
    return CheckpointError(
        "the inputs of the export cannot be used",
        faults=[fault.message for fault in faults],
        hint="; ".join(hints),
    )


def _folder(given: StrPath, kind: ModelFolder, progress: Progress) -> Source:
    """Return a local folder, or that of a repository's files in the Hub's cache."""
    text = os.fspath(given)
    path = Path(text)
    if path.exists():
        if not path.is_dir():
            raise CheckpointError(
                f"{text} is a file, expected {kind.what}", hint=f"pass {kind.option} the folder"
            )
        _check_files(path, kind, text)
        return Source(path, {"folder": path.resolve().name})
    name = HubName.parse(text)
    if name is None or name.file is not None:
        raise CheckpointError(
            f"{text} does not exist, expected {kind.what} or {HUB_FOLDER}",
            hint=f"pass {kind.option} a folder, or a name such as {kind.example}",
        )
    progress(f"fetching {text}")
    snapshot = fetch(name, kind.files, progress)
    _check_files(snapshot.folder, kind, f"{name.repo} at commit {snapshot.commit[:12]}")
    return Source(snapshot.folder, snapshot.origin())


def _check_files(folder: Path, kind: ModelFolder, shown: str) -> None:
    missing = [
        " or ".join(names)
        for names in kind.needed
        if not any((folder / name).is_file() for name in names)
    ]
    if missing:
        raise CheckpointError(
            f"{shown} holds no {' and no '.join(missing)}, expected {kind.what}",
            hint=f"pass {kind.option} the folder, or the name (such as {kind.example}), of the "
            "model that the checkpoint was trained from",
        )


def _checkpoint(given: StrPath) -> Source | HubName:
    """Return the local file, or the one file that a name on the Hub means."""
    text = os.fspath(given)
    path, name = Path(text), HubName.parse(text)
    is_hub = name is not None and not path.exists()
    if name and is_hub and name.file and name.revision is None and Path(name.repo).is_dir():
        text, is_hub = f"{name.repo}/{name.file}", False  # a local folder wins
        path = Path(text)
    if name and is_hub and (name.file or not text.endswith(CHECKPOINT_SUFFIXES)):
        return _with_file(name)
    if path.is_dir():
        raise CheckpointError(
            f"{text} is a folder, expected a checkpoint file",
            hint="name the file in it, for example checkpoint_16.pth",
        )
    if not path.exists():
        raise CheckpointError(f"{text} does not exist, expected a checkpoint file or {HUB_FILE}")
    return Source(path, {"file": path.name})


def _with_file(name: HubName) -> HubName:
    """Return the name with its file; without one, the repository's only checkpoint."""
    files, is_cache = list_files(name)
    checkpoints = [file for file in files if file.endswith(CHECKPOINT_SUFFIXES)]
    if name.file in files:
        return name
    if name.file is None and len(checkpoints) == 1:
        return HubName(name.text, name.repo, name.revision, checkpoints[0])
    shown = checkpoints or files
    listed = ", ".join(shown[:_MOST_NAMES]) or "nothing"
    if len(shown) > _MOST_NAMES:
        listed += f" and {len(shown) - _MOST_NAMES} more files"
    if name.file is not None:
        fault = f"no file {name.file}"
    else:
        fault = f"{len(checkpoints) or 'no'} checkpoint files"
    raise CheckpointError(
        f"{'the cache of ' if is_cache else ''}{name.repo} holds {fault}: got {listed}",
        hint=f"name the checkpoint: {name.text.partition(':')[0]}:FILE",
    )


def _fetched(name: HubName, progress: Progress) -> Source:
    file = name.file or ""
    progress(f"fetching {name.text}")
    snapshot = fetch(name, [glob.escape(file)], progress)
    path = snapshot.folder / file
    return Source(path, {**snapshot.origin(), "file": file})
