"""The first stage: an honest dual encoder (SigLIP's two towers) that proposes candidates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from transformers import SiglipModel

from ..bundle import BundleManifest, ImageSpec
from ..errors import EdjeError
from ..runtime.indexing.images import Unreadable, decode_image
from . import tiny_model
from .weights import State, official_layout

Float32 = npt.NDArray[np.float32]


class FirstStage:
    """Embeds images and captions; the dot product of two embeddings ranks candidates."""

    def __init__(self, state: State):
        self._model = SiglipModel(tiny_model.siglip_config()).eval()
        clip = {k.removeprefix("clip."): v for k, v in official_layout(state).items()}
        wanted = self._model.state_dict().keys()
        self._model.load_state_dict({key: clip[key] for key in wanted})
        self._tokenizer = tiny_model.make_tokenizer()
        length = tiny_model.MAX_FIRST_STAGE_TEXT
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(length=length)

    @torch.inference_mode()
    def embed_images(self, paths: Sequence[Path], spec: ImageSpec, batch: int = 128) -> Float32:
        """Return unit vectors float32 [N, H] of image files."""
        parts = []
        for start in range(0, len(paths), batch):
            pixels = np.stack([_pixels(path, spec) for path in paths[start : start + batch]])
            out = self._model.vision_model(pixel_values=torch.from_numpy(pixels))
            parts.append(F.normalize(out.pooler_output, dim=-1).numpy())
        return np.concatenate(parts)

    @torch.inference_mode()
    def embed_captions(self, captions: Sequence[str]) -> Float32:
        """Return unit vectors float32 [N, H] of captions."""
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(list(captions))]
        out = self._model.text_model(input_ids=torch.tensor(ids))
        vectors: Float32 = F.normalize(out.pooler_output, dim=-1).numpy()
        return vectors

    def candidates(
        self, images: Sequence[Path], captions: Sequence[str], bundle: Path
    ) -> npt.NDArray[np.int64]:
        """Return every caption's images, best first: int64 [captions, images]."""
        spec = BundleManifest.read(bundle).image
        if spec is None:
            raise EdjeError("the demo's bundle has no image encoder, expected one")
        similarity = self.embed_captions(captions) @ self.embed_images(images, spec).T
        return np.argsort(-similarity, axis=1, kind="stable")


def _pixels(path: Path, spec: ImageSpec) -> Float32:
    pixels = decode_image(path, spec)
    if isinstance(pixels, Unreadable):
        raise EdjeError(f"{path} cannot be read: {pixels.reason}")
    return pixels
