"""R@k and the median rank against a plain count in float64; ties count against the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from evaluation_scores import NO_INTERVALS, by_name, of_answered
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcli.evaluation import retrieval
from mmcli.evaluation.retrieval import Items, evaluate, ranks

NAMES = ("image", "text")


def scores_of(left: np.ndarray, right: np.ndarray, keys: Any = None, right_keys: Any = None) -> dict[str, Any]:
    keys = np.arange(len(left)) if keys is None else np.array(keys)
    right_keys = keys if right_keys is None else np.array(right_keys)
    sides = Items.of(left, keys), Items.of(right, right_keys)
    answered = np.ones(int(max(keys.max(), right_keys.max())) + 1, bool)
    for side in sides:
        answered[side.missing] = False
    return by_name(evaluate(NAMES, *sides, answered, NO_INTERVALS)[0])


def plain_ranks(left: np.ndarray, right: np.ndarray, keys: np.ndarray, right_keys: np.ndarray) -> list[int]:
    """1 + how many of others are as near as the best of one's own."""
    found = []
    for vector, key in zip(left.astype(float), keys, strict=True):
        cosine = right.astype(float) @ vector / np.linalg.norm(right.astype(float), axis=1) / np.linalg.norm(vector)
        own = right_keys == key
        found.append(1 + int((cosine[~own] >= cosine[own].max()).sum()))
    return found


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(1, 5), st.integers(1, 40))
def test_as_a_plain_count(seed: int, images: int, captions: int, block_rows: int) -> None:
    rng = np.random.default_rng(seed)
    left = rng.normal(size=(images, 8)).astype(np.float32)
    owners = np.repeat(np.arange(images), captions)
    right = (left[owners] + rng.normal(size=(len(owners), 8))).astype(np.float32)
    order = rng.permutation(len(owners))
    here, there = Items.of(left, np.arange(images)), Items.of(right[order], owners[order])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "BLOCK_BYTES", 4 * len(owners) * block_rows)
        forward, backward = ranks(here, there)
    assert forward.tolist() == plain_ranks(here.vectors, there.vectors, here.keys, there.keys)
    assert backward.tolist() == plain_ranks(there.vectors, here.vectors, there.keys, here.keys)


def test_a_collapsed_model_is_the_worst() -> None:
    """All vectors alike, in dimensions where float32 products differ by where they stand."""
    one = np.random.default_rng(0).normal(size=515).astype(np.float32)
    vectors = np.tile(one, (203, 1))
    found = scores_of(vectors, vectors * 3)
    assert found["image_to_text_r_at_1"] == 0
    assert found["text_to_image_r_at_10"] == 0
    assert found["image_to_text_median_rank"] == 203


def test_a_copy_of_another_item_is_a_tie() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(40, 512)).astype(np.float32)
    vectors[7] = vectors[23]
    found = scores_of(vectors, vectors)
    assert found["image_to_text_r_at_1"] == pytest.approx(38 / 40)
    assert found["text_to_image_r_at_1"] == pytest.approx(38 / 40)
    assert found["image_to_text_r_at_5"] == 1


def test_any_of_several_captions() -> None:
    """A picture that stands in a row for each of its captions is one picture."""
    images = np.eye(4, dtype=np.float32)
    keys = np.repeat(np.arange(4), 3)
    left = images[keys]
    right = np.roll(left, 3, axis=0)
    right[0::3] = images
    found = scores_of(left, right, keys)
    assert found["image_to_text_r_at_1"] == 0
    mild = right + 0.01
    mild[0::3] = images
    assert scores_of(left, mild, keys)["image_to_text_r_at_1"] == 1
    assert scores_of(left, mild, keys)["text_to_image_r_at_1"] == pytest.approx(1 / 3)
    assert len(Items.of(left, keys).keys) == 4


def test_median_and_cutoffs() -> None:
    """Queries whose own item is at rank 1, 1, 2, 3 among them."""
    right = np.eye(4, dtype=np.float32)
    left = np.array([[9, 0, 0, 0], [0, 9, 0, 0], [0, 2, 1, 0], [3, 2, 0, 1]], np.float32)
    found = scores_of(left, right)
    assert found["image_to_text_r_at_1"] == 0.5
    assert found["image_to_text_r_at_5"] == 1
    assert found["image_to_text_median_rank"] == 1


def test_a_missing_vector_is_a_miss() -> None:
    vectors = np.eye(5, dtype=np.float32)
    broken = vectors.copy()
    broken[2] = np.nan
    sides = Items.of(broken, np.arange(5)), Items.of(vectors, np.arange(5))
    answered = np.array([True, True, False, True, True])
    scores = evaluate(NAMES, *sides, answered, NO_INTERVALS)[0]
    assert by_name(scores)["image_to_text_r_at_1"] == 0.8
    assert by_name(scores)["text_to_image_r_at_1"] == 0.8
    assert of_answered(scores)["text_to_image_r_at_1"] == 1


def test_a_miss_is_none_among_few() -> None:
    """With fewer candidates than k, too, a query without a vector, or without anything to find, is no hit."""
    vectors = np.eye(4, dtype=np.float32)
    broken = vectors.copy()
    broken[:3] = np.nan
    sides = Items.of(broken, np.arange(4)), Items.of(vectors, np.arange(4))
    found = by_name(evaluate(NAMES, *sides, np.arange(4) == 3, NO_INTERVALS)[0])
    assert found["image_to_text_r_at_10"] == 0.25
    assert found["text_to_image_r_at_10"] == 0.25
    assert found["text_to_image_median_rank"] == 2
    assert found["image_to_text_median_rank"] == 5
