"""BLEU, ROUGE-L and CIDEr of captions, as coco-caption (pycocoevalcap) defines them.

Written here and not taken from that package because its wheel weighs 104 MB (METEOR, SPICE), its tokenizer starts
Java, and it gives no per-image counts to resample; sacrebleu gives BLEU alone, and brings lxml. Tests hold the
numbers of both. All n-grams of one order are counted together in numpy: TIMING

Papineni et al. 2002 (BLEU); Lin 2004 (ROUGE-L); Vedantam et al. 2015 (CIDEr; what everybody reports under that name
is the clipped and length-penalised variant, CIDEr-D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmcli.evaluation.bootstrap import Resampling, Score, score

ORDERS = (1, 2, 3, 4)
NAMES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")
# CIDEr-D: width of the penalty for another length than the reference's, and the scale.
SIGMA, SCALE = 6.0, 10.0
# ROUGE-L: how much more recall counts than precision.
BETA = 1.2
# As coco-caption has them, so that values agree to the last digit.
_TINY, _SMALL = 1e-15, 1e-9


@dataclass(frozen=True, slots=True)
class CaptionStatistics:
    """What each of n images adds to the scores.

    correct, guessed  int64 [n, 4]: clipped matches, and n-grams of the caption, of each order
    length, reference int64 [n]: words of the caption, and of the reference nearest in length
    rouge, cider      float64 [n]
    """

    correct: np.ndarray
    guessed: np.ndarray
    length: np.ndarray
    reference: np.ndarray
    rouge: np.ndarray
    cider: np.ndarray

    def scores(self, weights: np.ndarray) -> np.ndarray:
        """NAMES, float64 [6], with the images weighted [n].

        BLEU is of the summed counts; ROUGE-L and CIDEr are means of images. The document frequencies of CIDEr are
        those of all images, whatever the weights: a resample does not change how rare a word is.
        """
        total = weights.sum() or np.nan
        bleu = _bleu(
            weights @ self.correct, weights @ self.guessed, weights @ self.length, weights @ self.reference
        )
        return np.array([*bleu, weights @ self.rouge / total, weights @ self.cider / total])


def evaluate(
    captions: Sequence[str | None],
    references: Sequence[Sequence[str]],
    tokenize: Callable[[str], list[str]],
    resampling: Resampling,
) -> tuple[list[Score], list[str]]:
    """NAMES over all images, and notes. None, no caption, counts as an empty one."""
    statistics = caption_statistics(captions, references, tokenize)
    answered = np.array([c is not None for c in captions])
    notes = ["CIDEr of a single image is 0: no word is rarer than another"] if len(captions) == 1 else []
    return score(NAMES, statistics.scores, answered, resampling), notes


def caption_statistics(
    captions: Sequence[str | None],
    references: Sequence[Sequence[str]],
    tokenize: Callable[[str], list[str]],
) -> CaptionStatistics:
    """`references`: at least one for each image."""
    words = _Words(captions, references, tokenize)
    n = words.images
    correct, guessed = np.zeros((n, len(ORDERS)), np.int64), np.zeros((n, len(ORDERS)), np.int64)
    similarity = np.zeros(len(words.lengths) - n)
    for column, order in enumerate(ORDERS):
        grams = words.grams(order)
        correct[:, column] = _clipped_matches(grams, words)
        guessed[:, column] = np.maximum(words.lengths[:n] - order + 1, 0)
        similarity += _tfidf_similarity(grams, words)
    # coco-caption measures the length of a caption in bigrams.
    bigrams = np.maximum(words.lengths - 1, 0)
    image = words.image[n:]
    delta = bigrams[image] - bigrams[n:]
    similarity *= np.exp(-(delta**2) / (2 * SIGMA**2)) * SCALE / len(ORDERS)
    return CaptionStatistics(
        correct=correct,
        guessed=guessed,
        length=words.lengths[:n],
        reference=_nearest_lengths(words),
        rouge=_rouge_l(words),
        cider=np.bincount(image, similarity, n) / np.bincount(image, minlength=n),
    )


class _Words:
    """All captions and then all references as numbers of words, end to end.

    images   n; texts 0 to n-1 are captions, the others references, in the order of their images
    image    int64 [texts]: whose text it is
    lengths  int64 [texts], words
    """

    def __init__(
        self,
        captions: Sequence[str | None],
        references: Sequence[Sequence[str]],
        tokenize: Callable[[str], list[str]],
    ) -> None:
        self.images = n = len(captions)
        vocabulary: dict[str, int] = {}
        numbers: list[int] = []
        lengths = []
        for text in [c or "" for c in captions] + [r for refs in references for r in refs]:
            tokens = tokenize(text)
            lengths.append(len(tokens))
            numbers += [vocabulary.setdefault(token, len(vocabulary)) for token in tokens]
        self.words = np.array(numbers, np.int64)
        self.lengths = np.array(lengths, np.int64)
        self.stops = np.cumsum(self.lengths)
        owners = np.repeat(np.arange(n), [len(refs) for refs in references])
        self.image = np.concatenate([np.arange(n), owners])
        self._size = max(1, len(vocabulary))
        # Of the last order asked for: a number for the n-gram that begins at each word.
        self._codes, self._order = self.words, 1

    def grams(self, order: int) -> _Grams:
        """The n-grams of an order; orders are asked for one after the other."""
        if order != self._order:
            longer = self._codes[:-1] * self._size + self.words[order - 1 :]
            self._codes = np.unique(longer, return_inverse=True)[1] if len(longer) else longer
            self._order = order
        counts = np.maximum(self.lengths - order + 1, 0)
        text = np.repeat(np.arange(len(counts)), counts)
        first = np.repeat(self.stops - self.lengths, counts)
        within = np.arange(len(text)) - np.repeat(np.cumsum(counts) - counts, counts)
        gram = self._codes[first + within] if len(text) else np.zeros(0, np.int64)
        size = int(gram.max()) + 1 if len(gram) else 1
        keys, times = np.unique(text * size + gram, return_counts=True)
        return _Grams(text=keys // size, gram=keys % size, times=times, size=size)

    def tokens(self, text: int) -> list[int]:
        stop = self.stops[text]
        found: list[int] = self.words[stop - self.lengths[text] : stop].tolist()
        return found


@dataclass(frozen=True, slots=True)
class _Grams:
    """Which n-gram (0 to size-1) occurs how many times in which text; each pair once, sorted by text."""

    text: np.ndarray
    gram: np.ndarray
    times: np.ndarray
    size: int


def _clipped_matches(grams: _Grams, words: _Words) -> np.ndarray:
    """int64 [n]: n-grams of each caption that a reference has, each at most as often as one reference has it."""
    own = grams.text < words.images
    keys = words.image[grams.text] * grams.size + grams.gram
    known, first = _sorted_groups(keys[~own])
    most = np.maximum.reduceat(grams.times[~own][first.order], first.starts) if len(known) else known
    allowed = _look_up(keys[own], known, most)
    matches = np.minimum(grams.times[own], allowed)
    return np.bincount(grams.text[own], matches, words.images).astype(np.int64)


def _tfidf_similarity(grams: _Grams, words: _Words) -> np.ndarray:
    """float64 [references]: clipped cosine of each reference's tf-idf vector to that of its caption."""
    n, texts = words.images, len(words.lengths)
    own = grams.text < n
    keys = words.image[grams.text] * grams.size + grams.gram
    images = np.bincount(np.unique(keys[~own]) % grams.size, minlength=grams.size)
    idf = np.log(n) - np.log(np.maximum(images, 1))
    weight = grams.times * idf[grams.gram]
    norm = np.sqrt(np.bincount(grams.text, weight**2, texts))
    # The pairs of captions are sorted by text, so by image, and then by n-gram: so are their keys.
    shared = np.minimum(_look_up(keys[~own], keys[own], weight[own]), weight[~own]) * weight[~own]
    product = np.bincount(grams.text[~own] - n, shared, texts - n)
    norms = norm[n:] * norm[words.image[n:]]
    return np.asarray(np.divide(product, norms, out=np.zeros(texts - n), where=norms != 0))


