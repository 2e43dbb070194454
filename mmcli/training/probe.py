"""The objective *probe*: a linear head on the vectors of a model that stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmcli.core.protocols import EmbeddingModelPlan
from mmcli.models.few_shot import PENALTIES, Support, probes
from mmcli.models.head import Head
from mmcli.models.options import ModelOptions

# Metrics of which less is better.
LOWER = ("log_loss",)


@dataclass(slots=True)
class Probe:
    """What is learned: as far as a run needs to know it, as mmcli.training.objective.Objective.

    options  of the model of the vectors
    labels   in the order of the head's logits
    metric   the validation metric that the penalty is chosen by
    """

    plan: EmbeddingModelPlan
    options: ModelOptions
    labels: tuple[str, ...]
    metric: str
    balanced: bool = False
    name: str = "probe"


@dataclass(frozen=True, slots=True)
class Fitted:
    """The best head, the value of the metric, which of the penalties it has (from 1), and how many there were."""

    head: Head
    best: float
    step: int
    steps: int


def fit(
    probe: Probe, train: Support, vectors: np.ndarray, classes: np.ndarray, told: Callable[[dict[str, Any]], None]
) -> Fitted:
    """The probe that is best on the validation rows, float32 [N, D] and int64 [N], of one for each of PENALTIES.

    Logistic regression, whose penalty is so chosen, is what models are compared by (Kornblith et al. 2019, "Do
    better ImageNet models transfer better?"; Radford et al. 2021, appendix A.3). Of equal ones that with the least
    log loss is taken, then the strongest penalty. `told` hears what is measured of each.
    """
    best: tuple[tuple[float, float], Head, float, int] | None = None
    for step, (penalty, head) in enumerate(probes(train, probe.balanced), start=1):
        found = measure(head, vectors, classes)
        told({"step": step, "C": penalty, **{f"val_{name}": value for name, value in found.items()}})
        value = found[probe.metric]
        key = (-value if probe.metric in LOWER else value, -found["log_loss"])
        if best is None or key > best[0]:
            best = key, head, value, step
    assert best is not None
    return Fitted(best[1], best[2], best[3], len(PENALTIES))


def measure(head: Head, vectors: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    """accuracy, mean_per_class (of classes that come) and log_loss, the mean of -ln of the class's probability."""
    logits, targets = head.logits(torch.from_numpy(vectors)), torch.from_numpy(classes)
    right = (logits.argmax(dim=-1) == targets).double()
    per_class = [float(right[targets == one].mean()) for one in targets.unique()]  # type: ignore[no-untyped-call]
    return {
        "accuracy": float(right.mean()),
        "mean_per_class": sum(per_class) / len(per_class),
        "log_loss": float(torch.nn.functional.cross_entropy(logits, targets)),
    }
