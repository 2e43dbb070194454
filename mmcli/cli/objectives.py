"""What each objective of `mmcli finetune` wants of rows, and makes of the base: one class, one row of a table."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mmcli.cli import parse
from mmcli.cli.contrastive import ContrastiveRecipe
from mmcli.cli.encoders import open_encoders
from mmcli.cli.messages import Messages
from mmcli.cli.options import (
    InputArguments,
    MessageArguments,
    ModelArguments,
    OptimizationArguments,
    TrainingArguments,
    TrainingRunArguments,
)
from mmcli.cli.parse import Problems
from mmcli.cli.probe import ProbeRecipe
from mmcli.cli.support import label_of
from mmcli.cli.writing import MESSAGES, WRITING, split_conversations
from mmcli.core.errors import ConfigError
from mmcli.core.records import Modality, Record

if TYPE_CHECKING:
    from mmcli.models.options import ModelOptions
    from mmcli.training.fusion import FusionNetwork
    from mmcli.training.objective import Objective
    from mmcli.training.options import TrainOptions

_NAMED = 3
# Rows of the largest class for each of the smallest that are worth a word.
_UNEVEN = 10


@dataclass(frozen=True, slots=True)
class Given:
    """The options of a command."""

    inputs: InputArguments
    model: ModelArguments
    training: TrainingArguments
    optimization: OptimizationArguments
    run: TrainingRunArguments
    messages: MessageArguments


@dataclass(slots=True)
class Listed:
    """Rows before anything is opened. `labels`: of each, where the objective has them; `digest`: over all of it."""

    records: list[Record]
    labels: list[str]
    digest: str
    modalities: dict[Modality | None, int]
    slots: tuple[str, ...]


class Recipe(Protocol):
    """How an objective is made.

    labelled  rows have labels
    metrics   those that the best may be chosen by, the usual one first
    """

    @property
    def labelled(self) -> bool: ...

    @property
    def metrics(self) -> tuple[str, ...]: ...

    def columns(self, training: TrainingArguments) -> dict[str, str]:
        """The columns of manifests that rows are learned from, beside media, with the flag that names each."""
        ...

    def check(self, train: Listed, val: Listed | None, messages: Messages, problems: Problems) -> None:
        """Add what is wrong with the rows."""
        ...

    def make(
        self, given: Given, model: ModelOptions, train: Listed, options: TrainOptions, metric: str
    ) -> Objective:
        """The objective. Raises ConfigError, TryAgain."""
        ...

    def targets(self, listed: Listed, objective: Objective) -> list[Any]:
        """What rows have to be."""
        ...


class ClassifyRecipe:
    """Of *classify*."""

    labelled = True
    metrics: tuple[str, ...] = ("accuracy", "mean_per_class")

    def columns(self, training: TrainingArguments) -> dict[str, str]:
        """The label's."""
        return {training.label_column: "--label-column"}

    def check(self, train: Listed, val: Listed | None, messages: Messages, problems: Problems) -> None:
        """Two labels at least, and none that only validation rows have."""
        check_classes(train, val, messages, problems)

    def make(
        self, given: Given, model: ModelOptions, train: Listed, options: TrainOptions, metric: str
    ) -> Objective:
        """The base with a head for the labels of the training rows."""
        from mmcli.models.checkpoint import open_checkpoint
        from mmcli.models.device import check_device
        from mmcli.training.classify import Classify, EncoderNetwork, classification_plan

        check_device(model.device)
        names, random = sorted(set(train.labels)), given.training.from_config
        if given.training.encoder:
            network = replace(_fusion(given, model, train, names), unimodal_heads=options.unimodal_loss > 0)
            return Classify(network, options.label_smoothing, options.unimodal_loss, metric=metric)
        if len(train.slots) > 1:
            raise ConfigError(
                f"INPUT: rows have {' and '.join(train.slots)}; to learn from both, join encoders: "
                f"--encoder {train.slots[0]}=MODEL --encoder {train.slots[1]}=MODEL instead of -m"
            )
        wanted = given.training.modality or _modality(train)
        plan = classification_plan(open_checkpoint(model), model, names, wanted)  # type: ignore[arg-type]
        return Classify(EncoderNetwork(plan, random), options.label_smoothing, metric=metric)

    def targets(self, listed: Listed, objective: Any) -> list[Any]:
        """Indices of labels."""
        index = {label: number for number, label in enumerate(objective.plan.labels)}
        return [index[label] for label in listed.labels]


