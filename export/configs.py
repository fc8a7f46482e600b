"""The Hugging Face folders beside a checkpoint: configs and tokenizer, checked against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional

from ..bundle import ImageSpec
from ..errors import CheckpointError
from .checkpoint import MAX_TEXT, VISION, Checkpoint, tensor_faults, vision_shapes, vision_sizes
from .image_processor import OPTION, image_spec, read_image_processor, read_settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}

ONNX_ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "gelu": ("Gelu", {}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the function that a Hugging Face `hidden_act` names (checked by `configs`)."""
    return ACTIVATIONS[name]


IMAGE_TOKEN = "<image>"
SPECIAL_TOKENS = ("[CLS]", "[SEP]", "[PAD]")
HEADS_OF_KNOWN_TOWERS = {768: 12, 1024: 16}  # ViT-B and ViT-L, the official towers
OFFICIAL_VISION_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class LanguageConfig:
    """Sizes of the language model; `vocab_size` counts `<image>`, as the checkpoint does.

    `max_positions` is at least 64, the most text slots.
    """

    hidden: int
    num_layers: int
    num_heads: int
    intermediate: int
    vocab_size: int
    max_positions: int
    layer_norm_eps: float
    activation: str
    cls_id: int
    sep_id: int
    pad_id: int


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Sizes of the vision tower: R x R `pixels`, N = (R / patch)^2 `features` of D numbers.

    `settings` are those that build transformers' `SiglipVisionModel`.
    """

    hidden: int
    num_layers: int
    num_heads: int
    intermediate: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    activation: str
    settings: Mapping[str, Any]

    @property
    def num_features(self) -> int:
        """N: features of one image."""
        return (self.image_size // self.patch_size) ** 2


def read_language_model(
    folder: Path, checkpoint: Checkpoint, tokenizer: Tokenizer
) -> LanguageConfig:
    """Read `config.json` of the language model and check it against the checkpoint.

    Raises:
        CheckpointError: no BERT folder, or one that does not fit (all differences listed).
    """
    from transformers import BertConfig

    values = read_settings(folder / "config.json", "--language-model")
    if values.get("model_type", "bert") != "bert":
        raise CheckpointError(
            f"{folder} holds a {values['model_type']!r} model, expected a BERT language model",
            hint="pass the folder of the language model that the checkpoint was trained from",
        )
    bert = _build(BertConfig, values, folder)
    sizes = checkpoint.sizes
    told = {
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.num_layers,
        "intermediate_size": sizes.intermediate,
        "type_vocab_size": 2,
    }
    faults = _differences({name: getattr(bert, name) for name in told}, told)
    faults += _head_faults("num_attention_heads", bert.num_attention_heads, sizes.hidden)
    faults += _activation_faults(bert.hidden_act)
    faults += _vocabulary_faults(tokenizer, sizes.vocab_size)
    special = {name: tokenizer.token_to_id(name) for name in SPECIAL_TOKENS}
    ids = [number for number in special.values() if number is not None]
    faults += [f"tokenizer: no {name} token" for name, number in special.items() if number is None]
    if faults:
        raise CheckpointError(
            f"the language model in {folder} does not fit {checkpoint.path}",
            faults=faults,
            hint="pass the folder of the language model that the checkpoint was trained from",
        )
    return LanguageConfig(
        hidden=sizes.hidden,
        num_layers=sizes.num_layers,
        num_heads=bert.num_attention_heads,
        intermediate=sizes.intermediate,
        vocab_size=sizes.vocab_size,
        max_positions=max(sizes.max_positions, MAX_TEXT),
        layer_norm_eps=float(bert.layer_norm_eps),
        activation=bert.hidden_act,
        cls_id=ids[0],
        sep_id=ids[1],
        pad_id=ids[2],
    )


def read_vision_model(folder: Path, checkpoint: Checkpoint) -> tuple[VisionConfig, ImageSpec]:
    """Read the SigLIP folder's settings and check them against the checkpoint.

    Raises:
        CheckpointError: no SigLIP folder, or one that does not fit (all differences listed).
    """
    from transformers import SiglipVisionConfig

    values = read_settings(folder / "config.json", OPTION)
    kind = values.get("model_type")
    if kind not in ("siglip", "siglip_vision_model"):
        raise CheckpointError(
            f"{folder} holds a {kind!r} model, expected a 'siglip' vision model",
            hint="pass the folder of the SigLIP model that the checkpoint was trained from",
        )
    settings = _without_type(values.get("vision_config", {}) if kind == "siglip" else values)
    config = _vision_config(_build(SiglipVisionConfig, settings, folder), settings)
    faults = _vision_faults(config, checkpoint)
    image = image_spec(read_image_processor(folder), config.image_size, faults)
    if faults or image is None:
        raise CheckpointError(
            f"the vision model in {folder} does not fit {checkpoint.path}",
            faults=faults,
            hint="pass the folder of the SigLIP model that the checkpoint was trained from",
        )
    return config, image


def adapter_heads(checkpoint: Checkpoint) -> int:
    """Return the adapter's attention heads where no vision folder tells them.

    Raises:
        CheckpointError: a tower of another width than the official ones.
    """
    width = checkpoint.sizes.feature_dim
    if width not in HEADS_OF_KNOWN_TOWERS:
        raise CheckpointError(
            f"the tensors of {checkpoint.path} do not tell the adapter's attention heads: got "
            f"feature width {width}, expected one of {sorted(HEADS_OF_KNOWN_TOWERS)}",
            hint="pass --vision-model DIR, the SigLIP folder of the checkpoint",
        )
    return HEADS_OF_KNOWN_TOWERS[width]


def _without_type(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what is not a size: the class's own constants and the writer's version."""
    dropped = ("model_type", "transformers_version", "architectures", "torch_dtype", "dtype")
    return {name: value for name, value in values.items() if name not in dropped}


