"""The objectives *caption* and *vqa*: a model that writes, or chooses, what rows say, given their media."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mmcli.core.records import Sample
from mmcli.models.plan import GenerationPlan
from mmcli.models.runner import Batch
from mmcli.training.classify import copy_processor
from mmcli.training.data import Item, in_pieces
from mmcli.training.objective import Backward

# (what the model writes, what each row's annotators wrote) -> metrics by name
Measure = Callable[[Sequence[str], Sequence[tuple[str, ...]]], dict[str, float]]
GENERATION_FILE = "generation_config.json"


@dataclass(slots=True)
class Sums:
    """Of a part: the loss, a tensor of one number; what was right without anything drawn, of how many."""

    loss: torch.Tensor
    right: float
    count: int


class Form(Protocol):
    """How a family learns: see mmcli.training.write_tokens, mmcli.training.write_answers.

    accuracy  what `Sums.right` is the accuracy of; None: it has none
    settings  what generation_config.json is to say beside what the base's says
    """

    accuracy: str | None

    @property
    def settings(self) -> dict[str, Any]: ...

    def load(
        self, plan: GenerationPlan, device: torch.device, from_config: bool
    ) -> tuple[Any, nn.Module, frozenset[str]]:
        """The plan's Runner, the model that it runs, and the names of its new weights. Raises ModelError."""
        ...

    def targets(self, samples: Sequence[Sample], references: Sequence[tuple[str, ...]]) -> torch.Tensor:
        """What the outputs are compared with, on the host; runs in workers."""
        ...

    def count(self, targets: torch.Tensor) -> int:
        """What the loss is the mean of."""
        ...

    def sums(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], targets: torch.Tensor, smoothing: float
    ) -> Sums:
        """Of inputs and targets on the device."""
        ...

    def text(self, output: Any) -> str:
        """What the command line would give."""
        ...


@dataclass(slots=True)
class Part:
    """Rows whose inputs share a batch: exactly that of inference, prompts and all.

    targets     see Form
    references  what each row's annotators wrote
    auxiliary   int64 [n, columns]: the auxiliary labels
    """

    batch: Batch
    targets: torch.Tensor
    references: list[tuple[str, ...]]
    auxiliary: torch.Tensor


Piece = list[Part]


@dataclass(slots=True)
class Measured:
    """Of a part: see Sums; what the model wrote, and what annotators did."""

    loss: float
    right: float
    count: int
    texts: list[str]
    references: list[tuple[str, ...]]


@dataclass(slots=True)
class Write:
    """See mmcli.training.objective.Objective.

    The loss is that of the next token, summed over all tokens of a batch and divided by their number, whatever the
    pieces; the end token counts, prompts and padding do not. A row's target is a tuple of texts, of which the
    commonest is learned; a model that chooses learns all of them.
    """

    plan: GenerationPlan
    form: Form
    measure: Measure
    label_smoothing: float = 0.0
    from_config: bool = False
    name: str = "caption"
    metric: str = "exact_match"
    joint: bool = False
    _runner: Any = field(default=None, init=False)
    _host: Any = field(default=None, init=False)
    _new: frozenset[str] = field(default=frozenset(), init=False)

    def build(self, device: torch.device) -> nn.Module:
        """The model that writes. Raises ModelError."""
        self._runner, model, self._new = self.form.load(self.plan, device, self.from_config)
        # What workers collate with: they must not touch a GPU.
        self._host = copy.copy(self._runner)
        self._host.device = torch.device("cpu")
        return model

    def new_weights(self) -> frozenset[str]:
        """A head of new answers."""
        return self._new

    def adapted(self, model: nn.Module) -> None:
        """Nothing."""

    def after_step(self, model: nn.Module) -> None:
        """Nothing."""

    def collate(self, items: Sequence[Item], pieces: int) -> list[Piece]:
        """Rows in `pieces` pieces of about equal size, each in as many batches as its shapes need."""
        return [self._piece(part) for part in in_pieces(items, pieces)]

    def _piece(self, items: Sequence[Item]) -> Piece:
        groups: dict[Any, list[Item]] = {}
        for item in items:
            sample = item.samples[0]
            groups.setdefault((sample.modality, sample.group), []).append(item)
        return [self._part(members) for members in groups.values()]

    def _part(self, items: Sequence[Item]) -> Part:
        samples, references = [item.samples[0] for item in items], [item.target for item in items]
        auxiliary = torch.tensor([item.auxiliary for item in items])
        return Part(self._host.collate(samples), self.form.targets(samples, references), references, auxiliary)

    def auxiliary(self, piece: Piece) -> torch.Tensor:
        """The labels of a piece's rows, int64 [n, columns], as the model's encoder gets them."""
        return torch.cat([part.auxiliary for part in piece])

    def count(self, pieces: Sequence[Piece]) -> int:
        """Tokens; rows, of a model that chooses."""
        return sum(self.form.count(part.targets) for piece in pieces for part in piece)

    def step(self, model: nn.Module, pieces: Sequence[Piece], total: float, backward: Backward) -> float:
        """Piece by piece: each one's sum, divided by the tokens of all."""
        losses = []
        for piece in pieces:
            parts = [self._sums(model, part, self.label_smoothing).loss for part in piece]
            loss = torch.stack(parts).sum() / total
            backward(loss)
            losses.append(loss.detach())
        return float(torch.stack(losses).sum())

    def _sums(self, model: nn.Module, part: Part, smoothing: float = 0.0) -> Sums:
        inputs = self._runner.to_device(part.batch)
        return self.form.sums(model, inputs, part.targets.to(self._runner.device), smoothing)

    def predict(self, model: nn.Module, pieces: Sequence[Piece]) -> list[Measured]:
        """What the model writes by itself, and what `sums` says, of each part."""
        found = []
        for part in (part for piece in pieces for part in piece):
            sums = self._sums(model, part)
            texts = [self.form.text(output) for output in self._runner.forward(part.batch)]
            found.append(Measured(float(sums.loss), sums.right, sums.count, texts, part.references))
        return found

    def measured(self, found: Sequence[list[Measured]]) -> dict[str, float]:
        """What `measure` says of the texts; loss, and what `accuracy` names."""
        parts = [part for batch in found for part in batch]
        total = sum(part.count for part in parts)
        texts = [text for part in parts for text in part.texts]
        values = self.measure(texts, [one for part in parts for one in part.references])
        values["loss"] = sum(part.loss for part in parts) / total
        if self.form.accuracy is not None:
            values[self.form.accuracy] = sum(part.right for part in parts) / total
        # The best is the one with the highest value: of what should be low, its negative.
        low = self.metric.removeprefix("neg_")
        return {**values, self.metric: -values[low]} if low != self.metric else values

    def save(self, model: nn.Module, folder: Path) -> None:
        """As save_pretrained does, with the base's processor files beside it, and how it writes."""
        model.save_pretrained(folder)  # type: ignore[operator]
        copy_processor(self.plan.checkpoint, folder)
        # As it was: inference has changed the loaded one (Whisper's thresholds).
        settings = self.plan.checkpoint.json(GENERATION_FILE)
        if settings:
            text = json.dumps({**settings, **self.form.settings}, indent=2, sort_keys=True)
            (folder / GENERATION_FILE).write_text(text + "\n", encoding="utf-8")


def commonest(references: tuple[str, ...]) -> str:
    """The text that most annotators wrote; the first of several."""
    return Counter(references).most_common(1)[0][0]
