"""VQA accuracy: the normalisation and the formula of the VQA challenge (visualqa.org/evaluation.html).

Antol et al. 2015, "VQA: Visual Question Answering"; Goyal et al. 2017 for VQA v2. The challenge's program leaves
annotators' answers as they are when all ten wrote the same; here both sides are always normalised, as its page has
it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mmcli.evaluation.bootstrap import Resampling, Score, ratio, score

# With fewer other annotators than the three that make an answer right, no answer gets 1.
ANNOTATORS = 4

_NUMBERS = {
    "none": 0, "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
    "nine": 9, "ten": 10,
}  # fmt: skip
_ARTICLES = frozenset(["a", "an", "the"])
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_COMMA = re.compile(r"\d,\d")
# As the challenge's program does it: a dot stays where a digit follows.
_DOT = re.compile(r"\.(?!\d)")
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
    we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
    who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
    you'll you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, c in enumerate(word) if c == "'"]


# "dont" -> "don't", "couldn'tve" -> "couldn't've"
_APOSTROPHES = {short: word for word in _CONTRACTIONS.split() for short in _without_one_apostrophe(word)}


@lru_cache(maxsize=1 << 17)
def normalize_answer(text: str) -> str:
    """An answer as the challenge compares it: "The two  dogs!" -> "2 dogs"."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    commas = _DIGITS_COMMA.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        if mark in text:
            gone = commas or f"{mark} " in text or f" {mark}" in text
            cleaned = cleaned.replace(mark, "" if gone else " ")
    words = (str(_NUMBERS.get(word, word)) for word in _DOT.sub("", cleaned).lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(agreeing: int, annotators: int = 10) -> float:
    """Mean over all annotators of min(1, how many of the *others* agree / 3): 1, 2, 3 of 10 give .3, .6, .9."""
    inside, outside = min(1.0, max(agreeing - 1, 0) / 3), min(1.0, agreeing / 3)
    return (agreeing * inside + (annotators - agreeing) * outside) / annotators


def evaluate(
    answers: Sequence[str | None], references: Sequence[Sequence[str]], resampling: Resampling
) -> tuple[list[Score], list[str]]:
    """`vqa_accuracy` where every row has at least 4 references, and `exact_match`: equal to the commonest one.

    None is no answer, and wrong. Returns the scores, and notes on what they leave out.
    """
    rows = np.array([_row(a, refs) for a, refs in zip(answers, references, strict=True)])
    fewest = min(map(len, references))
    names = ["vqa_accuracy", "exact_match"] if fewest >= ANNOTATORS else ["exact_match"]
    stats = rows[:, -len(names) :]
    notes = []
    if fewest < ANNOTATORS:
        notes.append(
            f"no VQA accuracy: it needs {ANNOTATORS} answers of annotators a row (VQA v2 has 10), and some rows "
            f"have {fewest}; exact_match compares with the commonest"
        )

    def statistic(weights: np.ndarray) -> np.ndarray:
        return ratio(weights @ stats, weights.sum())

    answered = np.array([a is not None for a in answers])
    return score(names, statistic, answered, resampling), notes


def _row(answer: str | None, references: Sequence[str]) -> tuple[float, float]:
    if answer is None:
        return 0.0, 0.0
    counts = Counter(map(normalize_answer, references))
    agreeing = counts[normalize_answer(answer)]
    return vqa_accuracy(agreeing, len(references)), float(agreeing == max(counts.values()))
