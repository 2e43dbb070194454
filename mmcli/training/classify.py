"""The objective *classify*: a network with a head for labels; here, of one encoder with its own pooling."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mmcli.core.errors import ConfigError, MmcliError, ModelError, one_line
from mmcli.core.records import Modality, Sample
from mmcli.models.checkpoint import PROCESSOR_FILES, Checkpoint
from mmcli.models.classifier import AUTO, ClassifierHead, head_decode, head_inputs
from mmcli.models.classifier_runner import head_tower
from mmcli.models.options import ModelOptions, Ranking
from mmcli.models.plan import ClassificationPlan
from mmcli.models.runner import Batch, Collator
from mmcli.training.data import Item, in_pieces
from mmcli.training.objective import Backward


@dataclass(slots=True)
class Part:
    """Inputs that share a batch. targets: int64 [n]; rows: int64 [n], which rows of the set they are."""

    batch: Batch
    targets: torch.Tensor
    rows: torch.Tensor


Piece = list[Part]


def classification_plan(
    checkpoint: Checkpoint, options: ModelOptions, labels: Sequence[str], wanted: Modality | None
) -> ClassificationPlan:
    """How a base takes inputs once it has a head for these labels.

    wanted  the modality of the rows; None: the base's only one
    Raises ConfigError for a base that transformers gives no classification head.
    """
    from transformers.models.auto import modeling_auto

    kind = checkpoint.json("config.json").get("model_type")
    heads: dict[Modality, ClassifierHead] = {}
    for auto_class, table, modality in AUTO:
        known = getattr(modeling_auto, table).get(kind)
        if known:
            heads[modality] = ClassifierHead(modality, auto_class, known if isinstance(known, str) else known[0])
    if not heads:
        raise ConfigError(f"-m {checkpoint.id}: transformers has no classification head for model type {kind!r}")
    if wanted is None and len(heads) > 1:
        raise ConfigError(f"-m {checkpoint.id}: it can learn {' or '.join(heads)}; name the column of one of them")
    head = heads.get(wanted) if wanted is not None else next(iter(heads.values()))
    if head is None:
        raise ConfigError(f"-m {checkpoint.id}: a {kind} learns {', '.join(heads)}; the rows are {wanted}")
    inputs = head_inputs(checkpoint, head)
    return ClassificationPlan(
        checkpoint=checkpoint,
        family="classifier",
        loader="mmcli.models.classifier_runner:load",
        detail=head,
        inputs=inputs,
        decode=head_decode(checkpoint, options, inputs),
        dtype="float32",
        device=options.device,
        attn_implementation=options.attn_implementation,
        compile=False,
        labels=tuple(labels),
        ranking=Ranking(),
    )


@dataclass(slots=True)
class Outputs:
    """What a network gives for n rows.

    logits  [n, L]
    alone   by modality: the logits of a head that sees it alone [n, L], and which rows have it, bool [n]
    """

    logits: torch.Tensor
    alone: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def to_host(self) -> Outputs:
        """The same, float32."""
        alone = {name: (logits.float().cpu(), there.cpu()) for name, (logits, there) in self.alone.items()}
        return Outputs(self.logits.float().cpu(), alone)


class Network(Protocol):
    """What has a head for labels: see EncoderNetwork and mmcli.training.fusion.FusionNetwork."""

    @property
    def plan(self) -> ClassificationPlan: ...

    def build(self, device: torch.device) -> tuple[nn.Module, frozenset[str]]:
        """The model, on a device, and the names of its new weights. Raises ModelError."""
        ...

    def collator(self, device: torch.device) -> Collator:
        """What makes its batches."""
        ...

    def group(self, sample: Sample) -> Any:
        """Equal for samples that may share a batch."""
        ...

    def outputs(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> Outputs:
        """Of model inputs."""
        ...

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write what `mmcli classify -m folder` loads."""
        ...


