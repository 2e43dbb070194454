"""The family *classifier*: checkpoints with a classification head, whose labels are their own.

Pictures, sounds, clips and texts, as transformers' AutoModelForImageClassification and its siblings load them. What
runs on the device is in mmcli.models.classifier_runner.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmcli.core.errors import ConfigError
from mmcli.core.records import DecodeOptions, Modality
from mmcli.models.checkpoint import Checkpoint
from mmcli.models.encoder import audio_spec
from mmcli.models.facts import available, max_tokens, min_image_size
from mmcli.models.options import Classification, ModelOptions
from mmcli.models.plan import ClassificationPlan, Inputs, TextSpec, VideoSpec

FAMILY = "classifier"
# transformers' class that loads a checkpoint, the table of the classes that it knows, and what those take.
AUTO: tuple[tuple[str, str, Modality], ...] = (
    ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "image"),
    ("AutoModelForAudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", "audio"),
    ("AutoModelForVideoClassification", "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES", "video"),
    ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "text"),
)
# Model types for which what stands behind the end of an input counts, although it is masked: convolutions and
# windows over tokens, hashes and landmarks of the whole sequence, no mask, or a head that takes the last place.
# Measured on random weights, four texts of 6 to 24 tokens as one batch: scores are off by 0.2 to 2.
_EXACT = frozenset(
    [
        "big_bird", "bigbird_pegasus", "canine", "convbert", "fnet", "funnel", "mobilebert", "mra", "nystromformer",
        "perceiver", "reformer", "xlnet", "yoso",
        "data2vec-audio", "sew", "sew-d", "wav2vec2-conformer",
    ]
)  # fmt: skip
# Model types that take more than a text, and what.
MORE_INPUTS = {
    "layoutlm": "boxes of words on a page",
    "layoutlmv2": "boxes of words on a page",
    "layoutlmv3": "boxes of words on a page",
    "lilt": "boxes of words on a page",
    "markuplm": "paths of a web page's nodes",
    "shieldgemma2": "a policy for each picture",
    "tapas": "tables",
}


@dataclass(frozen=True, slots=True)
class ClassifierHead:
    """How a checkpoint with a head is loaded.

    modality      what it takes
    auto_class    transformers' class that loads it
    architecture  what that makes of it; None: code that comes with the checkpoint
    """

    modality: Modality
    auto_class: str
    architecture: str | None


def find(checkpoint: Checkpoint) -> ClassifierHead | None:
    """How its head is loaded, by config.json's `architectures`; None when it has no classification head."""
    from transformers.models.auto import modeling_auto

    content = checkpoint.json("config.json")
    kind, architectures = content.get("model_type"), content.get("architectures") or ()
    for auto_class, table, modality in AUTO:
        known = getattr(modeling_auto, table).get(kind, ())
        for architecture in architectures:
            if architecture in ((known,) if isinstance(known, str) else known):
                return ClassifierHead(modality, auto_class, architecture)
    own_code = content.get("auto_map")
    for auto_class, _, modality in AUTO:
        if isinstance(own_code, dict) and auto_class in own_code:
            return ClassifierHead(modality, auto_class, None)
    return None


def plan(
    checkpoint: Checkpoint, options: ModelOptions, dtype: str, row: ClassifierHead, classification: Classification
) -> ClassificationPlan:
    """What `row` says about this checkpoint. Raises ConfigError with every problem.

    Scores are the softmax of the logits; their sigmoid where the checkpoint was trained with several labels at once
    (config.problem_type) or where any number of labels is asked for.
    """
    problems = head_problems(checkpoint, row)
    problems += _asked_problems(checkpoint, classification)
    multi_label = checkpoint.config.problem_type == "multi_label_classification"
    if checkpoint.config.num_labels < 2 and not multi_label:
        problems.append(f"-m {checkpoint.id}: it gives one number, not scores of labels (num_labels is 1)")
    if problems:
        raise ConfigError(problems)
    asked_many = classification.ranking.threshold is not None
    inputs = head_inputs(checkpoint, row)
    return ClassificationPlan(
        checkpoint=checkpoint,
        family=FAMILY,
        loader="mmcli.models.classifier_runner:load",
        detail=row,
        inputs=inputs,
        decode=head_decode(checkpoint, options, inputs),
        dtype=dtype,
        device=options.device,
        attn_implementation=options.attn_implementation,
        compile=options.compile,
        labels=distinct(label_names(checkpoint)),
        ranking=classification.ranking,
        activation="sigmoid" if multi_label or asked_many else "softmax",
    )


