"""Logits of validation rows to the scores that `mmcli eval` gives to labels."""

from __future__ import annotations

import numpy as np

from mmcli.evaluation import classification
from mmcli.evaluation.bootstrap import Resampling, Score

# All classes of all rows as long as they are so many numbers: else the best five, without likelihoods.
_MOST = 1_000_000


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def validation_scores(logits: np.ndarray, truth: np.ndarray, resampling: Resampling) -> list[Score]:
    """accuracy, mean_per_class, macro_f1, ece, nll, ... with intervals; see mmcli.evaluation.classification.

    logits [n, L], of which softmax makes probabilities; truth int64 [n]
    """
    probabilities = np.exp(log_softmax(logits.astype(float)))
    names = [str(label) for label in range(logits.shape[1])]
    kept = len(names) if probabilities.size <= _MOST else min(classification.TOP, len(names))
    # The first of equals is the answer, as argmax has it.
    order = np.argsort(-logits, axis=1, kind="stable")[:, :kept]
    top_k = [
        [(names[label], float(row[label])) for label in best]
        for row, best in zip(probabilities, order.tolist(), strict=True)
    ]
    rows = classification.Predictions(
        labels=[best[0][0] for best in top_k],
        truth=[names[label] for label in truth.tolist()],
        scores=[best[0][1] for best in top_k],
        top_k=top_k,
    )
    return classification.evaluate(rows, resampling)[0]
