"""Bootstrap intervals: of what they are, and that a seed says which."""

from __future__ import annotations

import numpy as np
import pytest

from mmcli.evaluation.bootstrap import Resampling, score

VALUES = np.random.default_rng(0).normal(3.0, 2.0, 400)


def mean(weights: np.ndarray) -> np.ndarray:
    return np.array([weights @ VALUES / weights.sum()])


def test_the_interval_of_a_mean() -> None:
    """As the normal approximation has it, which 400 rows allow."""
    one = score(["mean"], mean, np.ones(400, bool), Resampling(4000, 1))[0]
    half = 1.96 * VALUES.std() / np.sqrt(400)
    assert one.value == pytest.approx(VALUES.mean())
    assert one.low == pytest.approx(VALUES.mean() - half, abs=0.1 * half)
    assert one.high == pytest.approx(VALUES.mean() + half, abs=0.1 * half)


def test_the_seed_decides() -> None:
    runs = [score(["mean"], mean, np.ones(400, bool), Resampling(50, seed))[0] for seed in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert runs[0].low != runs[2].low
    assert runs[0].value == runs[2].value


def test_without_replicates() -> None:
    one = score(["mean"], mean, np.ones(400, bool), Resampling(0))[0]
    assert (one.low, one.high) == (None, None)
    assert one.value is not None


def test_over_the_answered() -> None:
    answered = np.arange(400) % 2 == 0
    one = score(["mean"], mean, answered, Resampling(0))[0]
    assert one.answered == pytest.approx(VALUES[::2].mean())
    nobody = score(["mean"], mean, np.zeros(400, bool), Resampling(0))[0]
    assert nobody.answered is None
    assert nobody.value == one.value


def test_replicates_that_lack_the_score() -> None:
    """A class with a single row is absent from a third of the samples; the others tell the interval."""
    rare = np.zeros(20)
    rare[0] = 1

    def recall(weights: np.ndarray) -> np.ndarray:
        return np.array([np.nan if not weights @ rare else 1.0, np.nan])

    one, never = score(["recall", "never"], recall, np.ones(20, bool), Resampling(100))
    assert (one.low, one.high) == (1, 1)
    assert (never.value, never.low, never.high) == (None, None, None)
