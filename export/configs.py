"""The Hugging Face folders beside a checkpoint: configs, tokenizer and image processor, checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle import ImageSpec
from ..errors import CheckpointError
from .checkpoint import MAX_TEXT, VISION, Checkpoint, tensor_faults, vision_shapes, vision_sizes

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import SiglipVisionConfig

# ONNX's operator and its attributes for what a Hugging Face `hidden_act` names.
ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "gelu": ("Gelu", {}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
}
IMAGE_TOKEN = "<image>"
SPECIAL_TOKENS = ("[CLS]", "[SEP]", "[PAD]")
HEADS_OF_KNOWN_TOWERS = {768: 12, 1024: 16}  # ViT-B and ViT-L, the official towers
OFFICIAL_VISION_EPS = 1e-6
OPTION = "--vision-model"
_TRAINED_FROM = "pass the folder of the {} model that the checkpoint was trained from"
PROCESSOR = "processor_config.json"  # transformers 5: every part of a processor, nested
IMAGE_PROCESSOR = "preprocessor_config.json"  # transformers 4, and an image processor alone
TYPES = ("SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil")
# Source: transformers' SiglipImageProcessor. A setting that is absent or null is this.
DEFAULTS: Mapping[str, Any] = {
    "image_processor_type": TYPES[0],
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_center_crop": False,
    "do_pad": False,
    "size": {"height": 224, "width": 224},
    "resample": 3,  # Pillow's bicubic
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
LAST_RESAMPLE = 5  # Pillow's numbers: 0 nearest to 5 Hamming


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
            hint=_TRAINED_FROM.format("language"),
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
            hint=_TRAINED_FROM.format("language"),
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


def read_vision_model(folder: Path, checkpoint: Checkpoint) -> tuple[SiglipVisionConfig, ImageSpec]:
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
            hint=_TRAINED_FROM.format("SigLIP"),
        )
    settings = values.get("vision_config", {}) if kind == "siglip" else values
    config = _build(SiglipVisionConfig, {**settings, "vision_use_head": False}, folder)
    faults = _vision_faults(config, checkpoint)
    image = image_spec(read_image_processor(folder), config.image_size, faults)
    if faults or image is None:
        raise CheckpointError(
            f"the vision model in {folder} does not fit {checkpoint.path}",
            faults=faults,
            hint=_TRAINED_FROM.format("SigLIP"),
        )
    return config, image


def num_features(config: SiglipVisionConfig) -> int:
    """Return N, the features of one image: one a patch."""
    return int(config.image_size // config.patch_size) ** 2


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


def _build(kind: Any, values: Mapping[str, Any], folder: Path) -> Any:
    """Make transformers' configuration of `values`: it knows every default."""
    # No sizes: the class's own constants and the writer's version.
    dropped = ("model_type", "transformers_version", "architectures", "torch_dtype", "dtype")
    try:
        return kind(**{name: value for name, value in values.items() if name not in dropped})
    except Exception as error:  # transformers' own validation raises several kinds
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {error}") from error


def _vision_faults(config: SiglipVisionConfig, checkpoint: Checkpoint) -> list[str]:
    told = vision_sizes(checkpoint.vision)
    faults = list(tensor_faults(VISION, checkpoint.vision, vision_shapes(told)))
    said = {name: getattr(config, name) for name in told if name != "num_features"}
    faults += _differences({**said, "num_features": num_features(config)}, told)
    width = checkpoint.sizes.feature_dim
    if told["hidden_size"] not in (None, width):
        faults.append(f"the adapter takes {width} numbers, the tower gives {told['hidden_size']}")
    heads = config.num_attention_heads
    faults += _head_faults("vision num_attention_heads", heads, config.hidden_size)
    return faults + _activation_faults(config.hidden_act)


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


def read_image_processor(folder: Path) -> dict[str, Any]:
    """Return every setting of the folder's image processor, defaults included.

    Where both files have them, those nested in `processor_config.json` win, as in transformers 5.

    Raises:
        CheckpointError: neither file has them, or one cannot be read.
    """
    values: Any = None
    if (folder / PROCESSOR).exists():
        values = read_settings(folder / PROCESSOR, OPTION).get("image_processor")
    if values is None and (folder / IMAGE_PROCESSOR).exists():
        values = read_settings(folder / IMAGE_PROCESSOR, OPTION)
    if not isinstance(values, Mapping):
        raise CheckpointError(
            f"{folder} has no settings of an image processor: expected {IMAGE_PROCESSOR}, or "
            f"{PROCESSOR} with `image_processor` in it",
            hint=f"pass {OPTION} the SigLIP folder as transformers saves it",
        )
    return {**DEFAULTS, **{name: value for name, value in values.items() if value is not None}}


def image_spec(settings: Mapping[str, Any], image_size: int, faults: list[str]) -> ImageSpec | None:
    """Return the preprocessing that `settings` ask for; what we do not do goes to `faults`.

    Args:
        settings: those of `read_image_processor`.
        image_size: R, the side of the square that the tower takes.
    """
    wrong = list(_step_faults(settings))
    side = settings["size"]
    sides = {side.get("height"), side.get("width")} if isinstance(side, dict) else {side}
    if sides != {image_size}:
        wrong.append(f"size: got {side}, expected {image_size} squared")
    resample = settings["resample"]
    if not _is_number(resample) or resample not in range(LAST_RESAMPLE + 1):
        wrong.append(f"resample: got {resample!r}, expected 0 to {LAST_RESAMPLE}, as in Pillow")
    factor = settings["rescale_factor"] if settings["do_rescale"] else 1.0
    if not _is_number(factor) or not factor > 0:
        wrong.append(f"rescale_factor: got {factor!r}, expected a number above 0")
    mean = _three(settings["image_mean"]) if settings["do_normalize"] else (0.0, 0.0, 0.0)
    std = _three(settings["image_std"]) if settings["do_normalize"] else (1.0, 1.0, 1.0)
    if mean is None:
        wrong.append(f"image_mean: got {settings['image_mean']!r}, expected three numbers")
    if std is None or 0.0 in std:
        wrong.append(f"image_std: got {settings['image_std']!r}, expected three numbers but 0")
    faults += [f"image processor {fault}" for fault in wrong]
    if wrong or mean is None or std is None:
        return None
    return ImageSpec(image_size, int(resample), float(factor), mean, std)


def _step_faults(settings: Mapping[str, Any]) -> list[str]:
    """Name what another kind of processor would do: an image is squashed to the square here."""
    faults = []
    kind = settings["image_processor_type"]
    if kind not in TYPES:
        faults.append(f"image_processor_type: got {kind!r}, expected {TYPES[0]!r}")
    for name, expected in (("do_resize", True), ("do_center_crop", False), ("do_pad", False)):
        if bool(settings[name]) != expected:
            faults.append(f"{name}: got {settings[name]!r}, expected {expected}")
    return faults


def _three(value: Any) -> tuple[float, float, float] | None:
    """Return one number a channel; a single number is all three."""
    numbers = [value] * 3 if _is_number(value) else value
    if not isinstance(numbers, list) or len(numbers) != 3 or not all(map(_is_number, numbers)):
        return None
    return float(numbers[0]), float(numbers[1]), float(numbers[2])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_settings(path: Path, option: str) -> dict[str, Any]:
    """Return the object that a JSON file holds; `option` of the command line named its folder.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error}",
            hint=f"pass {option} a Hugging Face model folder (config.json and its files)",
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} holds {type(values).__name__}, expected an object",
            hint=f"pass {option} a Hugging Face model folder as transformers saves it",
        )
    return values
