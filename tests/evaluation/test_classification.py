"""Classes: against scikit-learn, and the calibration error against its formula written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from evaluation_scores import NO_INTERVALS, by_name, of_answered
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from mmcli.evaluation import multilabel
from mmcli.evaluation.bootstrap import Resampling
from mmcli.evaluation.classification import BINS, Predictions, evaluate

NONE = "\x00none"
classes = st.sampled_from(["cat", "dog", "bird", "fish", "mouse"])


def found(rows: Predictions) -> dict[str, float | None]:
    return by_name(evaluate(rows, NO_INTERVALS)[0])


@settings(deadline=None)
@given(st.lists(st.tuples(classes, st.none() | classes), min_size=1, max_size=40))
def test_as_scikit_learn(pairs: list[tuple[str, str | None]]) -> None:
    truth, labels = [t for t, _ in pairs], [p for _, p in pairs]
    scores, details, _ = evaluate(Predictions(labels, truth), NO_INTERVALS)
    values = by_name(scores)
    # For scikit-learn, no answer is one more label, which is no class.
    answers = [NONE if p is None else p for p in labels]
    names = sorted(set(truth) | set(answers) - {NONE})
    of_classes: dict[str, Any] = {"labels": names, "average": "macro", "zero_division": 0}
    assert values["accuracy"] == pytest.approx(metrics.accuracy_score(truth, answers))
    true_names = sorted(set(truth))
    recall = metrics.recall_score(truth, answers, labels=true_names, average="macro", zero_division=0)
    assert values["mean_per_class"] == pytest.approx(recall)
    assert values["macro_f1"] == pytest.approx(metrics.f1_score(truth, answers, **of_classes))
    f1 = metrics.f1_score(truth, answers, labels=names, average=None, zero_division=0)
    assert [c["class"] for c in details["classes"]] == names
    assert [c["f1"] for c in details["classes"]] == pytest.approx(list(f1))
    matrix = metrics.confusion_matrix(truth, answers, labels=[*names, NONE])[:-1]
    assert details["confusion"]["matrix"] == matrix.tolist()


def random_rows(rows: int, size: int, seed: int = 0) -> tuple[Predictions, np.ndarray, np.ndarray, list[str]]:
    """Probabilities float32 [rows, size], and who is right int [rows]."""
    rng = np.random.default_rng(seed)
    names = [f"c{i}" for i in range(size)]
    truth = rng.integers(0, size, rows)
    logits = rng.normal(size=(rows, size))
    logits[np.arange(rows), truth] += 1.5
    p = np.exp(1.7 * logits)
    p = (p / p.sum(1, keepdims=True)).astype(np.float32)
    order = np.argsort(-p, axis=1)
    predictions = Predictions(
        labels=[names[i] for i in order[:, 0]],
        truth=[names[i] for i in truth],
        scores=[float(p[i, best]) for i, best in enumerate(order[:, 0])],
        top_k=[[(names[j], float(p[i, j])) for j in order[i]] for i in range(rows)],
    )
    return predictions, p, truth, names


def test_scores_of_all_classes_as_scikit_learn() -> None:
    rows, p, truth, names = random_rows(500, 9)
    values = found(rows)
    assert values["top_5"] == pytest.approx(metrics.top_k_accuracy_score(truth, p, k=5, labels=range(9)))
    wide = p.astype(float) / p.astype(float).sum(1, keepdims=True)
    assert values["nll"] == pytest.approx(metrics.log_loss(truth, wide, labels=range(9)), abs=1e-5)
    brier = float(((wide - np.eye(9)[truth]) ** 2).sum(1).mean())
    assert values["brier"] == pytest.approx(brier, abs=1e-5)
    assert names[0] == "c0"


def test_calibration_error_by_its_formula() -> None:
    rows, p, truth, _ = random_rows(700, 4, seed=3)
    confidence, right = p.max(1).astype(float), p.argmax(1) == truth
    total = 0.0
    for i in range(BINS):
        inside = (confidence > i / BINS) & (confidence <= (i + 1) / BINS)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    scores, details, _ = evaluate(rows, NO_INTERVALS)
    assert by_name(scores)["ece"] == pytest.approx(total)
    bins = details["calibration"]
    assert sum(b["rows"] for b in bins) == 700
    assert sum(b["rows"] * abs(b["accuracy"] - b["confidence"]) for b in bins if b["rows"]) / 700 == pytest.approx(
        total
    )


def test_calibration_of_the_sure_and_the_wrong() -> None:
    sure = Predictions(["a", "b"], ["a", "b"], scores=[1.0, 1.0])
    assert found(sure)["ece"] == 0
    wrong = Predictions(["a", "b"], ["b", "a"], scores=[1.0, 1.0])
    assert found(wrong)["ece"] == 1
    half = Predictions(["a", "a"], ["a", "b"], scores=[0.9, 0.9])
    assert found(half)["ece"] == pytest.approx(0.4)


def test_scores_that_are_no_probabilities() -> None:
    scores, details, notes = evaluate(Predictions(["a"], ["a"], scores=[17.3]), NO_INTERVALS)
    assert "ece" not in by_name(scores)
    assert "calibration" not in details
    assert "the scores go from 17.3 to 17.3" in notes[0]


def test_top_5_needs_five() -> None:
    rows = Predictions(["a"], ["b"], top_k=[[("a", 0.6), ("b", 0.4)]])
    scores, _, notes = evaluate(rows, NO_INTERVALS)
    assert "top_5" not in by_name(scores)
    assert any("no top-5" in note for note in notes)


def test_no_answer_is_wrong() -> None:
    rows = Predictions(["a", None, "b", None], ["a", "a", "b", "b"], scores=[0.9, None, 0.8, None])
    scores, details, _ = evaluate(rows, NO_INTERVALS)
    assert by_name(scores)["accuracy"] == 0.5
    assert of_answered(scores)["accuracy"] == 1
    # The calibration is that of the answers.
    assert by_name(scores)["ece"] == of_answered(scores)["ece"] == pytest.approx(0.15)
    assert details["confusion"]["matrix"] == [[1, 0, 1], [0, 1, 1]]
    assert [c["precision"] for c in details["classes"]] == [1, 1]


def test_labels_spelt_otherwise() -> None:
    _, _, notes = evaluate(Predictions(["Cat", "Dog"], ["cat", "dog"]), NO_INTERVALS)
    assert "answered is e.g. 'Cat', true is e.g. 'cat'" in notes[0]


def test_intervals_cover_the_truth() -> None:
    """Of 60 samples with a known accuracy of 0.7, the 95 % intervals hold it in most."""
    held = 0
    for seed in range(60):
        right = np.random.default_rng(seed).random(120) < 0.7
        rows = Predictions(["a" if r else "b" for r in right], ["a"] * 120)
        accuracy = evaluate(rows, Resampling(200, seed))[0][0]
        assert accuracy.low is not None
        assert accuracy.high is not None
        held += accuracy.low <= 0.7 <= accuracy.high
    assert 50 <= held <= 60


def test_many_classes_have_no_matrix() -> None:
    names = [f"c{i}" for i in range(1001)]
    _, details, _ = evaluate(Predictions(names[::-1], names), NO_INTERVALS)
    assert details["confusion"]["matrix"] is None
    assert len(details["confusion"]["mistakes"]) == 100


several = st.frozensets(st.sampled_from("abcde"), max_size=4)


@settings(deadline=None)
@given(st.lists(st.tuples(several, st.none() | several), min_size=1, max_size=30))
def test_several_classes_as_scikit_learn(pairs: list[tuple[frozenset[str], frozenset[str] | None]]) -> None:
    truth, labels = [sorted(t) for t, _ in pairs], [None if p is None else sorted(p) for _, p in pairs]
    scores, details, _ = multilabel.evaluate(labels, truth, None, NO_INTERVALS)
    names = sorted({name for one in [*truth, *labels] for name in one or ()})
    true = np.array([[name in t for name in names] for t in truth], bool).reshape(len(truth), -1)
    answered = np.array([[name in (p or ()) for name in names] for p in labels], bool).reshape(len(truth), -1)
    values = by_name(scores)
    exact = (true == answered).all(1) & [p is not None for p in labels]
    assert values["exact_match"] == pytest.approx(float(exact.mean()))
    if names:
        each = [metrics.f1_score(t, a, zero_division=0) for t, a in zip(true.T, answered.T, strict=True)]
        assert values["micro_f1"] == pytest.approx(
            metrics.f1_score(true.ravel(), answered.ravel(), zero_division=0)
        )
        assert values["macro_f1"] == pytest.approx(np.mean(each))
        assert [c["f1"] for c in details["classes"]] == pytest.approx(each)
        assert [c["support"] for c in details["classes"]] == true.sum(0).tolist()
    else:
        assert values["micro_f1"] is None


def test_mean_average_precision_as_scikit_learn() -> None:
    rng = np.random.default_rng(5)
    names = list("abcd")
    p = rng.random((60, 4)).round(1)
    true = rng.random((60, 4)) < 0.3
    top_k = [[(n, float(s)) for n, s in zip(names, row, strict=True)] for row in p]
    labels = [[n for n, s in row if s > 0.5] for row in top_k]
    truth = [[n for n, t in zip(names, row, strict=True) if t] for row in true]
    scores, _, notes = multilabel.evaluate(labels, truth, top_k, Resampling(20))
    theirs = metrics.average_precision_score(true, p, average="macro")
    assert by_name(scores)["mean_average_precision"] == pytest.approx(theirs)
    assert notes == []
    short = [row[:3] for row in top_k]
    assert "mean_average_precision" not in by_name(multilabel.evaluate(labels, truth, short, NO_INTERVALS)[0])
