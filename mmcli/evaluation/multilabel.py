"""Rows with any number of classes: micro and macro F1, exact sets, and mean average precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmcli.evaluation.bootstrap import Resampling, Score, ratio, score
from mmcli.evaluation.classification import TopK


def evaluate(
    labels: Sequence[Sequence[str] | None],
    truth: Sequence[Sequence[str]],
    top_k: Sequence[TopK | None] | None,
    resampling: Resampling,
) -> tuple[list[Score], dict[str, Any], list[str]]:
    """micro_f1, macro_f1, exact_match, and mean_average_precision where every row has a score of every class.

    None, no answer, counts as no classes, and never as an exact match. Returns scores, details (`classes`), notes.
    """
    answers = [set(found or ()) for found in labels]
    right = [set(true) for true in truth]
    classes = sorted(set().union(*answers, *right))
    codes = {name: code for code, name in enumerate(classes)}
    counts = _Counts(answers, right, codes)
    answered = np.array([found is not None for found in labels])
    exact = answered * np.array([a == t for a, t in zip(answers, right, strict=True)], float)
    notes: list[str] = []
    ranking = _scored(top_k, answered, classes, right, notes)

    def statistic(weights: np.ndarray) -> np.ndarray:
        common, found, true = counts.sums(weights)
        f1 = ratio(2 * common, found + true)
        values = [
            ratio(2 * common.sum(), found.sum() + true.sum()),
            _mean(f1),
            ratio(weights @ exact, weights.sum()),
        ]
        return np.array([*values, _mean(ranking.average_precision(weights))] if ranking else values)

    names = ["micro_f1", "macro_f1", "exact_match"] + (["mean_average_precision"] if ranking else [])
    details = {"classes": _per_class(counts, classes, len(truth))}
    return score(names, statistic, answered, resampling), details, notes


class _Counts:
    """Right answers, answers and truths of each class, as sums over weighted rows."""

    def __init__(self, answers: Sequence[set[str]], truth: Sequence[set[str]], codes: dict[str, int]) -> None:
        self._classes = len(codes)
        both = [a & t for a, t in zip(answers, truth, strict=True)]
        self._members = [_members(sets, codes) for sets in (both, answers, truth)]

    def sums(self, weights: np.ndarray) -> list[np.ndarray]:
        return [np.bincount(codes, weights[rows], self._classes) for rows, codes in self._members]


def _members(sets: Sequence[set[str]], codes: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    rows = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
    return rows, np.array([codes[name] for one in sets for name in one], np.int64)


class _Ranking:
    """All rows by their scores of each class."""

    def __init__(self, scores: np.ndarray, truth: np.ndarray) -> None:
        """float64 [m, C], bool [m, C], and which of the rows the m are is in `rows`."""
        self._order = np.argsort(-scores, axis=0, kind="stable")
        ordered = np.take_along_axis(scores, self._order, axis=0)
        # Equal scores are one step of the curve, whatever their order (as scikit-learn's average_precision_score).
        self._ends = [np.append(np.flatnonzero(np.diff(column)), len(scores) - 1) for column in ordered.T]
        self._right = np.take_along_axis(truth, self._order, axis=0)

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """float64 [C]: sum of precision x gained recall; NaN for a class without a true row."""
        values = np.full(len(self._ends), np.nan)
        for i, ends in enumerate(self._ends):
            weight = weights[self._order[:, i]]
            found, right = np.cumsum(weight)[ends], np.cumsum(weight * self._right[:, i])[ends]
            if right[-1]:
                gained = np.diff(right, prepend=0.0)
                values[i] = (np.divide(right, found, out=np.zeros(len(ends)), where=found > 0) @ gained) / right[-1]
        return values


def _scored(
    top_k: Sequence[TopK | None] | None,
    answered: np.ndarray,
    classes: Sequence[str],
    truth: Sequence[set[str]],
    notes: list[str],
) -> _Ranking | None:
    if top_k is None:
        return None
    scores = np.full((len(answered), len(classes)), -np.inf)
    codes = {name: code for code, name in enumerate(classes)}
    for row, (best, there) in enumerate(zip(top_k, answered, strict=True)):
        found = dict(best or ())
        if there and not codes.keys() <= found.keys():
            notes.append("no mean average precision: it needs the scores of all classes in every row's top_k")
            return None
        if there:
            scores[row] = [found[name] for name in classes]
    return _Ranking(scores, np.array([[name in true for name in classes] for true in truth]))


def _per_class(counts: _Counts, classes: Sequence[str], rows: int) -> list[dict[str, Any]]:
    common, found, true = counts.sums(np.ones(rows))
    precision, recall, f1 = ratio(common, found), ratio(common, true), ratio(2 * common, found + true)
    return [
        {
            "class": name,
            "support": int(true[i]),
            "answered": int(found[i]),
            "precision": _number(precision[i]),
            "recall": _number(recall[i]),
            "f1": _number(f1[i]),
        }
        for i, name in enumerate(classes)
    ]


def _mean(values: np.ndarray) -> float:
    there = ~np.isnan(values)
    return float(values[there].mean()) if there.any() else np.nan


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
