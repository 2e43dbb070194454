"""What an objective of training offers the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from mmcli.core.protocols import ModelPlan
from mmcli.training.data import Item

Backward = Callable[[torch.Tensor], None]


class Objective(Protocol):
    """What is learned.

    name    "classify", ...
    plan    what decodes and processes rows
    metric  the validation metric that the best is chosen by
    joint   the loss is of the rows of all processes together, and so the same in all of them
    """

    name: str
    metric: str
    joint: bool

    @property
    def plan(self) -> ModelPlan: ...

    def build(self, device: torch.device) -> torch.nn.Module:
        """The model, on a device. Its new weights are drawn from torch's global generator. Raises ModelError."""
        ...

    def new_weights(self) -> frozenset[str]:
        """Names of parameters of the built model that no checkpoint had."""
        ...

    def collate(self, items: Sequence[Item], pieces: int) -> list[Any]:
        """A batch in pieces, on the host; runs in workers."""
        ...

    def count(self, pieces: Sequence[Any]) -> int:
        """What the loss of a batch is the mean of: rows, or tokens."""
        ...

    def step(self, model: torch.nn.Module, pieces: Sequence[Any], total: float, backward: Backward) -> float:
        """Gradients of the batch's loss, whatever the pieces; returns this process's part of the loss.

        pieces    none, where the batch has fewer rows than there are processes: then only joint losses are asked
        total     what sums are divided by: the count of all processes
        backward  called once for each piece, or once for all of them
        """
        ...

    def adapted(self, model: torch.nn.Module) -> None:
        """Called once weights are frozen: let learn what must."""
        ...

    def after_step(self, model: torch.nn.Module) -> None:
        """Called after each optimizer step."""
        ...

    def predict(self, model: torch.nn.Module, pieces: Sequence[Any]) -> Any:
        """Of a batch of validation rows, what `measured` needs; on the host, picklable."""
        ...

    def measured(self, found: Sequence[Any]) -> dict[str, float]:
        """Metrics of what `predict` found of each batch, in order."""
        ...

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write what `-m folder` loads into an existing folder."""
        ...
