"""The inputs of an export: a path on this machine, or else a name on the Hugging Face Hub.

`huggingface_hub` fetches, so its users' settings hold: HF_HOME and HF_HUB_CACHE, HF_TOKEN and
`hf auth login`, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_DISABLE_PROGRESS_BARS.
"""

from __future__ import annotations

import glob
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..arguments import StrPath
from ..errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub.utils.tqdm import tqdm

Progress = Callable[[str], None]

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
HUB_FOLDER = "a name on the Hugging Face Hub (owner/name or owner/name@revision)"
HUB_FILE = "a name on the Hugging Face Hub (owner/name[@revision][:file])"
_MOST_NAMES = 12
_NO_FILES = "\n"  # a pattern that no file's name matches
_LOG_IN = "`hf auth login` or HF_TOKEN says who asks"
_HUB_NAME = re.compile(
    r"(?P<repo>[a-z0-9][\w.-]*/[a-z0-9][\w.-]*)(@(?P<revision>[^\s:]+))?(:(?P<file>[^:]+))?",
    re.ASCII | re.IGNORECASE,
)


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
        return {
            "checkpoint": dict(self.checkpoint.origin),
            "language_model": dict(self.language_model.origin),
            "vision_model": dict(self.vision_model.origin) if self.vision_model else None,
        }


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository on the Hub, its revision (None: the default branch), and a file in it or None.

    `text` is what the user wrote.
    """

    text: str
    repo: str
    revision: str | None
    file: str | None

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """Return the name that `text` is, or None where it cannot be one."""
        match = _HUB_NAME.fullmatch(text)
        return cls(text, match["repo"], match["revision"], match["file"]) if match else None


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
        if len(faults) == 1:
            raise faults[0]
        hints = dict.fromkeys(fault.hint for fault in faults if fault.hint)
        raise CheckpointError(
            "the inputs of the export cannot be used",
            faults=[fault.message for fault in faults],
            hint="; ".join(hints),
        )
    if isinstance(located, HubName):
        file = located.file or ""
        fetched = _fetch(located, [glob.escape(file)], progress)
        located = Source(fetched.path / file, {**fetched.origin, "file": file})
    return Sources(located, language, vision)


T = TypeVar("T")


def _try(faults: list[CheckpointError], find: Callable[[], T]) -> T | None:
    try:
        return find()
    except CheckpointError as error:
        faults.append(error)
        return None


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
    fetched = _fetch(name, kind.files, progress)
    _check_files(fetched.path, kind, f"{name.repo} at commit {fetched.origin['commit'][:12]}")
    return fetched


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
    files, is_cache = _list_files(name)
    checkpoints = [file for file in files if file.endswith(CHECKPOINT_SUFFIXES)]
    if name.file in files:
        return name
    if name.file is None and len(checkpoints) == 1:
        return replace(name, file=checkpoints[0])
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


def _fetch(name: HubName, patterns: Sequence[str], progress: Progress) -> Source:
    """Return the folder of a repository with the files that match, fetched or from the cache."""
    from huggingface_hub import snapshot_download

    progress(f"fetching {name.text}")
    try:
        folder = snapshot_download(
            name.repo,
            revision=name.revision,
            allow_patterns=list(patterns),
            tqdm_class=_reporting_to(progress, name.repo),
        )
    except Exception as error:  # besides its own, those of the HTTP library of the day
        raise _fault(name, error) from error
    asked = {} if name.revision is None else {"revision": name.revision}
    commit = Path(folder).name
    return Source(Path(folder), {"repository": name.repo, **asked, "commit": commit})


def _list_files(name: HubName) -> tuple[list[str], bool]:
    """Return the names of a repository's files, and whether only those in the cache are known."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(name.repo, revision=name.revision)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _fault(name, error) from error
    except Exception:  # no network, or HF_HUB_OFFLINE: the cache may do
        folder = _fetch(name, [_NO_FILES], lambda step: None).path
        paths = (path for path in folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(folder).as_posix() for path in paths), True
    return sorted(file.rfilename for file in info.siblings or ()), False


def _fault(name: HubName, error: Exception) -> CheckpointError:
    """Say in one sentence why a repository cannot be had."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name.repo}"
    if isinstance(error, errors.GatedRepoError):
        message = f"{name.repo} is a gated repository, and its owner has not granted access"
        hint = f"ask for it on {page}; {_LOG_IN}"
    elif isinstance(error, errors.RevisionNotFoundError):
        message = f"{name.repo} has no revision {name.revision!r}"
        hint = f"expected a branch, a tag or a commit that {page}/commits/main lists"
    elif isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        message = (
            f"{name.text} is neither a path here nor a repository on the Hugging Face Hub that "
            "may be read"
        )
        hint = f"check the name; for a private repository, {_LOG_IN}"
    elif isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        message = (
            f"cannot write {name.repo} to the Hugging Face cache ({constants.HF_HUB_CACHE}): "
            f"{error.strerror}"
        )
        hint = "set HF_HUB_CACHE to a folder that can be written and has room"
    elif constants.HF_HUB_OFFLINE:
        message = (
            f"{name.text} is neither a path here nor whole in the Hugging Face cache "
            f"({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids to fetch it"
        )
        hint = "unset HF_HUB_OFFLINE, or pass a local path"
    else:
        first_line = next(iter(str(error).splitlines()), "").removeprefix("Got: ")
        cause = first_line or type(error).__name__
        message = (
            f"{name.text} is no path here and cannot be fetched from {constants.ENDPOINT}: {cause}"
        )
        hint = "check the network (HTTPS_PROXY, HF_ENDPOINT), or pass a local path"
    return CheckpointError(message, hint=hint)


class _Nowhere(io.StringIO):
    """Takes what a progress bar writes; a terminal where standard error is one."""

    def isatty(self) -> bool:
        return sys.stderr.isatty()


def _reporting_to(show: Callable[[str], None], repo: str) -> type[tqdm]:
    """Return a class of `huggingface_hub`'s progress bars that tells `show` the bytes so far."""
    from huggingface_hub.utils.tqdm import tqdm

    class Reporting(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            quiet = {**kwargs, "file": _Nowhere(), "leave": False}
            super().__init__(*args, **quiet)  # type: ignore[no-untyped-call]

        def display(self, *args: Any, **kwargs: Any) -> None:
            if self.unit == "B" and self.total:
                show(f"fetching {repo}: {self.n / 1e6:,.0f} of {self.total / 1e6:,.0f} MB")

    return Reporting
