"""Classes: accuracy, top-5, mean per class, macro F1, confusions, and whether the scores are probabilities.

Precision, recall, F1 and the confusion matrix are scikit-learn's. The calibration error is that of Guo et al. 2017,
"On Calibration of Modern Neural Networks": 15 bins of equal width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mmcli.evaluation.bootstrap import Resampling, Score, ratio, score

BINS = 15
TOP = 5
# A larger matrix is not written out: 1,000 classes are 2 MB of JSON.
MATRIX_CLASSES = 1000
# Scores of all classes add up to one but for rounding in float32.
_SUM = 1e-3

TopK = Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class Predictions:
    """n rows with their true classes.

    labels  what was answered; None: nothing
    truth   what is right
    scores  of the answers; None where they have none, or None for all
    top_k   (label, score) from the best down; or None for all
    """

    labels: Sequence[str | None]
    truth: Sequence[str]
    scores: Sequence[float | None] | None = None
    top_k: Sequence[TopK | None] | None = None


def evaluate(rows: Predictions, resampling: Resampling) -> tuple[list[Score], dict[str, Any], list[str]]:
    """Scores, details (`classes`, `confusion`, `calibration`) and notes.

    A row without an answer is wrong: it lowers its class's recall, and no class's precision. Classes are those of
    the truth and of the answers. mean_per_class is over the classes of the truth (balanced accuracy).
    """
    classes = sorted({*rows.truth, *(label for label in rows.labels if label is not None)})
    codes = {name: code for code, name in enumerate(classes)}
    truth = np.array([codes[t] for t in rows.truth])
    labels = np.array([len(classes) if p is None else codes[p] for p in rows.labels])
    answered = labels < len(classes)
    parts: list[_Part] = [_Confusion(truth, labels, len(classes))]
    notes: list[str] = []
    parts += _top_5(rows, answered, notes)
    calibration = _calibration(rows, truth == labels, answered, notes)
    parts += [calibration] if calibration else []
    parts += _proper_scores(rows, answered)

    def statistic(weights: np.ndarray) -> np.ndarray:
        return np.concatenate([part.scores(weights) for part in parts])

    names = [name for part in parts for name in part.names]
    details = {"classes": _per_class(truth, labels, classes), "confusion": _confusion(truth, labels, classes)}
    if calibration is not None:
        details["calibration"] = calibration.bins()
    if answered.any() and not set(labels[answered]) & set(truth):
        notes.append(
            f"no answer is any row's true class: answered is e.g. {rows.labels[int(np.argmax(answered))]!r}, true "
            f"is e.g. {rows.truth[0]!r}; are they spelt alike?"
        )
    return score(names, statistic, answered, resampling), details, notes


class _Part(Protocol):
    """Some of the scores."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def scores(self, weights: np.ndarray) -> np.ndarray: ...


class _Confusion:
    """What follows from how often each class was taken for each."""

    names = ("accuracy", "mean_per_class", "macro_f1")

    def __init__(self, truth: np.ndarray, labels: np.ndarray, classes: int) -> None:
        # Only pairs that occur: with 1,000 classes a replicate does not count a million cells.
        pairs, self._pair = np.unique(truth * (classes + 1) + labels, return_inverse=True)
        self._truth, self._label = pairs // (classes + 1), pairs % (classes + 1)
        self._classes = classes

    def scores(self, weights: np.ndarray) -> np.ndarray:
        counts = np.bincount(self._pair, weights, len(self._truth))
        size = self._classes
        right = np.bincount(self._truth, counts * (self._truth == self._label), size)
        true = np.bincount(self._truth, counts, size)
        answered = np.bincount(self._label, counts, size + 1)[:size]
        recall, f1 = ratio(right, true), ratio(2 * right, true + answered)
        return np.array([ratio(right.sum(), counts.sum()), _mean(recall), _mean(f1)])


class _Mean:
    """The mean of a number of each row, over those that are `there`."""

    def __init__(self, name: str, values: np.ndarray, there: np.ndarray | None = None) -> None:
        self.names = (name,)
        self._values = values
        self._there = np.ones(len(values)) if there is None else there.astype(float)

    def scores(self, weights: np.ndarray) -> np.ndarray:
        kept = weights * self._there
        return np.array([ratio(kept @ self._values, kept.sum())])