def _build(kind: Any, values: Mapping[str, Any], folder: Path) -> Any:
    """Make transformers' configuration of `values`: it knows every default."""
    try:
        return kind(**_without_type(values))
    except Exception as error:  # transformers' own validation raises several kinds
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {error}") from error


def _vision_config(read: Any, settings: Mapping[str, Any]) -> VisionConfig:
    return VisionConfig(
        hidden=read.hidden_size,
        num_layers=read.num_hidden_layers,
        num_heads=read.num_attention_heads,
        intermediate=read.intermediate_size,
        image_size=read.image_size,
        patch_size=read.patch_size,
        layer_norm_eps=float(read.layer_norm_eps),
        activation=read.hidden_act,
        settings=settings,
    )


def _vision_faults(config: VisionConfig, checkpoint: Checkpoint) -> list[str]:
    told = vision_sizes(checkpoint.vision)
    faults = list(tensor_faults(VISION, checkpoint.vision, vision_shapes(told)))
    said = {
        "hidden_size": config.hidden,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.intermediate,
        "patch_size": config.patch_size,
        "num_features": config.num_features,
    }
    faults += _differences(said, told)
    width = checkpoint.sizes.feature_dim
    if told["hidden_size"] not in (None, width):
        faults.append(f"the adapter takes {width} numbers, the tower gives {told['hidden_size']}")
    faults += _head_faults("vision num_attention_heads", config.num_heads, config.hidden)
    faults += _activation_faults(config.activation)
    return faults


def _differences(said: Mapping[str, int], told: Mapping[str, int | None]) -> list[str]:
    return [
        f"{name}: the folder says {said[name]}, the checkpoint's tensors {told[name]}"
        for name in said
        if told[name] not in (None, said[name])
    ]


def _head_faults(name: str, num_heads: int, width: int) -> list[str]:
    if num_heads < 1 or width % num_heads:
        return [f"{name}: {num_heads} heads do not divide the width {width}"]
    return []


def _activation_faults(name: str) -> list[str]:
    if name in ACTIVATIONS:
        return []
    return [f"hidden_act: got {name!r}, expected one of {', '.join(ACTIVATIONS)}"]


def _vocabulary_faults(tokenizer: Tokenizer, rows: int) -> list[str]:
    """Check the tokenizer against the embedding rows; `<image>` has the last row."""
    words = int(tokenizer.get_vocab_size(with_added_tokens=True))
    expected = words if tokenizer.token_to_id(IMAGE_TOKEN) is not None else words + 1
    if rows == expected:
        return []
    return [
        f"vocabulary: the tokenizer has {words} tokens, so {expected} embedding rows with "
        f"{IMAGE_TOKEN} were expected; the checkpoint has {rows}"
    ]


def read_tokenizer(folder: Path) -> Tokenizer:
    """Return the wordpiece tokenizer of a Hugging Face folder, with no truncation or padding set.

    transformers reads it, as it did in training: `tokenizer.json` or `vocab.txt`, and what
    `tokenizer_config.json` changes of them (lower case, accents, added tokens).

    Raises:
        CheckpointError: the folder holds no tokenizer that can be saved as `tokenizer.json`.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, BertConfig

    try:
        read = AutoTokenizer.from_pretrained(
            str(folder),
            config=BertConfig(),  # the class, where neither file tells it
            local_files_only=True,
            trust_remote_code=False,
        )
        tokenizer = Tokenizer.from_str(read.backend_tokenizer.to_str())
    except Exception as error:  # transformers and `tokenizers` raise all kinds on a bad file
        cause = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(
            f"cannot read the tokenizer in {folder}: {cause}",
            hint="pass --language-model the Hugging Face folder of the language model",
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
