"""The family *VQA*: models that choose an answer among those that they know (ViLT, VisualBERT, LXMERT).

Those that write their answers (BLIP, BLIP-2, InstructBLIP, GIT) are in mmcli.models.captioner. What runs on the
device is in mmcli.models.vqa_runner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from mmcli.core.errors import ConfigError, RowError
from mmcli.core.records import DecodeOptions, Modality, Payload, Sample
from mmcli.models.checkpoint import Checkpoint
from mmcli.models.facts import available, max_tokens, min_image_size, reject_chat
from mmcli.models.options import Generation, ModelOptions, Task
from mmcli.models.plan import GenerationPlan, Inputs, TextSpec
from mmcli.models.prompts import Prompts

if TYPE_CHECKING:
    import numpy as np

FAMILY = "vqa"
# How far normalised boxes may be outside of the picture: they come from divisions.
_OVER = 0.01


@dataclass(frozen=True, slots=True)
class Regions:
    """Precomputed features of a picture's regions, as the model's `forward` calls them.

    features, boxes  names of its inputs; boxes None: it takes none
    size             where config.json says how many numbers a region's features have
    """

    features: str
    size: str
    boxes: str | None = None


@dataclass(frozen=True, slots=True)
class Classifier:
    """How a model type chooses an answer.

    model_class  the transformers class
    scores       "sigmoid": each answer has a probability of its own; "softmax": together they are 1
    count        where config.json says how many answers there are
    regions      what it sees instead of the picture itself
    """

    model_class: str
    scores: Literal["sigmoid", "softmax"]
    count: str = "num_labels"
    regions: Regions | None = None


# model_type of config.json -> how it is called. Scores follow the loss of the training. ViLT's and LXMERT's is
# binary cross-entropy with soft targets (ViltForQuestionAnswering of transformers; airsplay/lxmert,
# src/tasks/vqa.py), and so the visual-question-answering pipeline of transformers 4 took the sigmoid. VisualBERT's
# is the KL divergence from a softmax (VisualBertForQuestionAnswering of transformers, after the authors' code).
CLASSIFIERS = {
    "lxmert": Classifier(
        "LxmertForQuestionAnswering",
        "sigmoid",
        count="num_qa_labels",
        regions=Regions("visual_feats", "visual_feat_dim", "visual_pos"),
    ),
    "vilt": Classifier("ViltForQuestionAnswering", "sigmoid"),
    "visual_bert": Classifier(
        "VisualBertForQuestionAnswering", "softmax", regions=Regions("visual_embeds", "visual_embedding_dim")
    ),
}


@dataclass(frozen=True, slots=True)
class Answering:
    """What a plan knows beside: the table's row; the names of all answers; which of them are allowed, by index."""

    row: Classifier
    answers: tuple[str, ...]
    allowed: tuple[int, ...]


def find(kind: str, architectures: Sequence[str], task: Task) -> Classifier | None:
    """The row of a model type that chooses answers, if the checkpoint was saved as its class."""
    row = CLASSIFIERS.get(kind) if task == "ask" else None
    return row if row is not None and (not architectures or row.model_class in architectures) else None


def names(task: Task) -> Sequence[str]:
    """The model types that choose answers."""
    return tuple(CLASSIFIERS) if task == "ask" else ()


def seeing_features() -> Sequence[str]:
    """Those model types that see precomputed features instead of pictures."""
    return tuple(kind for kind, row in CLASSIFIERS.items() if row.regions is not None)


# ------------------------------------------------------------------------------------------ the plan


def plan(
    checkpoint: Checkpoint, options: ModelOptions, dtype: str, row: Classifier, generation: Generation
) -> GenerationPlan:
    """What `row` says about this checkpoint. Raises ConfigError."""
    kind = checkpoint.config.model_type
    problems = _problems(checkpoint, options, row, generation)
    if problems:
        raise ConfigError(problems)
    reject_chat(generation, kind)
    answers = _answers(checkpoint, row, generation)
    text = TextSpec(max_tokens(checkpoint, checkpoint.config))
    inputs = Inputs(image=True) if row.regions is None else Inputs(text=text)
    return GenerationPlan(
        checkpoint=checkpoint,
        family=FAMILY,
        processor="mmcli.models.vqa:AnswerProcessor",
        loader="mmcli.models.vqa_runner:load",
        runner="mmcli.models.vqa_runner:AnswerRunner",
        output="scores",
        detail=Answering(row, answers, _allowed(answers, generation.choices)),
        inputs=inputs,
        decode=DecodeOptions(
            modalities=inputs.modalities,
            min_image_size=min_image_size(checkpoint),
            exact_decode=options.exact_decode,
        ),
        dtype=dtype,
        device=options.device,
        attn_implementation=options.attn_implementation,
        compile=False,
        generation=generation,
    )


