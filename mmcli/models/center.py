"""Centring: each modality's unit vectors without their mean, and of unit length again (mmcli embed --center)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np

from mmcli.core.errors import ConfigError
from mmcli.core.protocols import EmbeddingModelPlan
from mmcli.core.records import MODALITIES, Modality
from mmcli.models.classify import check_same_model
from mmcli.models.plan import EmbeddingPlan


@dataclass(frozen=True, slots=True)
class Center:
    """The mean of the unit vectors of each modality, [D]."""

    means: dict[Modality, tuple[float, ...]]

    @property
    def embedding_size(self) -> int:
        """D."""
        return len(next(iter(self.means.values())))

    @property
    def digest(self) -> str:
        """Hex digest of the means, which identifies what is subtracted."""
        hashed = blake2b(digest_size=16)
        for modality in sorted(self.means):
            hashed.update(modality.encode() + b"\0" + np.array(self.means[modality], np.float32).tobytes())
        return hashed.hexdigest()


def center_plan(plan: EmbeddingModelPlan, model: str, center: Center, identity: dict[str, Any]) -> EmbeddingPlan:
    """The plan of a model whose vectors are centred; `identity`: of the model of the means.

    Inputs of a modality without a mean are none that it takes. Raises ConfigError for another model's means.
    """
    if not isinstance(plan, EmbeddingPlan):
        raise ConfigError(f"--center: -m {model} is no checkpoint; its vectors cannot be centred")
    check_same_model(plan, model, {**identity, "size": center.embedding_size}, "the means of --center")
    left = plan.modalities & center.means.keys()
    if not left:
        has, takes = (", ".join(m for m in MODALITIES if m in some) for some in (center.means, plan.modalities))
        raise ConfigError(f"--center: its means are of {has}; -m {model} takes {takes}")
    decode = replace(plan.decode, modalities=frozenset(left))
    return replace(plan, decode=decode, normalize=True, center=center)
