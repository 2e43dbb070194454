"""Where a run is: everything that the next step depends on, in a folder that is whole or absent."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmcli.core.durable import output_errors, swap_folder
from mmcli.core.errors import StateMismatch, one_line
from mmcli.training.optimizer import MovingAverage
from mmcli.training.sharding import load_whole

_FILE = "state.pt"


@dataclass(slots=True)
class Progress:
    """How far a run is.

    step       optimizer steps so far; epoch, epoch_step: passes that are finished, and steps of the one that is not
    best       the best value of the metric, and the step that it was measured at
    worse      evaluations since then
    evaluated  the step of the last evaluation
    kept       the best evaluations, whose weights are kept: (value of the metric, step), the best first
    averaged   the steps whose weights' average is the best; empty: it is that of a single step
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    best: float | None = None
    best_step: int = 0
    worse: int = 0
    evaluated: int = -1
    kept: list[tuple[float, int]] = field(default_factory=list)
    averaged: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Parts:
    """What changes in training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: MovingAverage | None = None
    scaler: Any = None


def seed_generators(seed: int) -> None:
    """What dropout draws from (torch's generator), and some models (numpy's and Python's)."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def generators(device: torch.device) -> dict[str, Any]:
    """Where this process's generators are, those of `device` among them."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": _numpy_state(),
        "python": list(random.getstate()[1]),
    }


def learned(parts: Parts) -> dict[str, Any]:
    """The states of model and optimizer."""
    return {"model": parts.model.state_dict(), "optimizer": parts.optimizer.state_dict()}


def save_checkpoint(
    folder: Path, parts: Parts, states: dict[str, Any], progress: Progress, drawn: Sequence[dict[str, Any]]
) -> None:
    """Replace the checkpoint in `folder`, all or nothing. Raises OutputError.

    states  see `learned`
    drawn   every process's generators, in order of rank
    """
    state = {
        **states,
        "average": parts.average.state if parts.average is not None else None,
        "scaler": parts.scaler.state_dict() if parts.scaler is not None else None,
        "progress": asdict(progress),
        "generators": list(drawn),
    }
    with output_errors(folder):
        swap_folder(folder, lambda target: torch.save(state, target / _FILE))


def load_checkpoint(folder: Path, parts: Parts, device: torch.device, rank: int = 0) -> Progress | None:
    """Put the parts into the state of the checkpoint; None when there is none. Raises StateMismatch.

    rank  whose generators this process goes on with; if there were fewer processes, it keeps its own
    """
    old = folder.with_name(f".{folder.name}.old")
    found = next((place for place in (folder, old) if (place / _FILE).is_file()), None)
    if found is None:
        return None
    try:
        state = torch.load(found / _FILE, map_location="cpu", weights_only=True)
        if len(state["optimizer"]["param_groups"]) != len(parts.optimizer.param_groups):
            raise ValueError("a run that began with FSDP goes on with it, and one without it without")
        load_whole(parts.model, parts.optimizer, state)
        if parts.average is not None:
            for name, tensor in state["average"].items():
                parts.average.state[name].copy_(tensor)
        if parts.scaler is not None:
            parts.scaler.load_state_dict(state["scaler"])
        if rank < len(state["generators"]):
            _restore(state["generators"][rank], device)
        return Progress(**state["progress"])
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise StateMismatch(
            f"the checkpoint in {found} cannot be read: {one_line(str(error))}",
            hint="--overwrite begins anew",
        ) from error


def _restore(drawn: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(drawn["torch"])
    if drawn["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(drawn["cuda"], device)
    name, keys, *rest = drawn["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    random.setstate((3, tuple(drawn["python"]), None))


def _numpy_state() -> list[Any]:
    name, keys, *rest = np.random.get_state()
    return [name, np.asarray(keys).tolist(), *rest]
