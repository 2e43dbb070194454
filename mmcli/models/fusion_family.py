"""The family *fusion*: directories of a MultimodalTransformer, as `mmcli finetune` makes them.

config.json, model.safetensors     of the whole
text/, image/, audio/, video/      config.json of that encoder's checkpoint, and its processor or tokenizer
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mmcli.core.errors import ConfigError
from mmcli.core.records import Classified, Modality
from mmcli.models.checkpoint import Checkpoint
from mmcli.models.classifier import distinct
from mmcli.models.fusion_inputs import (
    MODEL_TYPE,
    FusionProcessor,
    Part,
    all_inputs,
    decode_options,
    encoder_files,
    parts_of,
)
from mmcli.models.options import Classification, ModelOptions, Ranking
from mmcli.models.plan import ClassificationPlan

if TYPE_CHECKING:
    from mmcli.models.fusion import MultimodalTransformer

FAMILY = "fusion"


def find(checkpoint: Checkpoint) -> bool:
    """Whether it is such a directory."""
    return checkpoint.json("config.json").get("model_type") == MODEL_TYPE


def encoders_of(checkpoint: Checkpoint) -> dict[Modality, Checkpoint]:
    """The small files of its encoders, in the order of the model's modalities. Raises ConfigError."""
    modalities = checkpoint.json("config.json").get("modalities") or ()
    found: dict[Modality, Checkpoint] = {}
    for modality in modalities:
        folder = checkpoint.directory / modality
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"-m {checkpoint.id}: it has no {modality}/config.json, which tells how it takes {modality}"
            )
        found[modality] = replace(checkpoint, id=f"{checkpoint.id}/{modality}", directory=folder, folders=())
    if not found:
        raise ConfigError(f"-m {checkpoint.id}: its config.json names no modalities")
    return found


def plan(
    checkpoint: Checkpoint, options: ModelOptions, dtype: str, classification: Classification
) -> ClassificationPlan:
    """How it classifies. Raises ConfigError with every problem."""
    labels = distinct(_labels(checkpoint))
    problems = _problems(checkpoint, labels, classification)
    if problems:
        raise ConfigError(problems)
    encoders = encoders_of(checkpoint)
    folders = (checkpoint.directory, *(one.directory for one in encoders.values()))
    several = checkpoint.json("config.json").get("problem_type") == "multi_label_classification"
    many = several or classification.ranking.threshold is not None
    whole = replace(checkpoint, folders=folders)
    return replace(
        input_plan(whole, parts_of(encoders), options, labels, classification.ranking),
        dtype=dtype,
        activation="sigmoid" if many else "softmax",
    )


def input_plan(
    checkpoint: Checkpoint,
    parts: Sequence[Part],
    options: ModelOptions,
    labels: Sequence[str],
    ranking: Ranking | None = None,
) -> ClassificationPlan:
    """How inputs are decoded, processed and collated; float32. Of a model that is yet to be made, too: then
    `checkpoint` is that of any encoder, which nothing but `describe` and `load` look at.
    """
    return ClassificationPlan(
        checkpoint=checkpoint,
        family=FAMILY,
        loader="mmcli.models.fusion_runner:load",
        detail=tuple(parts),
        inputs=all_inputs(parts),
        decode=decode_options(parts, options),
        dtype="float32",
        device=options.device,
        attn_implementation=options.attn_implementation,
        compile=options.compile,
        labels=tuple(labels),
        ranking=ranking or Ranking(),
        processor="mmcli.models.fusion_family:open_processor",
        runner="mmcli.models.fusion_runner:FusionRunner",
        joiner="mmcli.models.fusion_family:open_joiner",
        missing=True,
    )


def _labels(checkpoint: Checkpoint) -> list[str]:
    """The names of its logits. Raises ConfigError."""
    known = checkpoint.json("config.json").get("id2label")
    if not isinstance(known, dict) or not known:
        raise ConfigError(f"-m {checkpoint.id}: its config.json names no labels (id2label)")
    return [str(known.get(str(index), f"LABEL_{index}")) for index in range(len(known))]


def _problems(checkpoint: Checkpoint, labels: Sequence[str], classification: Classification) -> list[str]:
    """What is asked that is for models without labels of their own."""
    if classification.labels:
        shown = ", ".join(labels[:3]) + (", ..." if len(labels) > 3 else "")
        return [
            f"-m {checkpoint.id}: it has {len(labels)} labels of its own ({shown}) and takes no others; leave "
            "--labels out"
        ]
    given = {"--template": classification.templates is not None, "--question": classification.question is not None}
    return [
        f"{flag} is for models that are given labels; -m {checkpoint.id} has its own; leave it out"
        for flag, is_given in given.items()
        if is_given
    ]


def open_processor(plan: ClassificationPlan) -> FusionProcessor:
    """What runs in the decode workers."""
    return FusionProcessor(cast("tuple[Part, ...]", plan.detail))


def open_joiner(plan: ClassificationPlan) -> Callable[[Sequence[Any]], Classified]:
    """All media of a record are one Sample, whose output is the record's."""
    return _only


def _only(outputs: Sequence[Any]) -> Classified:
    (one,) = outputs
    return cast(Classified, one)


def save_fusion(model: MultimodalTransformer, sources: Mapping[Modality, Checkpoint], folder: Path) -> None:
    """Write a directory that `-m` loads: the model, and how each of its encoders takes inputs.

    sources  the checkpoints that its encoders were made from
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model.save_pretrained(folder)
    copy_encoder_files(sources, folder)


def copy_encoder_files(sources: Mapping[Modality, Checkpoint], folder: Path) -> None:
    """How each encoder takes inputs, in a folder of its own."""
    for modality, checkpoint in sources.items():
        own = folder / modality
        own.mkdir(exist_ok=True)
        for name in encoder_files(checkpoint):
            shutil.copyfile(checkpoint.directory / name, own / name)
