"""The modality gap and centring, against plain sums in float64."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation_scores import NO_INTERVALS, by_name
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcli.evaluation.bootstrap import Resampling
from mmcli.evaluation.retrieval import Items
from mmcli.evaluation.shared_space import centred, diagnose_space, gap, mean

NAMES = ("image", "text")


def cones(rows: int = 200, offset: float = 3.0, noise: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Two modalities that agree, each in a cone of its own."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(rows, 16))
    sides = [shared + noise * rng.normal(size=shared.shape) for _ in range(2)]
    sides[0][:, 0] += offset
    sides[1][:, 1] += offset
    return sides[0].astype(np.float32), sides[1].astype(np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    found: np.ndarray = vectors.astype(float) / np.linalg.norm(vectors.astype(float), axis=1, keepdims=True)
    return found


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(2, 30))
def test_as_plain_sums(seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(2, rows, 8))
    left += 2
    sides = [Items.of(side, np.arange(rows)) for side in (left, right)]
    plain = [unit(side) for side in (left, right)]
    means = [side.mean(axis=0) for side in plain]
    assert gap(*sides) == pytest.approx(np.linalg.norm(means[0] - means[1]), abs=1e-6)
    for items, side, center in zip(sides, plain, means, strict=True):
        np.testing.assert_allclose(mean(items), center, atol=1e-6)
        np.testing.assert_allclose(centred(items, mean(items)).vectors, unit(side - center), atol=1e-4)


def test_centring_closes_the_gap() -> None:
    left, right = cones()
    space = diagnose_space(NAMES, left, right, range(200), Resampling(replicates=100))
    found = by_name(space.scores)
    assert found["modality_gap"] == pytest.approx(
        np.linalg.norm(unit(left).mean(0) - unit(right).mean(0)), abs=1e-6
    )
    assert found["modality_gap"] is not None
    assert found["modality_gap"] > 0.5
    assert found["centred_modality_gap"] is not None
    assert found["centred_modality_gap"] < 0.05
    moved = [unit(side) - unit(side).mean(axis=0) for side in (left, right)]
    cosines = unit(moved[0]) @ unit(moved[1]).T
    assert found["centred_image_to_text_r_at_1"] == (cosines.argmax(axis=1) == np.arange(200)).mean()
    assert found["centred_text_to_image_r_at_1"] == (cosines.argmax(axis=0) == np.arange(200)).mean()
    assert found["image_to_text_r_at_1"] != found["centred_image_to_text_r_at_1"]


def test_an_interval_is_that_of_a_plain_bootstrap() -> None:
    left, right = cones(60)
    how = Resampling(replicates=120, seed=5)
    one = diagnose_space(NAMES, left, right, range(60), how).score("modality_gap")
    rng = np.random.default_rng(5)
    drawn = [rng.integers(0, 60, 60) for _ in range(120)]
    gaps = [np.linalg.norm(unit(left)[d].mean(axis=0) - unit(right)[d].mean(axis=0)) for d in drawn]
    low, high = np.quantile(gaps, [0.025, 0.975])
    assert (one.low, one.high) == (pytest.approx(low, abs=1e-5), pytest.approx(high, abs=1e-5))


def test_an_image_counts_once() -> None:
    """However many captions it has: the mean is over pictures."""
    left, right = cones(20)
    owners = np.repeat(np.arange(20), [1] * 10 + [5] * 10)
    once = diagnose_space(NAMES, left, right, range(20), NO_INTERVALS)
    several = diagnose_space(NAMES, left[owners], right[owners], owners.tolist(), NO_INTERVALS)
    assert by_name(several.scores)["modality_gap"] == pytest.approx(by_name(once.scores)["modality_gap"], abs=1e-6)
    assert several.items == (20, 20)


def test_a_side_without_vectors() -> None:
    left, right = cones(5)
    space = diagnose_space(NAMES, left, np.full_like(right, np.nan), range(5), NO_INTERVALS)
    assert "modality_gap" not in by_name(space.scores)
    assert by_name(space.scores)["image_to_text_r_at_1"] == 0
