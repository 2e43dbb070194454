"""The objective *contrastive* of two encoders that are joined (mmcli.models.joined)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mmcli.core.errors import ConfigError
from mmcli.core.records import Modality
from mmcli.models.checkpoint import Checkpoint, open_checkpoint
from mmcli.models.families import plan_vectors
from mmcli.models.joined import Loss, join, new_weights
from mmcli.models.joined_family import Activation, encoder_part, input_plan, save_joined
from mmcli.models.options import ModelOptions
from mmcli.models.plan import EmbeddingPlan
from mmcli.training.contrastive import CheckpointNetwork


@dataclass(slots=True)
class JoinedNetwork:
    """See mmcli.training.contrastive.Network.

    options   of the command; their model is none
    poolings  that a directory of an encoder states
    """

    plan: EmbeddingPlan
    options: ModelOptions
    from_config: bool = False
    poolings: Mapping[Modality, str] = field(default_factory=dict)

    @classmethod
    def of_encoders(
        cls,
        encoders: Mapping[Modality, Checkpoint],
        options: ModelOptions,
        projection_size: int,
        loss: Loss,
        from_config: bool,
    ) -> JoinedNetwork:
        """Raises ConfigError, with every problem, for encoders that give no vectors."""
        problems: list[str] = []
        parts, poolings = [], {}
        for modality, checkpoint in encoders.items():
            try:
                part, stated = encoder_part(checkpoint, modality, options)
            except ConfigError as error:
                problems += error.problems
                continue
            parts.append(part)
            if stated is not None:
                poolings[modality] = stated
        if problems:
            raise ConfigError(problems)
        activation: Activation = "sigmoid" if loss == "siglip" else "softmax"
        plan = input_plan(parts[0].checkpoint, parts, options, projection_size, activation)
        return cls(plan, options, from_config, poolings)

    @property
    def encoders(self) -> dict[Modality, Checkpoint]:
        """By modality."""
        return {part.modality: part.checkpoint for part in self.plan.parts}

    def build(self, device: torch.device) -> tuple[Any, frozenset[str]]:
        """Encoders with their weights, and new projections."""
        plan = self.plan
        loss: Loss = "siglip" if plan.detail.activation == "sigmoid" else "clip"
        model: Any = join(
            plan.parts,
            plan.embedding_size,
            loss,
            weights=not self.from_config,
            attn_implementation=plan.attn_implementation,
            poolings=self.poolings,
        )
        return model.to(device), frozenset() if self.from_config else new_weights(model)

    def save(self, model: Any, folder: Path) -> None:
        """The model, and how each of its encoders takes inputs."""
        save_joined(model, self.plan.parts, folder)

    def of(self, folder: Path) -> CheckpointNetwork:
        """See Network."""
        options = replace(self.options, model=str(folder), revision=None)
        return CheckpointNetwork(plan_vectors(open_checkpoint(options), options, "float32"))
