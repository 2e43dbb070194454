"""BLEU, ROUGE-L and CIDEr against the numbers of coco-caption, nlg-eval and sacrebleu."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from evaluation_scores import NO_INTERVALS, by_name, of_answered
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcli.evaluation.bootstrap import Resampling
from mmcli.evaluation.captions import NAMES, caption_statistics, evaluate
from mmcli.evaluation.tokens import whitespace_tokens

CAPTIONS = [
    "two cat a over the sits",
    "red the cat blue sits a sits two on",
    "sits",
    "the red blue blue",
    "over red sits on dog sits a a red",
]
REFERENCES = [
    ["ball two dog blue red over", "sits ball", "runs blue two the cat runs", "two cat two"],
    ["sits mat dog runs sits sits cat over two"],
    ["a runs", "blue cat on a ball red the a", "the blue cat mat the", "cat blue the cat sits runs two on"],
    [
        "the red blue blue",
        "over red blue the ball sits dog the",
        "two on runs cat mat two on sits cat",
        "the on a a red red dog",
    ],
    ["a the"],
]
# pycocoevalcap 1.2: Bleu(4), Rouge(), Cider() of the above, split at blanks.
EXPECTED = [
    0.517241379292509,
    0.2936101097461727,
    0.20504412814922438,
    0.15235457744991468,
    0.44129538693770815,
    0.9420808617222102,
]


def values(captions: list[str | None], references: list[list[str]]) -> list[float]:
    scores, _ = evaluate(captions, references, whitespace_tokens, NO_INTERVALS)
    return list(map(float, by_name(scores).values()))  # type: ignore[arg-type]


def test_the_numbers_of_nlg_eval(shared_data: Path) -> None:
    """nlg-eval's example, whose numbers its tests hold; they are pycocoevalcap's, too."""
    folder = shared_data / "captions"
    expected = json.loads((folder / "nlgeval_expected.json").read_text())
    captions, *references = (
        (folder / f"nlgeval_{name}.txt").read_text().lower().splitlines() for name in ("hyp", "ref1", "ref2")
    )
    scores, _ = evaluate(captions, list(zip(*references, strict=True)), whitespace_tokens, NO_INTERVALS)
    found = by_name(scores)
    names = {f"bleu_{n}": f"Bleu_{n}" for n in (1, 2, 3, 4)} | {"rouge_l": "ROUGE_L", "cider": "CIDEr"}
    assert found == pytest.approx({name: expected[theirs] for name, theirs in names.items()}, abs=1e-6)


def test_the_numbers_of_pycocoevalcap() -> None:
    assert values(list(CAPTIONS), REFERENCES) == pytest.approx(EXPECTED, abs=1e-12)


words = st.sampled_from(["a", "the", "red", "dog", "cat", "ball", "on"])
sentence = st.lists(words, min_size=1, max_size=9).map(" ".join)
corpus = st.lists(st.tuples(sentence, st.lists(sentence, min_size=1, max_size=4)), min_size=1, max_size=8)


@settings(deadline=None)
@given(corpus)
def test_bleu_is_that_of_sacrebleu(rows: list[tuple[str, list[str]]]) -> None:
    found = values([caption for caption, _ in rows], [refs for _, refs in rows])
    most = max(len(refs) for _, refs in rows)
    streams = [[refs[i] if i < len(refs) else None for _, refs in rows] for i in range(most)]
    for order in (1, 2, 3, 4):
        bleu = sacrebleu.BLEU(tokenize="none", smooth_method="none", max_ngram_order=order, force=True)
        theirs = bleu.corpus_score([caption for caption, _ in rows], streams).score / 100  # type: ignore[arg-type]
        # Without any match of an order they say 0; coco-caption has 1e-15 matches of 1e-9 n-grams at least.
        assert found[order - 1] == pytest.approx(theirs, abs=0.032 if theirs == 0 else 1e-7)


@settings(deadline=None)
@given(corpus, st.randoms())
def test_the_order_of_references_is_nothing(rows: list[tuple[str, list[str]]], random: object) -> None:
    captions, references = [c for c, _ in rows], [refs for _, refs in rows]
    turned = [refs[::-1] for refs in references]
    assert values(list(captions), references) == pytest.approx(values(list(captions), turned), abs=1e-12)


@settings(deadline=None)
@given(corpus, st.data())
def test_weights_are_repeated_rows(rows: list[tuple[str, list[str]]], data: st.DataObject) -> None:
    """A resample's BLEU and ROUGE-L are those of its rows; CIDEr keeps its document frequencies."""
    times = data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)).filter(any))
    repeated = [row for row, n in zip(rows, times, strict=True) for _ in range(n)]
    statistics = caption_statistics([c for c, _ in rows], [r for _, r in rows], whitespace_tokens)
    found = statistics.scores(np.array(times, float))
    again = caption_statistics([c for c, _ in repeated], [r for _, r in repeated], whitespace_tokens)
    assert found[:5] == pytest.approx(again.scores(np.ones(len(repeated)))[:5], abs=1e-12)
    assert found[5] == pytest.approx(np.average(statistics.cider, weights=times), abs=1e-12)


def test_no_caption_is_an_empty_one() -> None:
    captions = [*CAPTIONS[:4], None]
    scores, _ = evaluate(captions, REFERENCES, whitespace_tokens, NO_INTERVALS)
    assert by_name(scores) == by_name(evaluate([*CAPTIONS[:4], ""], REFERENCES, whitespace_tokens, NO_INTERVALS)[0])
    answered = of_answered(scores)
    assert all(float(by_name(scores)[name] or 0) < float(answered[name] or 0) for name in NAMES)
    only = values(list(CAPTIONS[:4]), REFERENCES[:4])
    assert list(answered.values())[:5] == pytest.approx(only[:5])


def test_a_single_picture() -> None:
    scores, notes = evaluate(["a red dog"], [["a red dog"]], whitespace_tokens, NO_INTERVALS)
    found = by_name(scores)
    assert found["cider"] == 0
    assert found["rouge_l"] == 1
    assert "CIDEr of a single image is 0" in notes[0]


def test_nothing_in_common() -> None:
    found = values(["x", "y y"], [["a b"], ["c d", "e"]])
    assert found == pytest.approx([0] * 6, abs=1e-4)


def test_intervals_hold_the_value() -> None:
    scores, _ = evaluate(list(CAPTIONS), REFERENCES, whitespace_tokens, Resampling(300, 1))
    for one in scores:
        assert one.value is not None
        assert one.low is not None
        assert one.high is not None
        assert one.low <= one.value <= one.high
        assert one.high > one.low