class _Calibration:
    """Expected calibration error over answers with a score: mean |accuracy - confidence| of the bins."""

    names = ("ece",)

    def __init__(self, confidence: np.ndarray, right: np.ndarray, rows: np.ndarray) -> None:
        """`rows` int64 [m]: which of the rows the m answers are."""
        self._rows, self._confidence, self._right = rows, confidence, right.astype(float)
        # Bins are open below and closed above; 0 is in the first.
        self._bin = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)

    def scores(self, weights: np.ndarray) -> np.ndarray:
        gap = np.abs(self._sums(weights, self._right) - self._sums(weights, self._confidence))
        return np.array([ratio(gap.sum(), weights[self._rows].sum())])

    def _sums(self, weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.bincount(self._bin, weights[self._rows] * values, BINS)

    def bins(self) -> list[dict[str, Any]]:
        """Rows, mean confidence and accuracy of each bin; None where it is empty."""
        rows = np.bincount(self._bin, minlength=BINS)
        confidence = np.bincount(self._bin, self._confidence, BINS)
        right = np.bincount(self._bin, self._right, BINS)
        return [
            {
                "low": i / BINS,
                "high": (i + 1) / BINS,
                "rows": int(n),
                "confidence": confidence[i] / n if n else None,
                "accuracy": right[i] / n if n else None,
            }
            for i, n in enumerate(rows)
        ]


def _top_5(rows: Predictions, answered: np.ndarray, notes: list[str]) -> list[_Mean]:
    if rows.top_k is None:
        return []
    listed = [(t or ()) if a else () for t, a in zip(rows.top_k, answered, strict=True)]
    fewest = min((len(t) for t, a in zip(listed, answered, strict=True) if a), default=0)
    if fewest < TOP:
        notes.append(f"no top-5 accuracy: some rows list fewer than {TOP} classes ({fewest})")
        return []
    hits = [any(label == t for label, _ in best[:TOP]) for best, t in zip(listed, rows.truth, strict=True)]
    return [_Mean("top_5", np.array(hits, float))]


def _calibration(
    rows: Predictions, right: np.ndarray, answered: np.ndarray, notes: list[str]
) -> _Calibration | None:
    if rows.scores is None:
        return None
    values = np.array([np.nan if s is None else s for s in rows.scores], float)
    at = np.flatnonzero(answered & ~np.isnan(values))
    if not len(at):
        return None
    confidence = values[at]
    # float32 sums of probabilities end a little above 1.
    if confidence.min() < 0 or confidence.max() > 1 + _SUM:
        notes.append(
            f"no calibration: the scores go from {confidence.min():.4g} to {confidence.max():.4g}, so they are not "
            "probabilities"
        )
        return None
    return _Calibration(np.minimum(confidence, 1.0), right[at], at)


def _proper_scores(rows: Predictions, answered: np.ndarray) -> list[_Mean]:
    """Negative log-likelihood and Brier score, where every answer comes with the probabilities of all classes."""
    if rows.top_k is None:
        return []
    nll, brier = np.zeros(len(answered)), np.zeros(len(answered))
    for i in np.flatnonzero(answered).tolist():
        found = dict(rows.top_k[i] or ())
        if not found or None in found.values() or abs(sum(found.values()) - 1) > _SUM or min(found.values()) < 0:
            return []
        probability = found.get(rows.truth[i], 0.0)
        # As scikit-learn's log_loss: a probability of 0 counts as float32's epsilon.
        nll[i] = -np.log(max(probability, float(np.finfo(np.float32).eps)))
        brier[i] = sum(p * p for p in found.values()) - 2 * probability + 1
    return [_Mean("nll", nll, answered), _Mean("brier", brier, answered)] if answered.any() else []


def _per_class(truth: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    from sklearn.metrics import precision_recall_fscore_support

    codes = np.arange(len(classes))
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, labels, labels=codes, zero_division=np.nan
    )
    answered = np.bincount(labels, minlength=len(classes) + 1)
    return [
        {
            "class": name,
            "support": int(support[i]),
            "answered": int(answered[i]),
            "precision": _number(precision[i]),
            "recall": _number(recall[i]),
            "f1": _number(f1[i]),
        }
        for i, name in enumerate(classes)
    ]


def _confusion(truth: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """`matrix`: rows are true classes, columns answers, the last one no answer; None above MATRIX_CLASSES."""
    from sklearn.metrics import confusion_matrix

    size = len(classes)
    pairs, counts = np.unique(truth * (size + 1) + labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    mistakes = [
        {"class": classes[pair // (size + 1)], "answered": [*classes, None][pair % (size + 1)], "rows": int(count)}
        for pair, count in zip(pairs[order], counts[order], strict=True)
        if pair // (size + 1) != pair % (size + 1)
    ]
    matrix = confusion_matrix(truth, labels, labels=np.arange(size + 1))[:size] if size <= MATRIX_CLASSES else None
    return {
        "classes": list(classes),
        "matrix": None if matrix is None else matrix.tolist(),
        "mistakes": mistakes[:100],
    }


def _mean(values: np.ndarray) -> float:
    """Over those that are not NaN: classes that do not occur."""
    there = ~np.isnan(values)
    return float(values[there].mean()) if there.any() else np.nan


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
