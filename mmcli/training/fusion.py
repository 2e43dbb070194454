"""The objective *classify* by fusion: several encoders, joined by a transformer (mmcli.models.fusion)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmcli.core.records import Modality
from mmcli.models.checkpoint import Checkpoint
from mmcli.models.fusion import MultimodalTransformer
from mmcli.models.fusion_family import input_plan, save_fusion
from mmcli.models.fusion_inputs import parts_of
from mmcli.models.fusion_runner import FusionCollator
from mmcli.models.options import ModelOptions
from mmcli.models.plan import ClassificationPlan
from mmcli.models.runner import Collator


@dataclass(frozen=True, slots=True)
class FusionNetwork:
    """See mmcli.training.classify.Network.

    encoders  by modality
    settings  of MultimodalConfig: hidden_size, num_attention_heads, num_hidden_layers, ...
    """

    plan: ClassificationPlan
    encoders: Mapping[Modality, Checkpoint]
    from_config: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

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
        return model.to(device), frozenset() if self.from_config else model.new_weights()

    def collator(self, device: torch.device) -> Collator:
        """With inputs of every encoder in every batch, so that all parameters have gradients."""
        return FusionCollator(self.plan, device, whole=True)

    def logits(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """See Network."""
        given = dict(inputs)
        present = given.pop("present")
        logits: torch.Tensor = model(given, present).logits
        return logits

    def save(self, model: Any, folder: Path) -> None:
        """The model, and how each of its encoders takes inputs."""
        save_fusion(model, self.encoders, folder)
