"""Patch features that users have already (.npy, .safetensors), as a source for the adapter."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ...arguments import read_ids
from ...bundle import ModelSizes
from ...errors import RequestError, named
from .sources import (
    FolderWalk,
    SkippedImage,
    Source,
    Unlisted,
    Wanted,
    id_hash,
    name_of,
    place_of,
    repeated,
    text_of,
)

Features = npt.NDArray[np.floating]
Read = Callable[[], Features]

IDS = "ids.txt"
DTYPES = ("float16", "float32")


@dataclass(frozen=True, slots=True)
class FeatureEntry:
    """The patch features of one image: float16 or float32 [N, D], the owner's."""

    id: str
    features: Features
    source: str

    @property
    def carried_bytes(self) -> int:
        """What it takes in memory besides its names."""
        return self.features.nbytes


class FeatureSource(Source[FeatureEntry]):
    """Features by id, each read from its file when its turn comes.

    Takes a `.npy` [images, N, D] with a list of ids, a `.safetensors` (a tensor [N, D] under each
    id), or a folder of both kinds: `ID.npy` [N, D], and any number of `.safetensors`.

    Args:
        path: of the file or folder.
        sizes: of the model: features of other shapes are skipped.
        ids: the list of ids of a single `.npy`, one a line; default: `ids.txt` beside it.
        follow_links: go into links to folders too.

    Raises:
        RequestError: missing, empty, another kind of file, ids that do not fit, or `safetensors`
            is not installed.
    """

    def __init__(
        self, path: Path, sizes: ModelSizes, *, ids: Path | None = None, follow_links: bool = False
    ):
        self.names = frozenset({place_of(path)})
        self._walk = FolderWalk(path, follow_links=follow_links)
        self._unlisted: list[Unlisted] = []
        self._sizes = sizes
        if ids is not None and path.suffix != ".npy":
            raise RequestError(f"--ids {ids}: only a single .npy takes one, {path} names its own")
        self._files = self._open(path, ids)
        if not any(True for _ in self.ids()):
            raise RequestError(f"{path} holds no features to index")
        hashes = np.fromiter((id_hash(image_id) for image_id in self.ids()), np.uint64)
        twice = repeated(self.ids, hashes)
        if twice:
            raise RequestError(f"{path}: {len(twice)} ids come twice: {named(twice)}")

    @property
    def num_links(self) -> int:
        return self._walk.num_links

    def ids(self) -> Iterator[str]:
        return (image_id for file in self._files for image_id in file.ids)

    def entries(self, wanted: Wanted) -> Iterator[FeatureEntry | SkippedImage]:
        (source,) = self.names
        for name, reason in self._unlisted:
            yield SkippedImage(text_of(name), reason, source)
        for file in self._files:
            for image_id, read in file.readers():
                if wanted(image_id):
                    found = self._read(read)
                    if isinstance(found, str):
                        yield SkippedImage(image_id, found, source)
                    else:
                        yield FeatureEntry(image_id, found, source)

    def _open(self, path: Path, ids: Path | None) -> Sequence[_NpyStack | _NpyFiles | _Shard]:
        if path.is_dir():
            shards = [_Shard(shard) for shard in sorted(path.glob("*.safetensors"))]
            found = list(self._walk.names())
            self._unlisted = [one for one in found if isinstance(one, Unlisted)]
            names = [one for one in found if isinstance(one, str)]
            return [_NpyFiles(path, names), *shards]
        if not path.is_file():
            raise RequestError(
                f"there is no {path}", hint="give a .npy, a .safetensors or a folder"
            )
        if path.suffix == ".npy":
            return [_NpyStack(path, read_ids(str(ids or path.parent / IDS)))]
        if path.suffix == ".safetensors":
            return [_Shard(path)]
        raise RequestError(
            f"{path} holds no features that can be read",
            hint="give a .npy [images, N, D], a .safetensors, or a folder of such files",
        )

    def _read(self, read: Read) -> Features | str:
        """Return an image's features, or why they cannot be used."""
        try:
            features = read()
        except Exception as error:  # damaged files of either kind raise nearly anything
            detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
            return f"cannot be read: {detail}"
        patches, dim = self._sizes.num_features, self._sizes.feature_dim
        shape, dtype = features.shape, features.dtype.name
        fits = len(shape) == 2 and shape[1] == dim and shape[0] == (patches or max(shape[0], 1))
        if not fits or dtype not in DTYPES:
            expected = f"float16 or float32 [{patches or 'N'}, {dim}]"
            return f"holds {dtype} {list(shape)}, expected {expected}"
        return features if np.isfinite(features).all() else "its features hold NaN or infinity"


