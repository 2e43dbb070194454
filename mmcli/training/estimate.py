"""What a run needs: memory, as far as it can be told before the first step; time and all memory after some."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from mmcli.training.options import TrainOptions

# Numbers that an optimizer keeps for each one that learns.
_STATES = {"adamw": 2, "adam": 2, "sgd": 1}
# A word after so many steps, or, where they take long, after so many seconds.
STEPS, SECONDS = 10, 15.0


def memory_before(model: nn.Module, options: TrainOptions) -> dict[str, int]:
    """Bytes of what stays in memory over steps, on the device; all float32.

    Beside it a step needs the activations of a piece (the rows of a batch / `accumulation`), and an evaluation of
    averaged weights a copy of the weights.
    """
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    learning = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    copies = sum(one is not None for one in (options.ema, options.wise_ft))
    found = {
        "weights": weights,
        "gradients": learning,
        options.optimizer: _STATES[options.optimizer] * learning,
        "copies of weights": copies * weights,
    }
    return {name: size for name, size in found.items() if size}


def describe_memory(sizes: dict[str, int]) -> str:
    """`memory: 1.4 GB (weights 350 MB, gradients 350 MB, adamw 700 MB), and what a step computes`"""
    parts = ", ".join(f"{name} {as_text(size)}" for name, size in sizes.items())
    return f"memory: {as_text(sum(sizes.values()))} ({parts}), and what a step computes"


def peak_memory(device: torch.device) -> int:
    """Bytes that were in use at most so far: on a GPU by this process's tensors; on a CPU all of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # In kB, but on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def as_text(size: float) -> str:
    """`12.3 GB`, `350 MB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(size, 0) / 1e6:.0f} MB"


@dataclass(slots=True)
class Forecast:
    """Tells once how much time and memory a run takes.

    first  the step that it begins after
    steps  all of them
    """

    note: Callable[[str], None]
    device: torch.device
    first: int
    steps: int
    _began: float = field(default_factory=time.monotonic)
    _told: bool = False

    def after(self, step: int) -> None:
        """To be called after each step, 1, 2, ..."""
        seconds, done = time.monotonic() - self._began, step - self.first
        if self._told or (done < STEPS and seconds < SECONDS and step < self.steps):
            return
        self._told = True
        left = seconds / done * (self.steps - step) / 60
        minutes = f"about {left:.0f} minutes to go" if left >= 1 else "less than a minute to go"
        whose = "of the GPU" if self.device.type == "cuda" else "without the processes that read rows"
        self.note(f"{minutes}, without evaluations; about {as_text(peak_memory(self.device))} of memory, {whose}")
