"""The family *entailment*: labels of one's own for texts, by a model of natural language inference (NLI).

A text is read beside one sentence for each label, "This example is {}.", and the label applies as far as the text
entails the sentence (Yin et al. 2019, "Benchmarking zero-shot text classification"). As the
zero-shot-classification pipeline of transformers does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from mmcli.core.errors import ConfigError, RowError
from mmcli.core.records import Classified, Modality, Payload, Sample
from mmcli.models.checkpoint import Checkpoint
from mmcli.models.classifier import ClassifierHead, head_decode, head_inputs, head_problems
from mmcli.models.classifier import find as find_head
from mmcli.models.options import Classification, ModelOptions
from mmcli.models.plan import ClassificationPlan

FAMILY = "entailment"
TEMPLATES = ("This example is {}.",)


@dataclass(frozen=True, slots=True)
class Pairs:
    """How a checkpoint reads a text beside a hypothesis: which of its logits say that one entails the other."""

    head: ClassifierHead
    contradiction: int
    entailment: int


def find(checkpoint: Checkpoint) -> Pairs | None:
    """Where its labels are; None when it is no model of NLI.

    Entailment is the first label whose name begins with `entail`; contradiction that which begins with `contra`,
    and where none does, the first label, or the last if that is entailment: so transformers' pipeline always does.
    """
    head = find_head(checkpoint)
    if head is None or head.modality != "text":
        return None
    content = checkpoint.json("config.json")
    told = content.get("label2id") or {name: index for index, name in (content.get("id2label") or {}).items()}
    places = {str(name).lower(): int(index) for name, index in told.items()}
    entailment = _beginning(places, "entail")
    if entailment is None or len(places) < 2:
        return None
    contradiction = _beginning(places, "contra")
    if contradiction is None:
        contradiction = max(places.values()) if entailment == 0 else 0
    return Pairs(head, contradiction, entailment)


def _beginning(places: dict[str, int], beginning: str) -> int | None:
    return next((index for name, index in places.items() if name.startswith(beginning)), None)


def plan(
    checkpoint: Checkpoint, options: ModelOptions, dtype: str, row: Pairs, classification: Classification
) -> ClassificationPlan:
    """What `row` says about this checkpoint. Raises ConfigError with every problem.

    A label is each of its texts in each template. Scores are the softmax of the labels' entailment logits; where
    any number of labels applies, or there is only one, of entailment against contradiction of each label alone.
    Logits of several hypotheses of a label are averaged.
    """
    problems = head_problems(checkpoint, row.head)
    if not classification.labels:
        problems.append(f"-m {checkpoint.id}: it compares texts with labels of your choice; give --labels")
    if classification.question is not None:
        problems.append("--question is for chat models; leave it out, or give --template")
    if problems:
        raise ConfigError(problems)
    inputs = head_inputs(checkpoint, row.head)
    alone = classification.ranking.threshold is not None or len(classification.labels) == 1
    made = ClassificationPlan(
        checkpoint=checkpoint,
        family=FAMILY,
        loader="mmcli.models.classifier_runner:load_pairs",
        runner="mmcli.models.classifier_runner:PairRunner",
        processor="mmcli.models.entailment:PairProcessor",
        joiner="mmcli.models.entailment:PairJoiner",
        detail=row,
        inputs=inputs,
        decode=head_decode(checkpoint, options, inputs),
        dtype=dtype,
        device=options.device,
        attn_implementation=options.attn_implementation,
        compile=options.compile,
        labels=classification.names,
        ranking=classification.ranking,
        activation="sigmoid" if alone else "softmax",
        prompts=_hypotheses(classification),
    )
    _check_lengths(made)
    return made


def _hypotheses(classification: Classification) -> tuple[tuple[str, ...], ...]:
    templates = TEMPLATES if classification.templates is None else classification.templates
    return tuple(
        tuple(t.replace("{}", text) for text in one.texts for t in templates) for one in classification.labels
    )


def _check_lengths(made: ClassificationPlan) -> None:
    """Raise ConfigError for hypotheses beside which no token of a text has room."""
    from mmcli.models.inputs import open_tokenizer

    assert made.inputs.text is not None
    room = made.inputs.text.max_length
    hypotheses = [text for of_label in made.prompts for text in of_label]
    if room is None:
        return
    encoded = open_tokenizer(made.checkpoint)([""] * len(hypotheses), hypotheses)
    problems = [
        f"--labels: {hypothesis!r} has {len(ids)} tokens; -m {made.checkpoint.id} reads {room}, a text's among them"
        for hypothesis, ids in zip(hypotheses, encoded["input_ids"], strict=True)
        if len(ids) >= room
    ]
    if problems:
        raise ConfigError(problems)


# ------------------------------------------------------------------------------------------ in the workers


class PairProcessor:
    """A text -> itself beside each hypothesis of each label (see RecordProcessor); long texts are cut."""

    def __init__(self, plan: ClassificationPlan) -> None:
        import torch

        from mmcli.models.inputs import open_tokenizer

        torch.set_num_threads(1)
        spec = plan.inputs.text
        assert spec is not None
        self._tokenizer, self._exact = open_tokenizer(plan.checkpoint), spec.exact
        self._hypotheses = [text for of_label in plan.prompts for text in of_label]
        self._options: dict[str, Any] = {"return_attention_mask": True, "max_length": spec.max_length}
        self._options["truncation"] = False if spec.max_length is None else "only_first"

    def record(self, media: Sequence[tuple[Modality, Payload]], variables: Sequence[Any]) -> tuple[Sample, ...]:
        """One Sample for each hypothesis, in the order of the labels. Raises RowError."""
        if len(media) != 1:
            raise RowError("bad_row", f"{len(media)} texts, of which one is to be classified", "source")
        texts = [media[0][1]] * len(self._hypotheses)
        try:
            encoded = self._tokenizer(texts, self._hypotheses, **self._options)
        except (TypeError, UnicodeError) as error:
            # A lone surrogate, from a manifest that is not UTF-8.
            raise RowError("corrupt", f"the tokenizer does not take this text: {error}") from error
        columns = zip(*encoded.values(), strict=True)
        return tuple(self._sample(dict(zip(encoded, values, strict=True))) for values in columns)

    def _sample(self, inputs: dict[str, list[int]]) -> Sample:
        arrays = {name: np.asarray(values, dtype=np.int64) for name, values in inputs.items()}
        length = len(arrays["input_ids"])
        return Sample("text", arrays, length=length, group=length if self._exact else ())


# ------------------------------------------------------------------------------------------ of a record


class PairJoiner:
    """Logits of contradiction and entailment [2] of all hypotheses of a text -> Classified."""

    def __init__(self, plan: ClassificationPlan) -> None:
        counts = [len(texts) for texts in plan.prompts]
        self._starts = list(accumulate(counts[:-1], initial=0))
        self._counts = np.asarray(counts, dtype=np.float32)[:, None]
        self._plan = plan

    def __call__(self, outputs: Sequence[np.ndarray]) -> Classified:
        """Scores are NaN where any logit is."""
        import torch

        from mmcli.models.scores import classified, rank

        plan = self._plan
        means = np.add.reduceat(np.stack(outputs), self._starts, axis=0) / self._counts
        # The softmax over two logits is the sigmoid of their difference.
        logits = means[:, 1] - means[:, 0] if plan.activation == "sigmoid" else means[:, 1]
        ranked = rank(torch.from_numpy(logits)[None], plan.activation, plan.ranking)
        return classified(ranked, plan.labels, plan.ranking)[0]