@dataclass(frozen=True, slots=True)
class _Groups:
    order: np.ndarray
    starts: np.ndarray


def _sorted_groups(keys: np.ndarray) -> tuple[np.ndarray, _Groups]:
    """The distinct keys, sorted; which order sorts all of them, and where in it each one's begin."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    return ordered[starts], _Groups(order, starts)


def _look_up(keys: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each key, `known` being sorted; 0 for those that are not known."""
    if not len(known):
        return np.zeros(len(keys))
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    found: np.ndarray = np.where(known[place] == keys, values[place], 0)
    return found


def _nearest_lengths(words: _Words) -> np.ndarray:
    """int64 [n]: length of the reference nearest in length to the caption; of two, the shorter."""
    n = words.images
    length = words.lengths[n:]
    away = np.abs(length - words.lengths[words.image[n:]])
    order = np.lexsort((length, away, words.image[n:]))
    starts = np.searchsorted(words.image[n:][order], np.arange(n))
    return length[order][starts]


def _rouge_l(words: _Words) -> np.ndarray:
    """float64 [n]: F of the best precision and the best recall that the longest common subsequences give."""
    from rapidfuzz.distance import LCSseq

    found = np.zeros(words.images)
    owners = words.image[words.images :]
    starts = np.searchsorted(owners, np.arange(words.images + 1)) + words.images
    for image in range(words.images):
        caption = words.tokens(image)
        precision = recall = 0.0
        for text in range(starts[image], starts[image + 1]):
            reference = words.tokens(text)
            common = LCSseq.similarity(caption, reference)
            if common:
                precision = max(precision, common / len(caption))
                recall = max(recall, common / len(reference))
        if precision:
            found[image] = (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
    return found


def _bleu(correct: Any, guessed: Any, length: float, reference: float) -> np.ndarray:
    """BLEU-1 to BLEU-4, float64 [4], of summed counts: geometric means of precisions, with the brevity penalty."""
    precision = (correct + _TINY) / (guessed + _SMALL)
    bleu = np.cumprod(precision) ** (1 / np.arange(1, len(ORDERS) + 1))
    shorter = (length + _TINY) / (reference + _SMALL)
    return np.asarray(bleu * (np.exp(1 - 1 / shorter) if shorter < 1 else 1.0))
