"""The exported full-size scorer against transformers' own BertModel in the official layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import BertModel

from official_checkpoint import FULL_SIZE_SCORER, CheckpointFolders, bert_config

NUM_TOKENS = FULL_SIZE_SCORER.num_tokens
CLS, SEP, PAD = 2, 3, 0
TOLERANCE = 1e-4  # logits of about 1; seen: 2e-6


@pytest.fixture(scope="module")
def official_scores(full_size_checkpoint: CheckpointFolders):
    """Return a function that scores (ids, tokens) pairs as the official `compute_logits` does."""
    state = torch.load(full_size_checkpoint.checkpoint, weights_only=True, mmap=True)["model"]
    config = bert_config(FULL_SIZE_SCORER)
    config.vocab_size += 1  # `<image>`
    bert = BertModel(config, add_pooling_layer=True).eval()
    own = {
        name.removeprefix("language_model.bert."): value
        for name, value in state.items()
        if name.startswith("language_model.bert.")
    }
    own["pooler.dense.weight"] = state["classification_head.0.dense.weight"]
    own["pooler.dense.bias"] = state["classification_head.0.dense.bias"]
    bert.load_state_dict(own)
    weight, bias = state["classification_head.1.weight"], state["classification_head.1.bias"]
    words = bert.get_input_embeddings().weight

    def score(texts: list[np.ndarray], tokens: np.ndarray) -> np.ndarray:
        longest = max(map(len, texts)) + NUM_TOKENS + 1
        embeds = torch.zeros(len(texts), longest, config.hidden_size)
        types = torch.zeros(len(texts), longest, dtype=torch.long)
        mask = torch.zeros(len(texts), longest, dtype=torch.long)
        for row, text in enumerate(texts):
            end = len(text) + NUM_TOKENS
            embeds[row] = words[PAD]
            embeds[row, : len(text)] = words[torch.from_numpy(text).long()]
            embeds[row, len(text) : end] = torch.from_numpy(tokens[row]).float()
            embeds[row, end] = words[SEP]
            types[row, len(text) : end + 1] = 1
            mask[row, : end + 1] = 1
        output = bert(inputs_embeds=embeds, token_type_ids=types, attention_mask=mask)
        return (output.pooler_output @ weight.T + bias).squeeze(-1).numpy()

    return score


@pytest.fixture(scope="module")
def session(full_size_bundle: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(full_size_bundle / "joint_encoder.onnx"))


@pytest.mark.parametrize("slots", [16, 64])
def test_exported_scorer_equals_transformers_bert(official_scores, session, slots):
    rng = np.random.default_rng(slots)
    lengths = np.array([3, min(slots, 63), 13, 9], np.int32)
    ids = np.zeros((len(lengths), slots), np.int32)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = [CLS, *rng.integers(5, 30522, length - 2), SEP]
    query_of_pair = np.array([2, 0, 1, 1, 3, 2, 0], np.int32)
    tokens = rng.standard_normal((len(query_of_pair), NUM_TOKENS, 384)).astype(np.float16)
    feed = {
        "text_ids": ids,
        "text_length": lengths,
        "query_of_pair": query_of_pair,
        "visual_tokens": tokens,
    }
    (scores,) = session.run(None, feed)
    texts = [ids[query, : lengths[query]] for query in query_of_pair]
    with torch.inference_mode():
        expected = official_scores(texts, tokens)
    assert np.abs(scores - expected).max() < TOLERANCE
    assert np.std(expected) > 100 * TOLERANCE  # the scores tell pairs apart


def test_full_size_scorer_is_stored_once(full_size_bundle: Path):
    body = 33_360_000 * 4  # parameters of the BERT body without pooler, float32 (within 1 %)
    size = (full_size_bundle / "joint_encoder.onnx").stat().st_size
    assert abs(size - body) / body < 0.01