def _problems(checkpoint: Checkpoint, options: ModelOptions, row: Classifier, generation: Generation) -> list[str]:
    kind, found = checkpoint.config.model_type, []
    if not available(checkpoint, "text"):
        found.append(f"-m {checkpoint.id}: it has no tokenizer; add the files of the one that it was trained with")
    if options.compile:
        found.append(f"--compile is not for a {kind}: its inputs are of many shapes")
    if generation.schema is not None:
        found.append(f"--schema: a {kind} chooses among its own answers and writes no JSON; leave it out")
    if generation.num_beams > 1 or generation.temperature:
        flag = "--num-beams" if generation.num_beams > 1 else "--temperature"
        found.append(f"{flag}: a {kind} chooses an answer, nothing is generated; leave it out")
    if row.regions is None:
        if not available(checkpoint, "image"):
            found.append(f"-m {checkpoint.id}: it has no preprocessor_config.json, which pictures need")
        if generation.features is not None or generation.boxes is not None:
            found.append(f"--features-column, --boxes-column: a {kind} sees pictures; leave them out")
        return found
    if generation.features is None:
        size = getattr(checkpoint.config, row.regions.size)
        found.append(
            f"a {kind} sees no pictures but features that a detector has found in them; give --features-column, "
            f"a column with lists of {size} numbers for each region"
        )
    if row.regions.boxes is not None and generation.boxes is None:
        found.append(f"a {kind} needs --boxes-column, too: four numbers from 0 to 1 for each region")
    if row.regions.boxes is None and generation.boxes is not None:
        found.append(f"--boxes-column: a {kind} takes features alone; leave it out")
    return found


def _answers(checkpoint: Checkpoint, row: Classifier, generation: Generation) -> tuple[str, ...]:
    """The names of the model's answers, in its order. Raises ConfigError when nobody tells them."""
    config = checkpoint.config
    count = int(getattr(config, row.count))
    if generation.answers:
        if len(generation.answers) != count:
            raise ConfigError(
                f"--answers has {len(generation.answers)} names; -m {checkpoint.id} knows {count} answers"
            )
        return generation.answers
    known = getattr(config, "id2label", None) or {}
    found = tuple(str(known.get(index, "")) for index in range(count))
    if "" in found or found == tuple(f"LABEL_{index}" for index in range(count)):
        raise ConfigError(
            f"-m {checkpoint.id}: its config.json does not name its {count} answers (id2label); give --answers "
            "FILE, one a line in the model's order, or a JSON list such as trainval_label2ans.json"
        )
    return found


def _allowed(answers: Sequence[str], choices: Sequence[str]) -> tuple[int, ...]:
    """Indices of the answers that are among the choices; of all without choices. Raises ConfigError."""
    problems = []
    for choice in choices:
        if choice not in answers:
            near = get_close_matches(choice, answers, n=3)
            meant = f"; did you mean {' or '.join(near)}?" if near else ""
            problems.append(f"--choices: {choice!r} is none of the model's {len(answers)} answers{meant}")
    if problems:
        raise ConfigError(problems)
    return tuple(index for index, answer in enumerate(answers) if not choices or answer in choices)


# ------------------------------------------------------------------------------------------ in the workers


