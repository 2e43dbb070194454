"""Word and character error rates against jiwer's own, and what is made of texts before."""

from __future__ import annotations

import jiwer
import pytest
from evaluation_scores import NO_INTERVALS, by_name, of_answered
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcli.evaluation.bootstrap import Resampling
from mmcli.evaluation.speech import BLOCK, evaluate, plain_text

sentence = st.lists(st.sampled_from(["ask", "not", "what", "your", "country", "can", "do"]), max_size=7).map(
    " ".join
)
spoken = sentence.filter(bool)


@settings(deadline=None)
@given(st.lists(st.tuples(spoken, sentence), min_size=1, max_size=12))
def test_as_jiwer(pairs: list[tuple[str, str]]) -> None:
    true, heard = [t for t, _ in pairs], [h for _, h in pairs]
    found = by_name(evaluate(heard, true, "none", NO_INTERVALS)[0])
    theirs = jiwer.process_words(true, heard)
    words = theirs.hits + theirs.substitutions + theirs.deletions
    assert found["wer"] == pytest.approx(theirs.wer)
    assert found["cer"] == pytest.approx(jiwer.cer(true, heard))
    assert found["substitutions"] == pytest.approx(theirs.substitutions / words)
    assert found["deletions"] == pytest.approx(theirs.deletions / words)
    assert found["insertions"] == pytest.approx(theirs.insertions / words)


def test_of_the_corpus_and_not_of_utterances() -> None:
    found = by_name(evaluate(["a", "x"], ["a b c d e f g h i", "y"], "none", NO_INTERVALS)[0])
    assert found["wer"] == pytest.approx(9 / 10)


def test_more_than_a_block() -> None:
    rows = BLOCK * 2 + 5
    found = by_name(evaluate(["a b"] * rows, ["a c"] * rows, "none", NO_INTERVALS)[0])
    assert found["wer"] == 0.5


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Ask not — what YOUR country can't do.", "ask not what your country can't do"),
        ("don’t  'quote' me", "don't quote me"),
        ("well-known, 3.5%", "well known 3 5"),
        ("नमस्ते!", "नमस्ते"),
        ("ＡＢＣ １２", "abc 12"),
        ("...", ""),
    ],
)
def test_basic_normalisation(text: str, plain: str) -> None:
    assert plain_text(text) == plain


def test_normalisation_is_an_option() -> None:
    heard, true = ["And so, my fellow Americans:"], ["and so my fellow americans"]
    assert by_name(evaluate(heard, true, "basic", NO_INTERVALS)[0])["wer"] == 0
    assert by_name(evaluate(heard, true, "none", NO_INTERVALS)[0])["wer"] == pytest.approx(3 / 5)


def test_no_transcript_is_an_empty_one() -> None:
    scores, _ = evaluate(["a b", None], ["a b", "c d"], "basic", NO_INTERVALS)
    assert by_name(scores)["wer"] == 0.5
    assert by_name(scores)["deletions"] == 0.5
    assert of_answered(scores)["wer"] == 0


def test_silence() -> None:
    """What was heard where nothing was said counts."""
    scores, notes = evaluate(["thank you", "a b"], ["", "a b"], "basic", Resampling(50))
    assert by_name(scores)["wer"] == 1
    assert by_name(scores)["insertions"] == 1
    assert "1 references have no words" in notes[0]
    nothing = by_name(evaluate(["thank you"], [""], "basic", Resampling(50))[0])
    assert nothing["wer"] is None