def head_problems(checkpoint: Checkpoint, row: ClassifierHead) -> list[str]:
    """Why a checkpoint's head cannot be used, whatever is asked of it."""
    found = []
    if row.architecture is None and not checkpoint.trust_remote_code:
        kind = checkpoint.json("config.json").get("model_type")
        raise ConfigError(
            f"-m {checkpoint.id}: {kind!r} is code that comes with the checkpoint",
            hint="add --trust-remote-code when you trust its author",
        )
    kind = checkpoint.config.model_type
    if kind in MORE_INPUTS:
        found.append(f"-m {checkpoint.id}: a {kind} needs {MORE_INPUTS[kind]}, which mmcli does not give it")
    if checkpoint.config.problem_type == "regression":
        found.append(f"-m {checkpoint.id}: it gives numbers, not scores of labels (problem_type is 'regression')")
    if not available(checkpoint, row.modality):
        what = "tokenizer" if row.modality == "text" else "preprocessor_config.json"
        found.append(f"-m {checkpoint.id}: it has no {what}, so nothing tells how it takes {row.modality}")
    return found


def _asked_problems(checkpoint: Checkpoint, classification: Classification) -> list[str]:
    """What is asked that is only for models without labels of their own."""
    if classification.labels:
        names = label_names(checkpoint)
        shown = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
        return [
            f"-m {checkpoint.id}: it has {len(names)} labels of its own ({shown}) and takes no others; leave "
            "--labels out, or give a model that compares inputs with texts (CLIP, SigLIP, CLAP; for texts one "
            "that was trained on natural language inference)"
        ]
    given = {"--template": classification.templates is not None, "--question": classification.question is not None}
    return [
        f"{flag} is for models that are given labels; -m {checkpoint.id} has its own; leave it out"
        for flag, is_given in given.items()
        if is_given
    ]


def label_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The names of the logits, in their order, as config.json has them; `LABEL_3` where it has none."""
    config = checkpoint.config
    known = config.id2label
    return tuple(str(known.get(index, f"LABEL_{index}")) for index in range(config.num_labels))


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Equal names get their index behind them: ImageNet has two cranes, `crane (134)` and `crane (517)`.

    Again where a name is equal to one that was made so: names with their own index are never equal, so it ends.
    """
    made = list(names)
    while len(set(made)) < len(made):
        counts = Counter(made)
        made = [f"{name} ({index})" if counts[name] > 1 else name for index, name in enumerate(made)]
    return tuple(made)


def head_inputs(checkpoint: Checkpoint, row: ClassifierHead) -> Inputs:
    """What a checkpoint with a head takes."""
    config = checkpoint.config
    # Of code that comes with a checkpoint nobody knows whether it heeds masks.
    exact = row.architecture is None or config.model_type in _EXACT
    match row.modality:
        case "text":
            return Inputs(text=TextSpec(max_tokens(checkpoint, config.get_text_config()), exact=exact))
        case "image":
            return Inputs(image=True)
        case "audio":
            return Inputs(audio=audio_spec(checkpoint, exact))
        case "video":
            return Inputs(video=VideoSpec(_num_frames(checkpoint, config), native=True))


def _num_frames(checkpoint: Checkpoint, config: Any) -> int:
    for name in ("num_frames", "frames_per_clip"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    raise ConfigError(f"-m {checkpoint.id}: its config.json does not say how many frames it takes (num_frames)")


def head_decode(checkpoint: Checkpoint, options: ModelOptions, inputs: Inputs) -> DecodeOptions:
    """What the inputs of a checkpoint with a head need from the decoder."""
    return DecodeOptions(
        modalities=inputs.modalities,
        min_image_size=min_image_size(checkpoint),
        exact_decode=options.exact_decode,
        sampling_rate=inputs.audio.sampling_rate if inputs.audio else None,
        num_frames=inputs.video.num_frames if inputs.video else options.frames,
    )