@dataclass(frozen=True, slots=True)
class EncoderNetwork:
    """An encoder with its own pooling, and a new head on it, as transformers' Auto classes make them.

    plan         how the base takes inputs
    from_config  with random weights
    """

    plan: ClassificationPlan
    from_config: bool = False

    def build(self, device: torch.device) -> tuple[nn.Module, frozenset[str]]:
        """See Network."""
        import transformers
        from transformers.utils.logging import disable_progress_bar, set_verbosity_error

        disable_progress_bar()
        # It warns of the head that is new, as is the point.
        set_verbosity_error()
        plan, head, new = self.plan, self.plan.detail, frozenset[str]()
        names = dict(enumerate(plan.labels))
        options = {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {name: index for index, name in names.items()},
            "problem_type": "single_label_classification",
        }
        auto = getattr(transformers, head.auto_class)
        try:
            if self.from_config:
                config = transformers.AutoConfig.from_pretrained(plan.checkpoint.directory, **options)
                model = auto.from_config(config, attn_implementation=plan.attn_implementation)
            else:
                model, info = plan.checkpoint.load(
                    auto,
                    **options,
                    ignore_mismatched_sizes=True,
                    dtype=torch.float32,
                    attn_implementation=plan.attn_implementation,
                )
                mismatched = (key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
                new = frozenset([*info["missing_keys"], *mismatched])
        except MmcliError:
            raise
        except Exception as error:
            raise ModelError(f"-m {plan.checkpoint.id}: cannot load it: {one_line(str(error))}") from error
        return model.to(device), new

    def collator(self, device: torch.device) -> Collator:
        """See Network."""
        return Collator(self.plan, device)

    def group(self, sample: Sample) -> Any:
        """See Network."""
        return sample.modality, sample.group

    def outputs(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> Outputs:
        """See Network."""
        return Outputs(head_tower(model, self.plan.detail.modality)(inputs).flatten(1))

    def save(self, model: nn.Module, folder: Path) -> None:
        """As save_pretrained does, with the base's processor files beside it."""
        model.save_pretrained(folder)  # type: ignore[operator]
        copy_processor(self.plan.checkpoint, folder)


@dataclass(slots=True)
class Classify:
    """See mmcli.training.objective.Objective. Loss: the mean over rows of the cross-entropy.

    unimodal_loss  a row's loss is that of its logits, and so many times that of each modality's head on it, of the
                   modalities that it has: so each encoder learns as if it were alone, where otherwise the one that
                   is learned first leaves the others nothing to explain (Wang, Tran & Feiszli 2020, "What makes
                   training multi-modal classification networks hard?"; here all weights are one). The sum is
                   divided by the rows of the batch, as the loss itself is
    """

    network: Network
    label_smoothing: float = 0.0
    unimodal_loss: float = 0.0
    name: str = "classify"
    metric: str = "accuracy"
    joint: bool = False
    _new: frozenset[str] = field(default=frozenset(), init=False)
    _host: Collator | None = field(default=None, init=False)
    _device: Collator | None = field(default=None, init=False)

    @property
    def plan(self) -> ClassificationPlan:
        """The network's."""
        return self.network.plan

    def build(self, device: torch.device) -> nn.Module:
        """The network with a head for the labels. Raises ModelError."""
        model, self._new = self.network.build(device)
        self._device = self.network.collator(device)
        return model

    def new_weights(self) -> frozenset[str]:
        """The head's."""
        return self._new

    def adapted(self, model: nn.Module) -> None:
        """Nothing: the head is new."""

    def after_step(self, model: nn.Module) -> None:
        """Nothing."""

    def collate(self, items: Sequence[Item], pieces: int) -> list[Piece]:
        """Rows in `pieces` pieces of about equal size, each in as many batches as its shapes need."""
        return [self._piece(part) for part in in_pieces(items, pieces)]

    def _piece(self, items: Sequence[Item]) -> Piece:
        if self._host is None:
            self._host = self.network.collator(torch.device("cpu"))
        groups: dict[Any, list[Item]] = {}
        for item in items:
            groups.setdefault(self.network.group(item.samples[0]), []).append(item)
        return [
            Part(
                self._host.collate([item.samples[0] for item in members]),
                torch.tensor([item.target for item in members]),
                torch.tensor([item.row for item in members]),
            )
            for members in groups.values()
        ]

    def count(self, pieces: Sequence[Piece]) -> int:
        """Rows."""
        return sum(len(part.targets) for piece in pieces for part in piece)

    def step(self, model: nn.Module, pieces: Sequence[Piece], total: float, backward: Backward) -> float:
        """Piece by piece: each one's sum, divided by the rows of all."""
        losses = []
        for piece in pieces:
            loss = torch.stack([self._loss(model, part) for part in piece]).sum() / total
            backward(loss)
            losses.append(loss.detach())
        return float(torch.stack(losses).sum())

    def logits(self, model: nn.Module, part: Part) -> torch.Tensor:
        """float32 [n, L], on the device."""
        return self._outputs(model, part).logits.float()

    def _outputs(self, model: nn.Module, part: Part) -> Outputs:
        assert self._device is not None
        return self.network.outputs(model, self._device.to_device(part.batch))

    def _loss(self, model: nn.Module, part: Part) -> torch.Tensor:
        found = self._outputs(model, part)
        targets = part.targets.to(found.logits.device)
        loss = self._cross_entropy(found.logits, targets).sum()
        for logits, there in found.alone.values():
            # All rows are computed, so that each head has a gradient in every piece.
            each = self._cross_entropy(logits, targets) * there.to(logits.device)
            loss = loss + self.unimodal_loss * each.sum()
        return loss

    def _cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """[n]"""
        smoothing = self.label_smoothing
        return nn.functional.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=smoothing)

    def predict(self, model: nn.Module, pieces: Sequence[Piece]) -> list[tuple[Outputs, torch.Tensor]]:
        """What each part gives, on the host, and its targets."""
        found = [(self._outputs(model, part), part.targets) for piece in pieces for part in piece]
        return [(one.to_host(), targets) for one, targets in found]

    def measured(self, found: Sequence[list[tuple[Outputs, torch.Tensor]]]) -> dict[str, float]:
        """accuracy, mean_per_class (of classes that come) and loss.

        Also accuracy_image and so on, of each modality's head over the rows that have it.
        """
        losses, right, classes = 0.0, [], []
        alone: dict[str, list[torch.Tensor]] = {}
        for outputs, targets in (part for batch in found for part in batch):
            losses += float(nn.functional.cross_entropy(outputs.logits, targets, reduction="sum"))
            right.append(outputs.logits.argmax(dim=-1) == targets)
            classes.append(targets)
            for name, (logits, there) in outputs.alone.items():
                alone.setdefault(name, []).append((logits.argmax(dim=-1) == targets)[there])
        correct, truth = torch.cat(right).float(), torch.cat(classes)
        per_class = [float(correct[truth == one].mean()) for one in sorted(set(truth.tolist()))]
        heads = {name: torch.cat(rows).float() for name, rows in alone.items()}
        return {
            "accuracy": float(correct.mean()),
            "mean_per_class": sum(per_class) / len(per_class),
            "loss": losses / len(truth),
            **{f"accuracy_{name}": float(rows.mean()) for name, rows in heads.items() if len(rows)},
        }

    def save(self, model: nn.Module, folder: Path) -> None:
        """What `mmcli classify` loads."""
        self.network.save(model, folder)


def copy_processor(checkpoint: Checkpoint, folder: Path) -> None:
    """The files that decide what a processor does, as they are in a checkpoint."""
    for name in PROCESSOR_FILES:
        file = checkpoint.directory / name
        if file.is_file() and "/" not in name:
            shutil.copyfile(file, folder / name)
