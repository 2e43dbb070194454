"""metrics.jsonl: a line for every logged step and every evaluation; the curves that it draws; and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmcli.core.durable import output_errors, write_durably

FILE, TENSORBOARD = "metrics.jsonl", "tensorboard"


class MetricsLog:
    """Appended to; begins with what is there up to a step, so that what is done again is not there twice.

    Where TensorBoard is installed its event files are written beside it: the same numbers under the same names.
    """

    def __init__(self, run: Path, upto: int) -> None:
        self._path = run / FILE
        kept = [line for line in read_metrics(run) if line["step"] <= upto]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        with output_errors(self._path):
            write_durably(self._path, lambda target: target.write_text(text, encoding="utf-8"))
            self._file = self._path.open("a", encoding="utf-8")
            self._board = _tensorboard(run / TENSORBOARD, upto)

    def write(self, **values: Any) -> None:
        """One line. Raises OutputError."""
        with output_errors(self._path):
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in values.items():
                    if name not in ("step", "epoch"):
                        self._board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(folder: Path, upto: int) -> Any:
    """Writes event files, beside which nothing counts that earlier ones say of later steps; None: not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=upto + 1, flush_secs=30)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run; a torn last one is left out."""
    path = run / FILE
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def draw_curves(lines: Iterable[dict[str, Any]], metric: str, path: Path) -> bool:
    """Loss and metric by step as a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines = list(lines)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, validation = figure.subplots(1, 2)
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    val = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    for name, points in (("training", train), ("validation", val)):
        if points:
            loss.plot(
                *zip(*points, strict=True), label=name, marker="o" if len(points) < 20 else None, markersize=3
            )
    loss.set(title="loss", xlabel="step")
    if train or val:
        loss.legend()
    measured = [(line["step"], line[f"val_{metric}"]) for line in lines if f"val_{metric}" in line]
    if measured:
        validation.plot(*zip(*measured, strict=True), marker="o", markersize=3, color="C2")
    validation.set(title=f"validation {metric}", xlabel="step")
    for axes in (loss, validation):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    return True
