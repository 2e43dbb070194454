"""What a checkpoint's small files say: sizes, limits, and which processors it has."""

from __future__ import annotations

from typing import Any

from mmcli.core.errors import ConfigError
from mmcli.core.records import Modality
from mmcli.models.checkpoint import Checkpoint
from mmcli.models.options import Generation, Task

# What a task's texts are, in messages.
OUTPUTS: dict[Task, str] = {"caption": "captions", "ask": "answers"}
POOLINGS = ("cls", "mean", "max", "pooler")
# Not tokenizer_config.json: with that alone, transformers makes a tokenizer without a vocabulary.
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "spm.model", "sentencepiece.bpe.model",
    "tokenizer.model", "bpe.codes",
)  # fmt: skip
# Their positions begin after the padding index: 514 position embeddings are 512 tokens.
_POSITIONS_AFTER_PADDING = frozenset(
    [
        "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text", "mpnet",
        "longformer", "luke", "esm", "ibert", "xmod", "clap_text_model", "altclip_text_model",
    ]
)  # fmt: skip
# What tokenizers give as their limit when they have none.
_NO_LIMIT = 1_000_000


def setting(config: Any, path: str) -> Any:
    """`vision_config.num_frames` of a config; "" is the config itself, None when it has no such setting."""
    value = config
    for name in filter(None, path.split(".")):
        value = getattr(value, name, None)
    return value


def available(checkpoint: Checkpoint, modality: Modality) -> bool:
    """Whether the checkpoint has what makes model inputs of a modality."""
    if modality == "text":
        return any((checkpoint.directory / name).is_file() for name in TOKENIZER_FILES)
    parts = ("image_processor", "feature_extractor", "video_processor")
    return any(checkpoint.processor_json(part) for part in parts)


def max_tokens(checkpoint: Checkpoint, text_config: Any) -> int | None:
    """How many tokens a text may have: the model's positions or the tokenizer's limit, whichever is less."""
    stated = checkpoint.json("tokenizer_config.json").get("model_max_length")
    if not isinstance(stated, int | float) or not 0 < stated < _NO_LIMIT:
        stated = None
    return min((int(n) for n in (stated, max_positions(text_config)) if n is not None), default=None)


def max_positions(text_config: Any) -> int | None:
    """How many tokens have a position; None where there is no end."""
    positions = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    if text_config.model_type in _POSITIONS_AFTER_PADDING:
        padding = getattr(text_config, "pad_token_id", None)
        positions -= (1 if padding is None else padding) + 1
    return positions


def min_image_size(checkpoint: Checkpoint) -> int | None:
    """The largest side that the image processor resizes to; None where it depends on the picture."""
    settings = checkpoint.processor_json("image_processor") or checkpoint.processor_json("video_processor")
    size = settings.get("size")
    if not settings.get("do_resize", True) or "max_num_patches" in settings:
        return None
    if isinstance(size, int):
        return size
    if isinstance(size, dict) and set(size) <= {"shortest_edge", "height", "width"} and size:
        # crop_pct (ConvNeXt, DeiT-like): resized to size / crop_pct before the crop.
        return int(max(size.values()) / float(settings.get("crop_pct") or 1.0))
    return None


def sampling_rate(checkpoint: Checkpoint) -> int:
    """Hz that the feature extractor expects."""
    from mmcli.models.inputs import open_feature_extractor

    return int(open_feature_extractor(checkpoint).sampling_rate)


def reject_pooling(pooling: str | None, family: str) -> None:
    """Raise ConfigError when a pooling is asked of a family that has its own."""
    if pooling is not None:
        raise ConfigError(f"--pooling {pooling}: a {family} gives one vector by itself; leave --pooling out")


def reject_chat(generation: Generation, kind: str) -> None:
    """Raise ConfigError when what only chat models take is asked of another `kind`."""
    given = {"--system": generation.system is not None, "--examples": bool(generation.examples)}
    for flag in (name for name, value in given.items() if value):
        raise ConfigError(f"{flag} is for chat models; a {kind} takes none")
