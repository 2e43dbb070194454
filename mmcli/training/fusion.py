"""The objective *classify* by fusion: several encoders, joined by a transformer (mmcli.models.fusion)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmcli.core.records import Modality, Sample
from mmcli.models.checkpoint import Checkpoint, open_checkpoint
from mmcli.models.fusion import MultimodalTransformer
from mmcli.models.fusion_family import input_plan, save_fusion
from mmcli.models.fusion_inputs import parts_of
from mmcli.models.fusion_runner import FusionCollator
from mmcli.models.options import ModelOptions
from mmcli.models.plan import ClassificationPlan
from mmcli.models.runner import Collator
from mmcli.training.classify import Outputs, Part


@dataclass(frozen=True, slots=True)
class FusionNetwork:
    """See mmcli.training.classify.Network.

    encoders        by modality
    settings        of MultimodalConfig: hidden_size, num_attention_heads, num_hidden_layers, ...
    unimodal_heads  each modality also has a head of its own, which is not saved
    """

    plan: ClassificationPlan
    encoders: Mapping[Modality, Checkpoint]
    from_config: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    unimodal_heads: bool = False

    @classmethod
    def of(
        cls,
        encoders: Mapping[Modality, Checkpoint],
        options: ModelOptions,
        labels: Sequence[str],
        from_config: bool,
        settings: Mapping[str, Any],
    ) -> FusionNetwork:
        """Raises ConfigError for an encoder of an unknown type."""
        first = next(iter(encoders.values()))
        plan = input_plan(first, parts_of(encoders), options, labels)
        return cls(plan, dict(encoders), from_config, dict(settings))

    def build(self, device: torch.device) -> tuple[nn.Module, frozenset[str]]:
        """Encoders with their weights; all else is new."""
        model = MultimodalTransformer.from_encoders(
            self.encoders,
            self.plan.labels,
            weights=not self.from_config,
            attn_implementation=self.plan.attn_implementation,
            **self.settings,
        )
        if self.unimodal_heads:
            model.add_unimodal_heads()
        return model.to(device), frozenset() if self.from_config else model.new_weights()

    def collator(self, device: torch.device) -> Collator:
        """With inputs of every encoder in every batch, so that all parameters have gradients."""
        return FusionCollator(self.plan, device, whole=True)

    def group(self, sample: Sample) -> Any:
        """Rows share a batch whatever they lack: their encoders run once for all of them."""
        return sample.group

    def outputs(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> Outputs:
        """See Network."""
        given = dict(inputs)
        present = given.pop("present")
        found = model(given, present)
        if found.unimodal_logits is None:
            return Outputs(found.logits)
        alone = zip(self.encoders, found.unimodal_logits.unbind(1), present.unbind(1), strict=True)
        return Outputs(found.logits, {modality: (logits, there) for modality, logits, there in alone})

    def save(self, model: Any, folder: Path) -> None:
        """The model, and how each of its encoders takes inputs."""
        save_fusion(model, self.encoders, folder)


def recombined(folder: Path, objective: Any, pieces: Iterable[Any], device: torch.device) -> Recombined:
    """Of the model in a folder that `FusionNetwork.save` wrote."""
    model, _ = open_checkpoint(ModelOptions(str(folder))).load(MultimodalTransformer, dtype=torch.float32)
    model = model.to(device)
    return Recombined(model, objective.network.collator(device), pieces)


# Rows that are put together at once.
_ROWS = 128


class Recombined:
    """Answers of a loaded model to rows that are put together anew: see `Predict` of mmcli.evaluation.diagnostics.

    Every encoder sees every row once; what joins their tokens is computed for each question.
    """

    def __init__(
        self, model: MultimodalTransformer, collator: Collator, pieces: Iterable[Sequence[Sequence[Part]]]
    ) -> None:
        """`pieces`: of all rows, as Classify collates them."""
        self._model = model.eval()
        towers: Any = model.towers
        self._missing = [tower.missing + tower.kind for tower in towers.values()]
        self.present: np.ndarray
        self.targets: np.ndarray
        with torch.inference_mode():
            parts = [part for piece in pieces for one in piece for part in one]
            found = [self._tokens(collator.to_device(part.batch)) for part in parts]
        order = torch.cat([part.rows for part in parts]).argsort()
        self.present = torch.cat([present for _, present in found])[order].numpy()
        self.targets = torch.cat([part.targets for part in parts])[order].numpy()
        self._sequences = [_joined([sequences[m] for sequences, _ in found], order) for m in range(len(towers))]

    def _tokens(
        self, inputs: dict[str, torch.Tensor]
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        """Tokens and masks of every modality, and which rows have it."""
        present = inputs.pop("present").cpu()
        towers: Any = self._model.towers
        made = []
        for index, (modality, tower) in enumerate(towers.items()):
            own = {n.partition(".")[2]: t for n, t in inputs.items() if n.startswith(f"{modality}.")}
            made.append(tower(own, present[:, index]))
        return made, present

    @torch.inference_mode()
    def __call__(self, indices: np.ndarray, present: np.ndarray) -> np.ndarray:
        """indices int64 [k, M], present bool [k, M] -> logits float32 [k, L]."""
        made = []
        for start in range(0, len(indices), _ROWS):
            chosen, there = indices[start : start + _ROWS], present[start : start + _ROWS]
            sequences = [
                self._chosen(m, torch.from_numpy(chosen[:, m]), torch.from_numpy(there[:, m]))
                for m in range(chosen.shape[1])
            ]
            made.append(self._model.head(self._model._fuse(sequences)).float().cpu())
        logits: np.ndarray = torch.cat(made).numpy()
        return logits

    def _chosen(self, m: int, rows: torch.Tensor, there: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, mask = self._sequences[m]
        rows, there = rows.to(tokens.device), there.to(tokens.device)
        found, counts = tokens[rows].clone(), mask[rows].clone()
        found[~there, 0], counts[~there] = self._missing[m].to(found.dtype), False
        counts[:, 0] = True
        # Padding behind all of these rows is left out: a masked picture is one token instead of 50.
        longest = int(counts.any(dim=0).nonzero().max()) + 1
        return found[:, :longest], counts[:, :longest]


def _joined(
    sequences: Sequence[tuple[torch.Tensor, torch.Tensor]], order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [n, T, H] and masks [n, T] of several batches as one, padded behind, in another order."""
    longest = max(tokens.shape[1] for tokens, _ in sequences)
    order = order.to(sequences[0][0].device)
    tokens = [nn.functional.pad(one, (0, 0, 0, longest - one.shape[1])) for one, _ in sequences]
    masks = [nn.functional.pad(mask, (0, longest - mask.shape[1])) for _, mask in sequences]
    return torch.cat(tokens)[order], torch.cat(masks)[order]
