"""The family *dual encoder*, of two encoders that `mmcli finetune --encoder ... --objective contrastive` joined.

config.json, model.safetensors     of the whole
text/, image/, audio/, video/      config.json of that encoder's checkpoint, and its processor or tokenizer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mmcli.core.errors import ConfigError
from mmcli.core.records import Modality
from mmcli.models.checkpoint import Checkpoint
from mmcli.models.dual_encoder import FAMILY, JOINED, DualEncoder
from mmcli.models.encoder import ENCODERS
from mmcli.models.facts import reject_pooling
from mmcli.models.fusion_family import copy_encoder_files, encoders_of
from mmcli.models.fusion_inputs import Part, all_inputs, decode_options, part_of, parts_of
from mmcli.models.options import ModelOptions
from mmcli.models.plan import EmbeddingPlan, VideoSpec

MODEL_TYPE = "mmcli_dual_encoder"
Activation = Literal["softmax", "sigmoid"]


def find(checkpoint: Checkpoint) -> bool:
    """Whether it is such a directory."""
    return checkpoint.json("config.json").get("model_type") == MODEL_TYPE


def plan(checkpoint: Checkpoint, options: ModelOptions, dtype: str) -> EmbeddingPlan:
    """How it gives vectors. Raises ConfigError."""
    content = checkpoint.json("config.json")
    encoders = encoders_of(checkpoint)
    folders = (checkpoint.directory, *(one.directory for one in encoders.values()))
    activation: Activation = "sigmoid" if content.get("loss") == "siglip" else "softmax"
    whole, size = replace(checkpoint, folders=folders), int(content.get("projection_dim") or 0)
    return replace(input_plan(whole, parts_of(encoders), options, size, activation), dtype=dtype)


def input_plan(
    checkpoint: Checkpoint, parts: Sequence[Part], options: ModelOptions, size: int, activation: Activation
) -> EmbeddingPlan:
    """How inputs are decoded, processed and collated; float32. Of a model that is yet to be made, too: then
    `checkpoint` is that of either encoder, which nothing but `describe` and `load` look at.
    """
    reject_pooling(options.pooling, FAMILY)
    modalities = tuple(part.modality for part in parts)
    if "image" in modalities and "video" not in modalities:
        parts = [_with_frames(part, options.frames) if part.modality == "image" else part for part in parts]
    inputs = all_inputs(parts)
    frames = next((part.inputs.video for part in parts if part.inputs.video is not None), None)
    inputs = replace(inputs, video=frames)
    return EmbeddingPlan(
        checkpoint=checkpoint,
        family=FAMILY,
        loader="mmcli.models.dual_encoder:load",
        detail=DualEncoder(modalities, activation=activation, model_class=JOINED),
        inputs=inputs,
        embedding_size=size,
        decode=replace(decode_options(parts, options), modalities=inputs.modalities),
        pooling=None,
        normalize=True if options.normalize is None else options.normalize,
        activation=activation if "text" in modalities else None,
        dtype="float32",
        device=options.device,
        attn_implementation=options.attn_implementation,
        compile=options.compile,
        parts=tuple(parts),
    )


def _with_frames(part: Part, frames: int) -> Part:
    """An image encoder takes clips, frame by frame."""
    return replace(part, inputs=replace(part.inputs, video=VideoSpec(frames, native=False)))


def encoder_part(checkpoint: Checkpoint, modality: Modality, options: ModelOptions) -> tuple[Part, str | None]:
    """How an encoder that is to be joined takes its modality, and the pooling that its directory states, if any.

    Of a sentence-transformers directory its transformer, pooled as it says. Raises ConfigError.
    """
    if modality != "text" or not (checkpoint.directory / "modules.json").is_file():
        return part_of(checkpoint, modality), None
    from mmcli.models import sentence

    made = sentence.plan(checkpoint, options, "float32")
    part = part_of(made.checkpoint, modality)
    row = ENCODERS.get(made.checkpoint.config.model_type)
    known = row.poolings if row is not None else ()
    if made.pooling not in known:
        raise ConfigError(
            f"--encoder text={checkpoint.id}: it pools by {made.pooling}; what is joined can be pooled by "
            f"{', '.join(known)}"
        )
    return part, made.pooling


def save_joined(model: Any, parts: Sequence[Part], folder: Path) -> None:
    """Write a directory that `-m` loads: the model, and how each of its encoders takes inputs.

    A VisionTextDualEncoderModel is written as transformers does: with one tokenizer and one image processor.
    """
    from mmcli.models.inputs import open_image_processor, open_tokenizer

    model.save_pretrained(folder)
    if model.config.model_type == MODEL_TYPE:
        copy_encoder_files({part.modality: part.checkpoint for part in parts}, folder)
        return
    of = {part.modality: part.checkpoint for part in parts}
    open_tokenizer(of["text"]).save_pretrained(folder)
    open_image_processor(of["image"]).save_pretrained(folder)
