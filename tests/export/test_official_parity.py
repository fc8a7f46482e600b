"""The reference modules and the exported graphs against what the official code computed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edje.export.checkpoint import Checkpoint, read_checkpoint
from edje.export.configs import read_language_model, read_tokenizer, read_vision_model
from edje.export.reference import ImageEncoder, load_adapter, load_joint_encoder, load_tower

# float32 against the official float32. Seen: scores 1.5e-6, tokens 1.5e-5 (outputs up to 27).
TOLERANCE = 1e-4
NUM_CAPTIONS, NUM_IMAGES = 5, 12


@dataclass(frozen=True)
class Official:
    """Inputs and outputs of the official code."""

    images: np.ndarray  # uint8 [12, 3, 32, 32]
    features: np.ndarray  # float32 [12, 16, 48]
    tokens: np.ndarray  # float32 [12, 64, 32]
    scores: np.ndarray  # float32 [5, 12]
    scores_from_fp16_tokens: np.ndarray
    caption_ids: list[list[int]]

    def feed(self, pairs: list[tuple[int, int]], slots: int, dtype: str) -> dict[str, np.ndarray]:
        """Return the joint encoder's inputs for (caption, image) pairs, one query a caption."""
        captions = sorted({caption for caption, _ in pairs})
        ids = np.zeros((len(captions), slots), np.int32)
        for row, caption in zip(ids, captions, strict=True):
            row[: len(self.caption_ids[caption])] = self.caption_ids[caption]
        return {
            "text_ids": ids,
            "text_length": np.array([len(self.caption_ids[c]) for c in captions], np.int32),
            "query_of_pair": np.array([captions.index(c) for c, _ in pairs], np.int32),
            "visual_tokens": self.tokens[[image for _, image in pairs]].astype(dtype),
        }


@pytest.fixture(scope="module")
def official(official_tiny: Path) -> Official:
    expected = np.load(official_tiny / "expected.npz")
    captions = json.loads((official_tiny / "captions.json").read_text())
    image_token = captions["image_token_id"]
    return Official(
        expected["images_u8"],
        expected["vision_tokens"],
        expected["compressed_tokens"],
        expected["scores"],
        expected["scores_from_fp16_tokens"],
        [ids[: ids.index(image_token)] for ids in captions["pair_input_ids"]],
    )


@pytest.fixture(scope="module")
def checkpoint(official_tiny: Path) -> Checkpoint:
    return read_checkpoint(official_tiny / "checkpoint_16.pth")


@pytest.fixture(scope="module")
def scorer(official_tiny: Path, checkpoint: Checkpoint):
    folder = official_tiny / "lm"
    config = read_language_model(folder, checkpoint, read_tokenizer(folder))
    return load_joint_encoder(checkpoint, config)


@pytest.fixture(scope="module")
def image_encoder(official_tiny: Path, checkpoint: Checkpoint) -> ImageEncoder:
    vision, _ = read_vision_model(official_tiny / "siglip", checkpoint)
    adapter = load_adapter(
        checkpoint,
        num_heads=vision.num_attention_heads,
        layer_norm_eps=vision.layer_norm_eps,
        activation="gelu",
    )
    return ImageEncoder(load_tower(vision, checkpoint.vision), adapter)


@pytest.fixture(scope="module")
def exported_scorer(tiny_bundle: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(tiny_bundle / "joint_encoder.onnx"))


def run_torch(module: torch.nn.Module, *inputs: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return module(*map(torch.from_numpy, inputs)).numpy()


def run_before_rounding(path: Path, feed: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Run an encoder graph; return its output in float16 and the value that was rounded to it."""
    model = onnx.load(path)
    (cast,) = (node for node in model.graph.node if node.output[0] == "visual_tokens")
    exact = onnx.helper.make_tensor_value_info(cast.input[0], onnx.TensorProto.FLOAT, None)
    model.graph.output.append(exact)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    rounded, value = session.run(None, feed)
    return rounded, value


def pixels(images: np.ndarray) -> np.ndarray:
    return ((images.astype(np.float32) / 255 - 0.5) / 0.5).astype(np.float32)


def test_reference_tower_and_adapter_give_the_official_features_and_tokens(official, image_encoder):
    with torch.inference_mode():
        output = image_encoder.tower(pixel_values=torch.from_numpy(pixels(official.images)))
    assert np.abs(output.last_hidden_state.numpy() - official.features).max() < TOLERANCE
    tokens = run_torch(image_encoder.adapter, official.features)
    assert np.abs(tokens - official.tokens).max() < TOLERANCE


@pytest.mark.parametrize("batch", [1, 5, 12])
@pytest.mark.parametrize("graph", ["adapter", "image_encoder"])
def test_exported_graphs_give_the_official_tokens(official, tiny_bundle, graph, batch):
    inputs = {"adapter": official.features, "image_encoder": pixels(official.images)}[graph]
    name = {"adapter": "features", "image_encoder": "pixels"}[graph]
    path = tiny_bundle / f"{graph}.onnx"
    rounded, tokens = run_before_rounding(path, {name: inputs[:batch]})
    assert np.abs(tokens - official.tokens[:batch]).max() < TOLERANCE
    np.testing.assert_array_equal(rounded, tokens.astype(np.float16))


@pytest.mark.parametrize("slots", [63, 64])
@pytest.mark.parametrize("num_pairs", [*range(1, 9), 60])
def test_captions_mixed_in_one_batch(official, scorer, exported_scorer, slots, num_pairs):
    """Other buckets and batch sizes: `tests/engines/test_parity.py` runs the same graph."""
    pairs = [(c, i) for c in range(NUM_CAPTIONS) for i in range(NUM_IMAGES)]
    np.random.default_rng(num_pairs).shuffle(pairs)
    index = tuple(np.array(pairs[:num_pairs]).T)
    feed = official.feed(pairs[:num_pairs], slots, "float32")
    assert np.abs(run_torch(scorer, *feed.values()) - official.scores[index]).max() < TOLERANCE
    (scores,) = exported_scorer.run(None, official.feed(pairs[:num_pairs], slots, "float16"))
    assert np.abs(scores - official.scores_from_fp16_tokens[index]).max() < TOLERANCE
