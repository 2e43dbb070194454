"""The average of the weights of a run's best evaluations, in place of one of them.

A uniform model soup (Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves
accuracy without increasing inference time") of the checkpoints of one run, as Vaswani et al. 2017 and fairseq's
average_checkpoints make it; kept by the rule of the greedy soup: if it is better on the validation rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mmcli.core.durable import make_folder, output_errors, remove, write_durably

# (value of the metric, step) of an evaluation
Kept = tuple[float, int]
State = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Soup:
    """Weights of evaluations that were the best so far, each in a file: `most` of them, and one more for a moment.

    Which ones count is the checkpoint's to say: files are written before it and removed after it, so that those
    that it names are there whenever a run is killed.
    """

    folder: Path
    most: int

    def ranked(self, kept: Sequence[Kept], value: float, step: int) -> list[Kept]:
        """The evaluations to keep after one more, the best first; of equal ones the earlier."""
        return sorted([*kept, (value, step)], key=lambda one: (-one[0], one[1]))[: self.most]

    def write(self, state: State, step: int) -> None:
        """Raises OutputError."""
        with output_errors(self.folder):
            make_folder(self.folder)
            write_durably(self._file(step), lambda target: torch.save(state, target))

    def tidy(self, kept: Sequence[Kept]) -> None:
        """Remove what is of no kept evaluation. Raises OutputError."""
        wanted = {self._file(step) for _, step in kept}
        with output_errors(self.folder):
            for file in self.folder.glob("*") if self.folder.is_dir() else ():
                if file not in wanted:
                    remove(file)

    def average(self, kept: Sequence[Kept]) -> State:
        """The mean of their weights; whole numbers are those of the best. One file at a time is in memory."""
        mean: State = {}
        for count, (_, step) in enumerate(kept, start=1):
            state: State = torch.load(self._file(step), map_location="cpu", weights_only=True, mmap=True)
            for name, tensor in state.items():
                if name not in mean:
                    mean[name] = tensor.clone()
                elif tensor.is_floating_point():
                    # What was frozen stays what it is, bit for bit.
                    mean[name] += (tensor - mean[name]) / count
        return mean

    def _file(self, step: int) -> Path:
        return self.folder / f"step-{step}.pt"
