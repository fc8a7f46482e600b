"""Scorers of another kind beside ours: they give other scores, so only their cost compares.

A cross-encoder of the same size on text of the same length, BLIP with its image encoder online and
with features at hand, and MaxSim over the same stored tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...arrays import Float32
from ...bundle import BundleManifest
from ...errors import EdjeError
from ...runtime.store import TokenStore
from ..random_model import NUM_POSITIONS, SEED
from .contest import Ask, Bench, Question, Run, SkippedError
from .pytorch import BATCH, GPU_BATCH

if TYPE_CHECKING:
    from transformers import BlipForImageTextRetrieval

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NUM_DOCUMENT_WORDS = 50  # different ones; the table of all words is as large as the model's
CHECKED = 8  # MaxSim scores that are computed again, one by one
TOLERANCE = 1e-3
BLIP_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 16,
}
BLIP_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}


def cross_encoder(backend: str, dtype: str = "float32") -> Callable[[Bench], Ask]:
    """Return what opens a sentence-transformers `CrossEncoder` of the model's size.

    A pair is the query and a document of as many words as an image has tokens, so that both
    sequences are equally long: `[CLS] query [SEP] document [SEP]`. Its tokenizer is part of the
    time, as the text of the documents is what such a service stores.
    """

    def make(bench: Bench) -> Ask:
        try:
            from sentence_transformers import CrossEncoder
        except ImportError as error:
            raise SkippedError("pip install sentence-transformers") from error
        options: dict[str, Any] = {}
        if backend == "torch":
            options = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
        folder = bench.once("cross-encoder", lambda: write_cross_encoder(bench))
        try:
            model = CrossEncoder(
                str(folder),
                device=bench.device,
                backend=backend,
                local_files_only=True,
                model_kwargs=options,
            )
        except Exception as error:  # it raises a plain Exception where a backend's package lacks
            if backend == "torch":
                raise
            raise SkippedError(" ".join(str(error).split())) from error
        tokens = BundleManifest.read(bench.bundle).sizes.num_tokens
        size = BATCH if bench.device == "cpu" else GPU_BATCH

        def ask(question: Question, num_pairs: int) -> Run:
            query = " ".join(_words(SEED, question.pairs.num_wordpieces))
            asked = [(query, " ".join(_words(number + 1, tokens))) for number in range(num_pairs)]
            ids = model.tokenizer(*asked[0])["input_ids"]
            wanted = question.pairs.num_wordpieces + tokens + 3
            if len(ids) != wanted:
                raise EdjeError(f"a text pair has {len(ids)} ids, expected {wanted}")

            def run() -> Float32:
                scores = model.predict(asked, batch_size=size, show_progress_bar=False)
                return np.asarray(scores, np.float32)

            return run

        return ask

    return make


def _words(seed: int, count: int) -> list[str]:
    numbers = np.random.default_rng(seed).integers(0, NUM_DOCUMENT_WORDS, count)
    return [f"word{number}" for number in numbers.tolist()]


def write_cross_encoder(bench: Bench) -> Path:
    """Write a random BERT with one label, and its tokenizer, as `save_pretrained` does."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    _without_bars()
    sizes, folder = BundleManifest.read(bench.bundle).sizes, bench.scratch / "cross-encoder"
    config = BertConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        intermediate_size=sizes.intermediate,
        max_position_embeddings=NUM_POSITIONS,
        num_labels=1,
    )
    torch.manual_seed(SEED)
    BertForSequenceClassification(config).save_pretrained(folder)
    others = [f"word{number}" for number in range(sizes.vocab_size - len(SPECIAL))]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join([*SPECIAL, *others]) + "\n", encoding="utf-8")
    BertTokenizer(str(vocabulary), model_max_length=NUM_POSITIONS).save_pretrained(folder)
    return folder


def _without_bars() -> None:
    """Keep the bars of loading and saving weights out of the table."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def blip(*, online: bool) -> Callable[[Bench], Ask]:
    """Return what opens BLIP as large as the paper's (ViT-L/16 at 384 pixels), random weights.

    Online it encodes the image with 24 layers first, which nobody can do for 1,000 candidates a
    query: a turn scores a few pairs, and the cost of a pair stands for all. With features at hand
    only the text runs, 12 layers with cross-attention to 577 positions: what the paper's 53 times
    are measured against.
    """

    def make(bench: Bench) -> Ask:
        model: BlipForImageTextRetrieval = bench.once("blip", lambda: blip_model(bench.device))
        config = model.config.vision_config
        random = torch.Generator().manual_seed(SEED)
        side, positions = config.image_size, (config.image_size // config.patch_size) ** 2 + 1

        def ask(question: Question, num_pairs: int) -> Run:
            length = question.pairs.text_ids.shape[1]
            ids = torch.randint(0, model.config.text_config.vocab_size, (1, length))
            ids = ids.expand(num_pairs, -1).to(bench.device)
            shape = (3, side, side) if online else (positions, config.hidden_size)
            images = torch.randn(num_pairs, *shape, generator=random).to(bench.device)

            def run() -> Float32:
                with torch.inference_mode():
                    states = model.vision_model(images).last_hidden_state if online else images
                    return _itm_scores(model, ids, states)

            return run

        return ask

    return make


def blip_model(device: str) -> BlipForImageTextRetrieval:
    """Return the model on `device`."""
    from transformers import BlipConfig, BlipForImageTextRetrieval

    text = {**BLIP_TEXT, "encoder_hidden_size": BLIP_VISION["hidden_size"]}
    config = BlipConfig(text_config=text, vision_config=dict(BLIP_VISION))
    torch.manual_seed(SEED)
    return BlipForImageTextRetrieval(config).eval().to(device)


def _itm_scores(model: BlipForImageTextRetrieval, ids: Tensor, states: Tensor) -> Float32:
    """Return the match logit of each pair, as the model's own forward computes it."""
    mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
    text = model.text_encoder(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
    ).last_hidden_state
    scores: Float32 = model.itm_head(text[:, 0])[:, 1].float().cpu().numpy()
    return scores


def max_sim(bench: Bench) -> Ask:
    """Open late interaction over the store: of each query vector the best visual token, summed.

    It reads and verifies the same records; the query's vectors are random, as no text encoder
    comes with the model. 0.1 % of the arithmetic, and another ranking.
    """
    store = bench.stack.enter_context(TokenStore.open(bench.store))

    def ask(question: Question, num_pairs: int) -> Run:
        random, shape = np.random.default_rng(SEED), store.record_shape
        length = question.pairs.text_ids.shape[1]
        query = torch.from_numpy(random.standard_normal((length, shape[1]), np.float32))
        rows, size = store.rows(list(bench.ids[:num_pairs])), 64
        out = np.empty((size, *shape), np.float16)

        def run() -> Float32:
            scores = np.empty(num_pairs, np.float32)
            for start in range(0, num_pairs, size):
                part = rows[start : start + size]
                store.read(part, out[: len(part)])
                tokens = torch.from_numpy(out[: len(part)]).float()
                best = (tokens @ query.T).amax(dim=1).sum(dim=1)
                scores[start : start + size] = best.numpy()
            return scores

        exact = [
            (question.pairs.tokens[at].astype(np.float32) @ query.numpy().T).max(0).sum()
            for at in range(min(CHECKED, num_pairs))
        ]
        if not np.allclose(run()[: len(exact)], exact, rtol=TOLERANCE):
            raise EdjeError("MaxSim over the store differs from MaxSim over the tokens")
        return run

    return ask
