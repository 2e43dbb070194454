"""A head of a few solved examples: class means, a linear probe, or a cache beside a zero-shot head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mmcli.core.errors import ConfigError
from mmcli.models.head import Cache, Head

METHODS = ("auto", "mean", "probe", "tip-adapter")
# From so many examples of every class on, a probe is what --method auto takes.
PROBE_FROM = 4
# What a cosine is multiplied by where nothing tells.
_SCALE = 20.0
_SCALES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)
PENALTIES = tuple(10.0**power for power in range(-4, 5))
# Examples that settings are chosen with.
_LEAST_COMPARED, _MOST_COMPARED = 20, 10_000
_FOLDS = 5


@dataclass(frozen=True, slots=True)
class FewShot:
    """How a head is made.

    method       one of METHODS
    alpha, beta  of Tip-Adapter's cache
    seed         of the split that a probe's penalty is chosen on
    """

    method: str = "auto"
    alpha: float = 1.0
    beta: float = 5.5
    seed: int = 0

    def describe(self) -> dict[str, Any]:
        """As JSON values, for the fingerprint."""
        told: dict[str, Any] = {"method": self.method}
        if self.method == "tip-adapter":
            told |= {"alpha": self.alpha, "beta": self.beta}
        return {**told, "seed": self.seed} if self.method == "probe" else told


@dataclass(frozen=True, slots=True)
class Support:
    """Solved examples.

    vectors    float32 [N, D]
    classes    int64 [N], indices of labels
    labels     names; each has an example
    normalize  vectors count by their direction alone
    """

    vectors: np.ndarray
    classes: np.ndarray
    labels: tuple[str, ...]
    normalize: bool


def choose_method(how: FewShot, counts: Sequence[int]) -> tuple[FewShot, str | None]:
    """`auto` decided by how many examples classes have, and why; else as it is."""
    if how.method != "auto":
        return how, None
    least = min(counts)
    if least >= PROBE_FROM:
        return replace(how, method="probe"), f"a probe: every label has {least} examples or more"
    return replace(how, method="mean"), f"nearest class means: a label has {least} of the {PROBE_FROM} for a probe"


def fit(support: Support, how: FewShot, zero_shot: Head | None) -> Head:
    """The head. `zero_shot`: that of the same labels, for tip-adapter. Raises ConfigError."""
    match how.method:
        case "mean":
            return class_means(support)
        case "probe":
            return probe(support, how.seed)
        case _:
            assert zero_shot is not None
            return tip_adapter(support, how, zero_shot)


def class_means(support: Support) -> Head:
    """Nearest class mean: the cosine to each class's mean of unit vectors (prototypes; Snell et al. 2017).

    Cosines are multiplied by that of _SCALES under which the examples are the likeliest, each beside means that it
    is left out of; by 20 where fewer than 20 examples have another of their class.
    """
    unit = _unit(support.vectors)
    sums = np.zeros((len(support.labels), unit.shape[1]), dtype=np.float32)
    np.add.at(sums, support.classes, unit)
    scale = _best_scale(unit, support.classes, sums)
    weight = torch.from_numpy(_unit(sums) * np.float32(scale))
    method = {"name": "mean", "scale": scale, "examples": len(unit)}
    return Head(support.labels, weight, torch.zeros(len(weight)), True, "softmax", None, method)


def _best_scale(unit: np.ndarray, classes: np.ndarray, sums: np.ndarray) -> float:
    counts = np.bincount(classes, minlength=len(sums))
    chosen = np.flatnonzero(counts[classes] > 1)[:_MOST_COMPARED]
    if len(chosen) < _LEAST_COMPARED:
        return _SCALE
    cosines = unit[chosen] @ _unit(sums).T
    own = classes[chosen]
    left = _unit(sums[own] - unit[chosen])
    cosines[np.arange(len(chosen)), own] = (left * unit[chosen]).sum(axis=1)
    logits = torch.from_numpy(cosines)
    target = torch.from_numpy(own)
    losses = [float(torch.nn.functional.cross_entropy(logits * scale, target)) for scale in _SCALES]
    return _SCALES[int(np.argmin(losses))]


def probe(support: Support, seed: int) -> Head:
    """Multinomial logistic regression on standardised vectors, by scikit-learn.

    Its penalty C is that of 0.0001 to 10,000 with the least log loss on parts of the examples that are left out
    (five folds, stratified; fewer where a class has fewer examples); 1 when a class has one example. Raises
    ConfigError for one label.
    """
    if len(support.labels) < 2:
        raise ConfigError("a probe tells labels apart: two or more are needed")
    standard = _Standardised.of(support)
    penalty = _best_penalty(standard.inputs, support.classes, seed)
    return standard.head(support, penalty, *_regression(standard.inputs, support.classes, penalty))


def probes(support: Support, balanced: bool = False) -> Iterator[tuple[float, Head]]:
    """A probe for each penalty C of PENALTIES, the strongest first.

    balanced  rows count by 1 / how often their label comes
    Each begins with the coefficients of the one before, which is nearer than zeros.
    """
    from sklearn.linear_model import LogisticRegression

    standard = _Standardised.of(support)
    weights = "balanced" if balanced else None
    model = LogisticRegression(max_iter=1000, tol=1e-4, warm_start=True, class_weight=weights)
    for penalty in PENALTIES:
        model.set_params(C=penalty).fit(standard.inputs, support.classes)
        yield penalty, standard.head(support, penalty, *_coefficients(model))


@dataclass(frozen=True, slots=True)
class _Standardised:
    """Vectors of mean 0 and spread 1, float64 [N, D], and what they were: mean and spread [D]."""

    inputs: np.ndarray
    mean: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, support: Support) -> _Standardised:
        vectors = _unit(support.vectors) if support.normalize else support.vectors
        mean = vectors.mean(axis=0, dtype=np.float64)
        spread = vectors.std(axis=0, dtype=np.float64)
        spread[spread < 1e-12] = 1.0
        return cls((vectors - mean) / spread, mean, spread)

    def head(self, support: Support, penalty: float, coefficients: np.ndarray, intercepts: np.ndarray) -> Head:
        """That of vectors as they were."""
        weight = coefficients / self.spread
        bias = intercepts - weight @ self.mean
        return Head(
            support.labels,
            torch.from_numpy(weight.astype(np.float32)),
            torch.from_numpy(bias.astype(np.float32)),
            support.normalize,
            "softmax",
            None,
            {"name": "probe", "C": penalty, "examples": len(self.inputs)},
        )


def _best_penalty(inputs: np.ndarray, classes: np.ndarray, seed: int) -> float:
    from sklearn.model_selection import StratifiedKFold

    folds = min(_FOLDS, int(np.bincount(classes).min()))
    if folds < 2:
        return 1.0
    splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(inputs, classes))
    if len(inputs) > _MOST_COMPARED:
        splits = splits[:1]
    losses = [
        sum(_log_loss(inputs, classes, train, test, penalty) * len(test) for train, test in splits)
        for penalty in PENALTIES
    ]
    return PENALTIES[int(np.argmin(losses))]


def _log_loss(
    inputs: np.ndarray, classes: np.ndarray, train: np.ndarray, test: np.ndarray, penalty: float
) -> float:
    weight, bias = _regression(inputs[train], classes[train], penalty)
    logits = torch.from_numpy(inputs[test] @ weight.T + bias)
    return float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(classes[test])))


def _regression(inputs: np.ndarray, classes: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights float64 [L, D] and intercepts [L] whose softmax are the probabilities."""
    from sklearn.linear_model import LogisticRegression

    return _coefficients(LogisticRegression(C=penalty, max_iter=1000, tol=1e-4).fit(inputs, classes))


def _coefficients(fitted: Any) -> tuple[np.ndarray, np.ndarray]:
    weight, bias = fitted.coef_, fitted.intercept_
    if len(weight) == 1:
        # Of two classes it gives the logit of the second against the first.
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias


def tip_adapter(support: Support, how: FewShot, zero_shot: Head) -> Head:
    """Tip-Adapter, training-free (Zhang et al. 2022): the examples as a cache beside the zero-shot head."""
    keys = torch.from_numpy(_unit(support.vectors))
    cache = Cache(keys, torch.from_numpy(support.classes), how.alpha, how.beta)
    method = {**zero_shot.method, "name": "tip-adapter", "examples": len(keys)}
    device = torch.device("cpu")
    return replace(zero_shot.to(device), cache=cache, method=method)


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: np.ndarray = (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
    return unit
