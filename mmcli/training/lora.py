"""Low-rank adaptation (LoRA, Hu et al. 2021), by the library peft."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch import nn

from mmcli.core.errors import ConfigError


class Lora:
    """Adapters in a model's linear layers; the model itself stays the object that it was.

    Its other weights are frozen, but for those that are new. Raises ConfigError without peft, and for a model
    without linear layers.
    """

    def __init__(self, model: nn.Module, rank: int, alpha: float | None, new: Collection[str]) -> None:
        try:
            import peft
        except ImportError as error:
            raise ConfigError("--lora-rank needs the library peft", hint="pip install 'mmcli[finetune]'") from error
        heads = sorted({name.rpartition(".")[0] for name in new})
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,
            target_modules="all-linear",
            exclude_modules=heads or None,
        )
        try:
            self._adapted: Any = peft.get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(f"--lora-rank {rank}: this model has no linear layers to adapt") from error
        self.new = frozenset(name for name, p in model.named_parameters() if p.requires_grad) | frozenset(new)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.new)

    def merged(self) -> Any:
        """A copy of the model with the adapters added to its weights: what it was before, for every other tool."""
        return copy.deepcopy(self._adapted).merge_and_unload()