def _fusion(given: Given, model: ModelOptions, train: Listed, names: Sequence[str]) -> FusionNetwork:
    """Of --encoder. Raises ConfigError with every problem."""
    from mmcli.training.fusion import FusionNetwork

    problems = Problems()
    sizes = {
        "hidden_size": problems.collect(parse.number, "--hidden-size", given.training.hidden_size, 1),
        "num_hidden_layers": problems.collect(parse.number, "--fusion-layers", given.training.fusion_layers, 1),
        "num_attention_heads": problems.collect(parse.number, "--fusion-heads", given.training.fusion_heads, 1),
    }
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if width and heads and width % heads:
        problems.add(f"--hidden-size {width} is not a multiple of --fusion-heads {heads}")
    slots = train.slots if train.slots != ("",) else (_modality(train) or "",)
    encoders = open_encoders(given.training.encoder or (), model, slots, problems)
    problems.check()
    settings = {**sizes, "intermediate_size": 4 * (width or 1)}
    return FusionNetwork.of(encoders, model, names, given.training.from_config, settings)


RECIPES: dict[str, Recipe] = {
    "classify": ClassifyRecipe(),
    "contrastive": ContrastiveRecipe(),
    "probe": ProbeRecipe(),
    **WRITING,
}


# ---------------------------------------------------------------------------------------------- rows


def list_rows(given: Given, inputs: tuple[str, ...], what: str, recipe: Recipe) -> Listed:
    """The rows of some inputs, with what the recipe wants of each. Raises ConfigError."""
    from mmcli.sources.open import SourceOptions, open_source

    if not inputs:
        hint = "a folder with a folder for each label, or a manifest" if recipe.labelled else "a manifest"
        raise ConfigError(f"no {what} given; {hint}")
    asked = given.inputs
    folders = [name for name in inputs if os.path.isdir(name)]
    manifests = len(folders) < len(inputs)
    if folders and manifests:
        raise ConfigError(f"{what}: give folders or manifests, not both")
    columns = recipe.columns(given.training) if manifests else {}
    conversations = [column for column, flag in columns.items() if flag == MESSAGES]
    options = SourceOptions(
        inputs=inputs,
        glob=tuple(asked.glob or ()),
        image_column=asked.image_column,
        audio_column=asked.audio_column,
        video_column=asked.video_column,
        text_column=asked.text_column,
        path_column=asked.path_column,
        id_column=asked.id_column,
        variables=tuple(columns),
        variables_said=tuple(f"{flag} {column}" for column, flag in columns.items()),
        hidden=asked.hidden,
        follow_symlinks=asked.follow_symlinks,
        input_format=asked.input_format,
        bare=bool(conversations),
        # The two sides of a contrastive row are needed both.
        missing=bool(given.training.encoder) and given.training.objective == "classify",
    )
    source = open_source(options)
    with tempfile.TemporaryDirectory(prefix="mmcli-") as folder:
        snapshot = source.snapshot(Path(folder))
        records = list(source.records())
    if not records:
        raise ConfigError(f"{what}: there are no rows in {' '.join(inputs)}")
    if conversations:
        split_conversations(records, conversations[0], what)
    kind, column = "manifest" if manifests else "folder", given.training.label_column
    labels = _labels_of(records, kind, column, what) if recipe.labelled else []
    return Listed(records, labels, snapshot.digest, dict(snapshot.modalities), source.slots)


def _labels_of(records: Sequence[Record], kind: str, column: str, what: str) -> list[str]:
    labels = [label_of(record, kind) for record in records]
    bad = [record.id for record, label in zip(records, labels, strict=True) if label is None]
    if bad:
        why = f"have no {column!r}" if kind == "manifest" else "lie in no label's folder"
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise ConfigError(f"{what}: {', '.join(bad[:_NAMED])}{more} {why}")
    return [str(label) for label in labels]


def check_classes(train: Listed, val: Listed | None, messages: Messages, problems: Problems) -> None:
    """Add problems: of one class, and of labels that only validation rows have."""
    counts = Counter(train.labels)
    if len(counts) < 2:
        problems.add(f"INPUT: all rows have the label {train.labels[0]!r}; two are needed to tell them apart")
    if val is not None and (unknown := sorted(set(val.labels) - set(counts))):
        more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
        shown = ", ".join(map(repr, unknown[:_NAMED]))
        problems.add(f"--val: no training row has the label {shown}{more}; nothing can be learned about it")
    (most, largest), (least, smallest) = counts.most_common()[0], counts.most_common()[-1]
    if smallest * _UNEVEN < largest:
        messages.note(
            f"{most!r} has {largest} training rows, {least!r} {smallest}: --balance draws them equally often"
        )
    if alone := [name for name, count in counts.items() if count == 1]:
        messages.note(f"{len(alone)} labels have one training row: {', '.join(alone[:_NAMED])}")


def _modality(listed: Listed) -> Modality | None:
    """That of all rows, by their names or columns; None when it cannot be told."""
    there = {modality for modality, count in listed.modalities.items() if count}
    return next(iter(there)) if len(there) == 1 else None