class _NpyStack:
    """One array [images, N, D]; its rows are read one by one, never mapped."""

    def __init__(self, path: Path, ids: Sequence[str]):
        self._path, self.ids = path, ids
        with path.open("rb") as file:
            self._shape, self._dtype = _npy_header(path, file)
            self._start = file.tell()
        size = self._start + math.prod(self._shape) * self._dtype.itemsize
        faults = []
        if len(self._shape) != 3 or self._dtype.name not in DTYPES:
            got = f"{self._dtype.name} {list(self._shape)}"
            faults.append(f"got {got}, expected float16 or float32 [images, N, D]")
        elif len(ids) != self._shape[0]:
            faults.append(f"got {len(ids):,} ids for {self._shape[0]:,} images")
        if path.stat().st_size < size:
            faults.append(f"the file is cut off: {path.stat().st_size:,} of {size:,} bytes")
        if faults:
            raise RequestError(f"{path} cannot be indexed", faults=faults)

    def readers(self) -> Iterator[tuple[str, Read]]:
        with self._path.open("rb", buffering=0) as file:
            for number, image_id in enumerate(self.ids):
                yield image_id, partial(self._row, file, number)

    def _row(self, file: BinaryIO, number: int) -> Features:
        num_bytes = math.prod(self._shape[1:]) * self._dtype.itemsize
        content = os.pread(file.fileno(), num_bytes, self._start + number * num_bytes)
        return np.frombuffer(content, self._dtype).reshape(self._shape[1:])


def _npy_header(path: Path, file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype of a .npy, and leave `file` where the values begin."""
    try:
        version = np.lib.format.read_magic(file)
        old = version == (1, 0)
        read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, by_column, dtype = read(file)
    except (ValueError, OSError, EOFError) as error:
        raise RequestError(f"{path} is no .npy: {error}") from error
    if by_column:
        raise RequestError(
            f"{path} is stored column by column, expected row by row",
            hint="save it again: np.save(path, np.ascontiguousarray(features))",
        )
    return shape, dtype


class _NpyFiles:
    """A folder of `ID.npy` [N, D]; an id is the path below the folder, without `.npy`."""

    def __init__(self, root: Path, names: Sequence[str]):
        self._root = root
        self.ids = sorted(text_of(name)[: -len(".npy")] for name in names if name.endswith(".npy"))

    def readers(self) -> Iterator[tuple[str, Read]]:
        for image_id in self.ids:
            path = self._root / name_of(f"{image_id}.npy")
            yield image_id, partial(np.load, path, allow_pickle=False)


class _Shard:
    """A `.safetensors`: its keys are ids."""

    def __init__(self, path: Path):
        self._path = path
        with self._opened() as shard:
            self.ids = sorted(shard.keys())

    def readers(self) -> Iterator[tuple[str, Read]]:
        with self._opened() as shard:
            for image_id in self.ids:
                yield image_id, partial(shard.get_tensor, image_id)

    def _opened(self) -> Any:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise RequestError(
                f"reading {self._path} needs safetensors, which is not installed",
                hint="pip install 'edje-runtime[index]'",
            ) from error
        try:
            return safe_open(str(self._path), framework="numpy")
        except (SafetensorError, OSError) as error:
            raise RequestError(f"{self._path} is no .safetensors: {error}") from error
