"""Word and character error rates, by jiwer: edits of the corpus over words of the corpus, no mean of utterances."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from mmcli.evaluation.bootstrap import Resampling, Score, ratio, score

NAMES = ("wer", "cer", "substitutions", "deletions", "insertions", "exact_match")
# jiwer is given so many utterances at a time: its alignments are Python objects.
BLOCK = 1024
_APOSTROPHES = re.compile("[’ʼ＇]")
# An apostrophe within a word belongs to it: don't and dont differ.
_LONE_APOSTROPHE = re.compile(r"(?<!\w)'|'(?!\w)")


def plain_text(text: str) -> str:
    """Lower case, NFKC, one blank between words, and of punctuation only apostrophes within words.

    "Ask not — what YOUR country can't do." -> "ask not what your country can't do". Numbers stay as written.
    """
    text = _APOSTROPHES.sub("'", unicodedata.normalize("NFKC", text).lower())
    # Letters, their marks and digits: \w lacks the marks that Indic scripts write vowels with.
    text = "".join(c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return " ".join(_LONE_APOSTROPHE.sub(" ", text).split())


def same_text(text: str) -> str:
    """As it is, but for blanks around it and more than one between words, which jiwer does not count either."""
    return " ".join(text.split())


# --normalize
NORMALIZERS = {"basic": plain_text, "none": same_text}


def evaluate(
    transcripts: Sequence[str | None], references: Sequence[str], normalizer: str, resampling: Resampling
) -> tuple[list[Score], list[str]]:
    """NAMES, and notes; None, no transcript, counts as an empty one: every word deleted.

    Substitutions, deletions and insertions are shares of the reference's words, and add up to the WER.
    """
    normalize = NORMALIZERS[normalizer]
    spoken = [normalize(t or "") for t in transcripts]
    true = [normalize(r) for r in references]
    words, characters = edits(true, spoken)
    same = np.array([a == b for a, b in zip(true, spoken, strict=True)], float)

    def statistic(weights: np.ndarray) -> np.ndarray:
        *each, total = weights @ words
        rates = ratio([sum(each), *each], total)
        *each, total = weights @ characters
        return np.array([rates[0], ratio(sum(each), total), *rates[1:], ratio(weights @ same, weights.sum())])

    answered = np.array([t is not None for t in transcripts])
    silent = sum(not t for t in true)
    notes = [f"{silent:,} references have no words; what was heard there counts as insertions"] if silent else []
    return score(NAMES, statistic, answered, resampling), notes


def edits(references: Sequence[str], transcripts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of each utterance: substitutions, deletions, insertions, length of the reference; in words, in characters.

    Two float64 [n, 4].
    """
    import jiwer

    return _counts(jiwer.process_words, references, transcripts), _counts(
        jiwer.process_characters, references, transcripts
    )


def _counts(process: object, references: Sequence[str], transcripts: Sequence[str]) -> np.ndarray:
    rows = []
    for start in range(0, len(references), BLOCK):
        done = process(list(references[start : start + BLOCK]), list(transcripts[start : start + BLOCK]))  # type: ignore[operator]
        for reference, chunks in zip(done.references, done.alignments, strict=True):
            counts = {"equal": 0, "substitute": 0, "delete": 0, "insert": 0}
            for chunk in chunks:
                reached = max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
                counts[chunk.type] += reached
            rows.append((counts["substitute"], counts["delete"], counts["insert"], len(reference)))
    return np.array(rows, float).reshape(-1, 4)