class AnswerProcessor:
    """A picture, or features of its regions, and the questions of its row -> model inputs (see RecordProcessor).

    Pictures of different shapes never share a batch: so there is nothing to pad.
    """

    def __init__(self, plan: GenerationPlan) -> None:
        import torch

        from mmcli.models.inputs import open_tokenizer

        torch.set_num_threads(1)
        answering: Answering = plan.detail
        config = plan.checkpoint.config
        self._most = max_tokens(plan.checkpoint, config)
        self._tokenizer = open_tokenizer(plan.checkpoint)
        self._prompts = Prompts(plan.generation)
        if answering.row.regions is None:
            self._see: Callable[..., dict[str, np.ndarray]] = _Pictures(plan.checkpoint)
        else:
            self._see = _Features(answering.row.regions, plan.generation, config)

    def record(self, media: Sequence[tuple[Modality, Payload]], variables: Sequence[Any]) -> tuple[Sample, ...]:
        """One Sample for each question. Raises RowError."""
        questions = self._prompts.render(variables)
        seen = self._see(media, variables)
        return tuple(self._sample(media[0][0], seen, question or "") for question in questions)

    def _sample(self, modality: Modality, seen: dict[str, np.ndarray], question: str) -> Sample:
        import numpy as np

        text = self._tokenizer(question, return_attention_mask=True, return_token_type_ids=True)
        arrays = {name: np.asarray(ids, dtype=np.int64) for name, ids in text.items()}
        tokens = len(arrays["input_ids"])
        if self._most is not None and tokens > self._most:
            raise RowError("too_large", f"the question has {tokens} tokens; the model has room for {self._most}")
        arrays |= seen
        shape = seen["pixel_values"].shape if "pixel_values" in seen else ()
        return Sample(modality, arrays, length=tokens, group=shape)


class _Pictures:
    """What a model sees that takes pictures: `pixel_values`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        from mmcli.models.inputs import ImageProcessor, open_image_processor

        self._images = ImageProcessor(open_image_processor(checkpoint))

    def __call__(
        self, media: Sequence[tuple[Modality, Payload]], variables: Sequence[Any]
    ) -> dict[str, np.ndarray]:
        pixels = media[0][1]
        try:
            return {"pixel_values": self._images.arrays(pixels)["pixel_values"]}
        except (ValueError, RuntimeError, ZeroDivisionError) as error:
            # Its sides become multiples of 32 pixels, the longer 1.67 times the shorter at most: nothing is left of
            # a picture that is 20 times as long.
            height, width = pixels.shape[:2]
            raise RowError("too_large", f"{width} x {height} pixels: too narrow for the model") from error


class _Features:
    """What a model sees that takes precomputed features: those, where they are, and a mask that pads them."""

    def __init__(self, regions: Regions, generation: Generation, config: Any) -> None:
        self._regions, self._variables = regions, generation.variables
        self._features, self._boxes = generation.features, generation.boxes
        self._size = int(getattr(config, regions.size))

    def __call__(
        self, media: Sequence[tuple[Modality, Payload]], variables: Sequence[Any]
    ) -> dict[str, np.ndarray]:
        import numpy as np

        values = dict(zip(self._variables, variables, strict=True))
        features = matrix(self._features, values, self._size)
        found = {self._regions.features: features, "visual_attention_mask": np.ones(len(features), np.int64)}
        if self._regions.boxes is not None:
            boxes = matrix(self._boxes, values, 4)
            if len(boxes) != len(features):
                raise _bad(f"{len(boxes)} boxes in column {self._boxes!r} for {len(features)} regions")
            if boxes.min() < -_OVER or boxes.max() > 1 + _OVER:
                outside = boxes.min() if boxes.min() < -_OVER else boxes.max()
                raise _bad(
                    f"column {self._boxes!r} holds {outside:g}; boxes are in parts of width and height, 0 to 1"
                )
            found[self._regions.boxes] = boxes
        return found


def matrix(column: str | None, values: Mapping[str, Any], size: int) -> np.ndarray:
    """float32 [n, size] of a column's cell; one region may come without its list. Raises RowError `bad_row`."""
    import numpy as np

    cell = values[column or ""]
    if cell is None:
        raise _bad(f"column {column!r} is empty")
    if not isinstance(cell, np.ndarray):
        what = "text" if isinstance(cell, str) else "no numbers" if not isinstance(cell, list) else "uneven lists"
        raise _bad(f"column {column!r} holds {what}; it needs a list of {size} numbers for each region")
    rows = cell[None] if cell.shape == (size,) else cell
    if rows.ndim != 2 or rows.shape[1] != size:
        shape = " x ".join(map(str, cell.shape))
        raise _bad(f"column {column!r} holds {shape} numbers; the model takes n x {size}")
    if not np.isfinite(rows).all():
        raise _bad(f"column {column!r} holds NaN or infinite numbers")
    return rows.astype(np.float32, copy=False)


def _bad(message: str) -> RowError:
    return RowError("bad_row", message, "source")
