"""Diagnostics of predictors whose answers are known, and against counts over everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcli.core.errors import ModelError
from mmcli.evaluation import diagnostics
from mmcli.evaluation.bootstrap import Resampling
from mmcli.evaluation.diagnostics import Diagnosis, DiagnosticOptions, Predict, Rows, diagnose

NO_INTERVALS = DiagnosticOptions(Resampling(replicates=0), permutations=4, additive_rows=64)
SOME = replace(NO_INTERVALS, resampling=Resampling(replicates=200))
NAMES = ("image", "text", "audio")
# What a predictor is told of one modality of each row: a number, or None where it does not see it.
Rule = Callable[[list[Any]], list[float]]


def predictor(features: np.ndarray, rule: Rule) -> Predict:
    """`features` [n, M]: what row n's modality m is."""

    def predict(indices: np.ndarray, present: np.ndarray) -> np.ndarray:
        assert indices.shape == present.shape
        assert indices.dtype == np.int64
        seen = np.take_along_axis(features, indices, axis=0)
        return np.array(
            [
                rule([v if p else None for v, p in zip(row, there, strict=True)])
                for row, there in zip(seen.tolist(), present.tolist(), strict=True)
            ],
            np.float32,
        )

    return predict


def table(seed: int, shape: tuple[int, ...]) -> Predict:
    """Random logits for each combination of up to four values, None being the last of each modality."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(*[5] * shape[1], 3))
    features = rng.integers(0, 4, shape)
    return predictor(features, lambda row: list(logits[tuple(4 if v is None else v for v in row)]))


def xor(row: list[Any]) -> list[float]:
    """Right with both; undecided for class 0 with one alone."""
    if None in row:
        return [0.0, 0.0]
    answer = float(row[0] != row[1])
    return [1 - answer, answer]


def bits(rows: int = 400) -> np.ndarray:
    """All four combinations, equally often."""
    return np.array(list(product((0, 1), repeat=2)) * (rows // 4))


def value(measured: Any) -> float:
    assert measured.value is not None
    return float(measured.value)


# What is known ---------------------------------------------------------------------------------------------------


def test_xor_needs_both() -> None:
    features = bits()
    truth = (features[:, 0] != features[:, 1]).astype(np.int64)
    found = diagnose(predictor(features, xor), Rows(NAMES[:2], truth), replace(SOME, additive_rows=400))
    assert value(found.accuracy) == 1
    for one in found.modalities:
        assert value(one.alone) == value(one.masked) == 0.5
        assert value(one.drop) == 0.5
        assert value(one.permuted) == pytest.approx(0.5, abs=0.05)
        assert value(one.share) == pytest.approx(0.5, abs=0.05)
    assert value(found.ensemble) == 0.5
    assert value(found.joint) == 0.5
    # The additive projection of XOR is a constant: one class for every row.
    assert value(found.additive.projected) == 0.5
    assert found.additive.gain.above_zero
    assert (found.leans_on, found.undecided) == (None, False)


@pytest.mark.parametrize("modalities", [2, 3])
def test_an_additive_model_is_its_own_projection(modalities: int) -> None:
    rng = np.random.default_rng(3)
    weights = rng.normal(size=(modalities, 4, 5))
    features = rng.integers(0, 4, (60, modalities))

    def rule(row: list[Any]) -> list[float]:
        return list(sum(np.zeros(5) if v is None else weights[m, v] for m, v in enumerate(row)))

    predict = predictor(features, rule)
    truth = rng.integers(0, 5, 60)
    asked = diagnostics._Asked(predict, Rows(NAMES[:modalities], truth))
    own = asked.logits(asked.own, np.ones(asked.own.shape, bool))
    rows = np.arange(60)
    if modalities == 2:
        projected = diagnostics._pairs(asked, rows)
    else:
        projected = diagnostics._anchored(
            asked, rows, np.stack([rng.permutation(60)[:7] for _ in range(3)], axis=1)
        )
    np.testing.assert_allclose(projected, own, atol=1e-6)
    additive = diagnose(predict, Rows(NAMES[:modalities], truth), replace(NO_INTERVALS, additive_rows=60)).additive
    assert value(additive.projected) == value(additive.accuracy)
    assert value(additive.gain) == 0


def test_what_is_ignored_is_seen() -> None:
    """Both tell the class, the model reads the text alone."""
    truth = np.arange(300) % 3
    features = np.stack([truth, truth], axis=1)

    def rule(row: list[Any]) -> list[float]:
        return [float(row[1] == c) for c in range(3)]

    found = diagnose(predictor(features, rule), Rows(("image", "text"), truth), SOME)
    assert found.leans_on == "text"
    image, text = found.modalities
    assert value(image.perceptual) == value(image.drop) == 0
    assert not image.over_commonest.above_zero
    assert value(text.share) == 1
    assert value(text.perceptual) == pytest.approx(2 / 3, abs=0.05)
    assert value(text.normalised) == value(text.perceptual)
    assert value(text.drop) == pytest.approx(2 / 3)


def test_an_open_question_is_left_open() -> None:
    """The answer follows each modality on some rows: text on 16 of 24, where its permutation costs half of them."""
    truth = np.arange(24) % 2
    by_text = np.arange(24) % 3 > 0
    features = np.stack([truth + 2 * by_text, truth], axis=1)

    def rule(row: list[Any]) -> list[float]:
        image, text = row
        if image is None or text is None:
            return [1.0, 0.0]
        answer = text if image >= 2 else image
        return [1.0 - answer, float(answer)]

    found = diagnose(predictor(features, rule), Rows(("image", "text"), truth), SOME)
    assert value(found.accuracy) == 1
    assert (found.leans_on, found.undecided) == (None, True)


def test_a_model_that_looks_at_nothing() -> None:
    truth = np.array([0, 0, 0, 1])
    predict = predictor(np.zeros((4, 2), int), lambda row: [1.0, 0.0])
    found = diagnose(predict, Rows(NAMES[:2], truth), SOME)
    assert value(found.accuracy) == value(found.commonest) == 0.75
    assert (found.leans_on, found.undecided) == (None, False)
    assert found.modalities[0].share.value is None


def test_accuracy_under_missing_modalities() -> None:
    """Right if and only if the text is there: 1 - q (1 - q) - q^2 / 2, the rows that keep it."""
    truth = np.ones(40, np.int64)
    predict = predictor(np.zeros((40, 2), int), lambda row: [0.5, float(row[1] is not None)])
    found = diagnose(predict, Rows(("image", "text"), truth), SOME)
    for one in found.missing:
        q = one.rate
        assert value(one.accuracy) == pytest.approx(1 - q * (1 - q) - q * q / 2)
        assert one.missing == pytest.approx(q - q * q / 2)
    assert [one.rate for one in found.missing] == [0, 0.1, 0.3, 0.5, 0.7]


# Against counts over everything -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(2, 3), st.integers(1, 40))
def test_as_counted_row_by_row(seed: int, modalities: int, block: int) -> None:
    """Rows that lack modalities, in blocks of any size: subsets, permutations, the ensemble, missing rates."""
    rng = np.random.default_rng(seed)
    rows = 17
    predict = table(seed, (rows, modalities))
    truth = rng.integers(0, 3, rows)
    there = rng.random((rows, modalities)) < 0.7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnostics, "BLOCK_ROWS", block)
        found = diagnose(predict, Rows(NAMES[:modalities], truth, there), NO_INTERVALS)
    again = diagnose(predict, Rows(NAMES[:modalities], truth, there), NO_INTERVALS)
    assert found == again

    def logits(row: int, seen: Any, own: Any = None) -> np.ndarray:
        indices = np.full((1, modalities), row) if own is None else np.array([own])
        return predict(indices, np.array([seen]) & there[row])[0]

    def share(seen: Any) -> float:
        return float(np.mean([logits(r, seen).argmax() == truth[r] for r in range(rows)]))

    everything = np.ones(modalities, bool)
    assert value(found.accuracy) == pytest.approx(share(everything))
    for m, one in enumerate(found.modalities):
        assert one.rows == there[:, m].sum()
        only = np.arange(modalities) == m
        assert value(one.alone) == pytest.approx(share(only))
        assert value(one.masked) == pytest.approx(share(~only))
    assert value(found.ensemble) == pytest.approx(plain_ensemble(logits, truth, there))
    drawn = plain_missing(logits, truth, there, 0.3)
    assert value(found.missing[2].accuracy) == pytest.approx(drawn)


def plain_ensemble(logits: Any, truth: np.ndarray, there: np.ndarray) -> float:
    right = []
    for row, having in enumerate(there):
        single = [logits(row, np.arange(len(having)) == m).astype(float) for m in np.flatnonzero(having)]
        logs = [one - np.log(np.exp(one).sum()) for one in single]
        answer = np.mean(logs, axis=0) if logs else logits(row, np.zeros(len(having), bool))
        right.append(answer.argmax() == truth[row])
    return float(np.mean(right))


def plain_missing(logits: Any, truth: np.ndarray, there: np.ndarray, rate: float) -> float:
    """All ways to be missing, one after the other."""
    total = 0.0
    for row, having in enumerate(there):
        places = np.flatnonzero(having)
        for gone in product((False, True), repeat=len(places)):
            chance = np.prod([rate if g else 1 - rate for g in gone])
            kept = [p for p, g in zip(places, gone, strict=True) if not g]
            for last in [kept] if kept or not len(places) else [[p] for p in places]:
                seen = np.isin(np.arange(len(having)), last)
                part = 1 if kept or not len(places) else 1 / len(places)
                total += chance * part * (logits(row, seen).argmax() == truth[row])
    return total / len(truth)


def test_the_projection_of_pairs() -> None:
    """Hessel & Lee 2020, term by term."""
    rows, predict = 23, table(5, (23, 2))
    asked = diagnostics._Asked(predict, Rows(NAMES[:2], np.zeros(rows, np.int64)))
    every = np.array(
        [[predict(np.array([[a, b]]), np.ones((1, 2), bool))[0] for b in range(rows)] for a in range(rows)]
    )
    plain = [every[i].mean(axis=0) + every[:, i].mean(axis=0) - every.mean(axis=(0, 1)) for i in range(rows)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnostics, "BLOCK_ROWS", 100)
        np.testing.assert_allclose(diagnostics._pairs(asked, np.arange(rows)), plain, atol=1e-6)


def test_the_projection_of_three_tends_to_the_whole() -> None:
    """With all combinations as partners it is the projection over all n^3."""
    rows = 5
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(rows, rows, rows, 2))
    identity = np.tile(np.arange(rows)[:, None], (1, 3))
    predict = predictor(identity, lambda row: list(logits[tuple(row)]))
    asked = diagnostics._Asked(predict, Rows(NAMES, np.zeros(rows, np.int64)))
    others = np.array(list(product(range(rows), repeat=3)))
    plain = [
        logits[i].mean(axis=(0, 1)) + logits[:, i].mean(axis=(0, 1)) + logits[:, :, i].mean(axis=(0, 1))
        - 2 * logits.mean(axis=(0, 1, 2))
        for i in range(rows)
    ]  # fmt: skip
    np.testing.assert_allclose(diagnostics._anchored(asked, np.arange(rows), others), plain, atol=1e-6)


def test_permutations_are_among_rows_that_have_it() -> None:
    """Their mean tends to the mean over all pairs; a row without the modality stays without it."""
    rng = np.random.default_rng(2)
    rows, predict = 30, table(9, (30, 2))
    truth = rng.integers(0, 3, rows)
    there = np.ones((rows, 2), bool)
    there[::5, 1] = False
    options = replace(NO_INTERVALS, permutations=2000)
    found = value(diagnose(predict, Rows(NAMES[:2], truth, there), options).modality("text").permuted)
    having = np.flatnonzero(there[:, 1])
    right = []
    for row in range(rows):
        partners = having if there[row, 1] else [row]
        pairs = np.array([[row, other] for other in partners])
        right.append((predict(pairs, np.tile(there[row], (len(pairs), 1))).argmax(axis=1) == truth[row]).mean())
    assert found == pytest.approx(np.mean(right), abs=0.01)


@pytest.mark.parametrize(("rows", "modalities"), [(9, 2), (90, 2), (90, 3), (5000, 2)])
def test_how_much_is_asked(rows: int, modalities: int) -> None:
    asked = 0

    def predict(indices: np.ndarray, present: np.ndarray) -> np.ndarray:
        nonlocal asked
        asked += len(indices)
        return np.zeros((len(indices), 2))

    diagnose(predict, Rows(NAMES[:modalities], np.zeros(rows, np.int64)), NO_INTERVALS)
    assert asked == diagnostics.answers_needed(rows, modalities, NO_INTERVALS)


@pytest.mark.parametrize("rows", [20, 300, 2000])
def test_after_training_the_answers_are_few(rows: int) -> None:
    """At most 24 for each row of two modalities; it is told how far it is, to the last."""
    options = replace(DiagnosticOptions.affordable(rows), resampling=Resampling(replicates=0))
    needed = diagnostics.answers_needed(rows, 2, options)
    assert needed <= 24 * rows
    predict, told = table(1, (rows, 2)), list[tuple[int, int]]()
    given = Rows(NAMES[:2], np.arange(rows) % 3, drawn_from=5 * rows)
    found = diagnose(predict, given, options, lambda done, of: told.append((done, of)))
    assert told[-1] == (needed, needed)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert all(later[0] - sooner[0] <= diagnostics.BLOCK_ROWS for sooner, later in pairwise(told))
    assert (found.rows, found.drawn_from) == (rows, 5 * rows)


def test_the_seed_decides() -> None:
    predict, rows = table(1, (50, 2)), Rows(NAMES[:2], np.random.default_rng(1).integers(0, 3, 50))
    by_seed = [diagnose(predict, rows, replace(SOME, resampling=Resampling(50, seed))) for seed in (0, 0, 1)]
    assert by_seed[0] == by_seed[1]
    assert by_seed[0].modalities != by_seed[2].modalities


def test_intervals_are_paired() -> None:
    """Where masking changes no answer, the drop is 0 in every sample, though accuracy varies."""
    rng = np.random.default_rng(4)
    truth = rng.integers(0, 2, 100)
    features = np.stack([np.zeros(100, int), np.where(rng.random(100) < 0.7, truth, 1 - truth)], axis=1)
    predict = predictor(features, lambda row: [float(row[1] == 0), float(row[1] == 1)])
    found: Diagnosis = diagnose(predict, Rows(("image", "text"), truth), SOME)
    assert found.accuracy.low is not None
    assert found.accuracy.high is not None
    assert found.accuracy.low < value(found.accuracy) < found.accuracy.high
    assert found.modality("image").drop == diagnostics.Measured(0.0, 0.0, 0.0)


def test_validation_scores() -> None:
    """As they are in plain numpy; accuracy, and its interval, twice the same."""
    rng = np.random.default_rng(6)
    logits, truth = rng.normal(size=(80, 4)), rng.integers(0, 4, 80)
    predict = predictor(np.tile(np.arange(80)[:, None], (1, 2)), lambda row: list(logits[row[0] or 0]))
    found = diagnose(predict, Rows(NAMES[:2], truth), SOME)
    scores = {one.name: one for one in found.validation}
    one = scores["accuracy"]
    assert (one.value, one.low, one.high) == (found.accuracy.value, found.accuracy.low, found.accuracy.high)
    right = logits.argmax(axis=1) == truth
    assert scores["mean_per_class"].value == pytest.approx(np.mean([right[truth == c].mean() for c in range(4)]))
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert scores["nll"].value == pytest.approx(-np.log(chances[np.arange(80), truth]).mean(), abs=1e-6)


# What cannot be -------------------------------------------------------------------------------------------------


def test_numbers_that_are_none() -> None:
    predict = predictor(np.arange(12).reshape(6, 2), lambda row: [float("nan") if row[0] == 4 else 0.0, 1.0])
    with pytest.raises(ModelError, match="validation row 2"):
        diagnose(predict, Rows(NAMES[:2], np.zeros(6, np.int64)), NO_INTERVALS)


@pytest.mark.parametrize(("names", "rows"), [(("image",), 3), (("image", "text"), 0)])
def test_too_little(names: tuple[str, ...], rows: int) -> None:
    with pytest.raises(ValueError, match=r"modalities|no rows"):
        diagnose(table(0, (3, 2)), Rows(names, np.zeros(rows, np.int64)), NO_INTERVALS)
