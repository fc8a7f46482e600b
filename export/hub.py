"""Models on the Hugging Face Hub: `owner/name[@revision][:file]` -> files in the local cache.

`huggingface_hub` does the work, so its users' settings hold: HF_HOME and HF_HUB_CACHE, HF_TOKEN and
`hf auth login`, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_DISABLE_PROGRESS_BARS.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub.utils.tqdm import tqdm

_NAME = re.compile(
    r"(?P<repo>[a-z0-9][\w.-]*/[a-z0-9][\w.-]*)(@(?P<revision>[^\s:]+))?(:(?P<file>[^:]+))?",
    re.ASCII | re.IGNORECASE,
)
_NO_FILES = "\n"  # a pattern that no file's name matches
_LOG_IN = "`hf auth login` or HF_TOKEN says who asks"


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
        match = _NAME.fullmatch(text)
        return cls(text, match["repo"], match["revision"], match["file"]) if match else None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One commit of a repository in the local cache; `folder` holds what was fetched of it."""

    name: HubName
    commit: str
    folder: Path

    def origin(self) -> dict[str, str]:
        """Return what a bundle's provenance says of the repository."""
        asked = {} if self.name.revision is None else {"revision": self.name.revision}
        return {"repository": self.name.repo, **asked, "commit": self.commit}


def fetch(name: HubName, patterns: Sequence[str], show: Callable[[str], None]) -> Snapshot:
    """Fetch the files of a repository that match `patterns`, or take them from the cache.

    Raises:
        CheckpointError: no such repository or revision, no right to it, or no way to it.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name.repo,
            revision=name.revision,
            allow_patterns=list(patterns),
            tqdm_class=_reporting_to(show, name.repo),
        )
    except Exception as error:  # besides its own, those of the HTTP library of the day
        raise _fault(name, error) from error
    return Snapshot(name, Path(folder).name, Path(folder))


def list_files(name: HubName) -> tuple[list[str], bool]:
    """Return the names of a repository's files, and whether only those in the cache are known.

    Raises:
        CheckpointError: no such repository or revision, no right to it, or no way to it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(name.repo, revision=name.revision)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _fault(name, error) from error
    except Exception:  # no network, or HF_HUB_OFFLINE: the cache may do
        folder = fetch(name, [_NO_FILES], lambda step: None).folder
        paths = (path for path in folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(folder).as_posix() for path in paths), True
    return sorted(file.rfilename for file in info.siblings or ()), False


def _fault(name: HubName, error: Exception) -> CheckpointError:
    """Say in one sentence why a repository cannot be had."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name.repo}"
    told = _unreachable(name, error)
    if isinstance(error, errors.GatedRepoError):
        told = (
            f"{name.repo} is a gated repository, and its owner has not granted access",
            f"ask for it on {page}; {_LOG_IN}",
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        told = (
            f"{name.repo} has no revision {name.revision!r}",
            f"expected a branch, a tag or a commit that {page}/commits/main lists",
        )
    elif isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        told = (
            f"{name.text} is neither a path here nor a repository on the Hugging Face Hub that "
            "may be read",
            f"check the name; for a private repository, {_LOG_IN}",
        )
    message, hint = told
    return CheckpointError(message, hint=hint)


def _unreachable(name: HubName, error: Exception) -> tuple[str, str]:
    from huggingface_hub import constants

    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return (
            f"cannot write {name.repo} to the Hugging Face cache ({constants.HF_HUB_CACHE}): "
            f"{error.strerror}",
            "set HF_HUB_CACHE to a folder that can be written and has room",
        )
    if constants.HF_HUB_OFFLINE:
        return (
            f"{name.text} is neither a path here nor whole in the Hugging Face cache "
            f"({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids to fetch it",
            "unset HF_HUB_OFFLINE, or pass a local path",
        )
    cause = next(iter(str(error).splitlines()), "").removeprefix("Got: ") or type(error).__name__
    return (
        f"{name.text} is no path here and cannot be fetched from {constants.ENDPOINT}: {cause}",
        "check the network (HTTPS_PROXY, HF_ENDPOINT), or pass a local path",
    )


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
