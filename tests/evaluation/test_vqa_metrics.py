"""The VQA challenge's accuracy: its agreement table, and its normalisation as its program gives it, recorded."""

from __future__ import annotations

import pytest
from evaluation_scores import NO_INTERVALS, by_name, of_answered

from mmcli.evaluation.vqa import evaluate, normalize_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("agreeing", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (5, 1), (9, 1), (10, 1)]
)
def test_agreement_of_ten(agreeing: int, accuracy: float) -> None:
    assert vqa_accuracy(agreeing) == pytest.approx(accuracy)
    answers = ["Two"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    scores, notes = evaluate(["2."], [answers], NO_INTERVALS)
    assert by_name(scores)["vqa_accuracy"] == pytest.approx(accuracy)
    assert notes == []


# VQAEval.processDigitArticle(VQAEval.processPunctuation(text.strip())) of the challenge's program.
@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The dog", "dog"),
        ("A  red, BIG dog!", "red big dog"),
        ("two", "2"),
        ("none", "0"),
        ("twenty", "twenty"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("it's", "it's"),
        ("T-shirt", "t shirt"),
        ("t- shirt", "t shirt"),
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),
        ("2.5", "2.5"),
        ("U.S.", "us"),
        ("3:30 p.m.", "3:30 pm"),
        ("red/blue", "red blue"),
        ("red/ blue", "red blue"),
        ("(yes)", "yes"),
        ("a\nb", "b"),
        ("the", ""),
        ("oclock", "o'clock"),
        ("somebodys", "somebody's"),
    ],
)
def test_normalisation(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


def test_rows_without_an_answer_are_wrong() -> None:
    scores, _ = evaluate(["yes", None], [["yes"] * 10, ["no"] * 10], NO_INTERVALS)
    assert by_name(scores) == {"vqa_accuracy": 0.5, "exact_match": 0.5}
    assert of_answered(scores) == {"vqa_accuracy": 1, "exact_match": 1}


def test_the_commonest_answer() -> None:
    three = [["red", "Red", "blue"]] * 3
    scores, notes = evaluate(["red", "blue", "A RED!"], three, NO_INTERVALS)
    assert by_name(scores) == {"exact_match": pytest.approx(2 / 3)}
    assert "no VQA accuracy" in notes[0]
    assert "some rows have 3" in notes[0]
