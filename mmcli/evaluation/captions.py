"""BLEU, ROUGE-L and CIDEr of captions, as coco-caption (pycocoevalcap) defines them.

Written here and not taken from that package because its wheel weighs 104 MB (METEOR, SPICE), its tokenizer starts
Java, and it gives no per-image counts to resample; sacrebleu gives BLEU alone, and brings lxml. Tests hold the
numbers of both. All n-grams of one order are counted together in numpy: 100,000 captions with 5 references each,
intervals included, take 12 s of one core.

Papineni et al. 2002 (BLEU); Lin 2004 (ROUGE-L); Vedantam et al. 2015 (CIDEr; what everybody reports under that name
is the clipped and length-penalised variant, CIDEr-D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmcli.evaluation.bootstrap import Resampling, Score, ratio, score

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

    parts  float64 [12, n]: of each order the n-grams that match a reference, clipped, and all n-grams; words of the
           caption, and of the reference nearest in length; ROUGE-L; CIDEr
    """

    parts: np.ndarray

    @property
    def cider(self) -> np.ndarray:
        return np.asarray(self.parts[11])

    def scores(self, weights: np.ndarray) -> np.ndarray:
        """NAMES, float64 [6], with the images weighted [n].

        BLEU is of the summed counts; ROUGE-L and CIDEr are means of images. The document frequencies of CIDEr are
        those of all images, whatever the weights: a resample does not change how rare a word is.
        """
        sums = self.parts @ weights
        bleu = _bleu(correct=sums[0:4], guessed=sums[4:8], length=sums[8], reference=sums[9])
        return np.array([*bleu, *ratio(sums[10:], weights.sum())])


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
    correct, guessed = [], []
    similarity = np.zeros(len(words.lengths) - n)
    for order in ORDERS:
        grams = words.grams(order)
        correct.append(_clipped_matches(grams, words))
        guessed.append(np.maximum(words.lengths[:n] - order + 1, 0))
        similarity += _tfidf_similarity(grams, words)
    # coco-caption measures the length of a caption in bigrams.
    bigrams = np.maximum(words.lengths - 1, 0)
    image = words.image[n:]
    delta = bigrams[image] - bigrams[n:]
    similarity *= np.exp(-(delta**2) / (2 * SIGMA**2)) * SCALE / len(ORDERS)
    cider = np.bincount(image, similarity, n) / np.bincount(image, minlength=n)
    lengths = words.lengths[:n], _nearest_lengths(words)
    return CaptionStatistics(np.array([*correct, *guessed, *lengths, _rouge_l(words), cider], float))


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
        return _Grams.of(text, gram, self)

    def tokens(self, text: int) -> list[int]:
        stop = self.stops[text]
        found: list[int] = self.words[stop - self.lengths[text] : stop].tolist()
        return found


@dataclass(frozen=True, slots=True)
class _Grams:
    """Which n-gram (0 to size-1) occurs how many times in which text; each pair once, sorted by text.

    own    whether the text is a caption; key  of the image and the n-gram
    known  keys of references, each once, sorted; most  how often one reference has it at most
    """

    text: np.ndarray
    gram: np.ndarray
    times: np.ndarray
    size: int
    own: np.ndarray
    key: np.ndarray
    known: np.ndarray
    most: np.ndarray

    @classmethod
    def of(cls, text: np.ndarray, gram: np.ndarray, words: _Words) -> _Grams:
        """Of all n-grams, as often as they occur."""
        size = int(gram.max()) + 1 if len(gram) else 1
        pairs, times = np.unique(text * size + gram, return_counts=True)
        text, gram = pairs // size, pairs % size
        own = text < words.images
        key = words.image[text] * size + gram
        # By sorting: numpy's unique without counts hashes, 3.5 s for the 6 million of 100,000 images.
        order = np.argsort(key[~own], kind="stable")
        ordered = key[~own][order]
        starts = np.flatnonzero(np.diff(ordered, prepend=-1))
        most = np.maximum.reduceat(times[~own][order], starts) if len(starts) else starts
        return cls(text, gram, times, size, own, key, ordered[starts], most)


def _clipped_matches(grams: _Grams, words: _Words) -> np.ndarray:
    """float64 [n]: n-grams of each caption that a reference has, each at most as often as one reference has it."""
    allowed = _look_up(grams.key[grams.own], grams.known, grams.most)
    matches = np.minimum(grams.times[grams.own], allowed)
    return np.bincount(grams.text[grams.own], matches, words.images)


def _tfidf_similarity(grams: _Grams, words: _Words) -> np.ndarray:
    """float64 [references]: clipped cosine of each reference's tf-idf vector to that of its caption."""
    n, texts, own = words.images, len(words.lengths), grams.own
    images = np.bincount(grams.known % grams.size, minlength=grams.size)
    idf = np.log(n) - np.log(np.maximum(images, 1))
    weight = grams.times * idf[grams.gram]
    norm = np.sqrt(np.bincount(grams.text, weight**2, texts))
    # Pairs of captions are sorted by text, so by image, and then by n-gram: so are their keys.
    in_caption = _look_up(grams.key[~own], grams.key[own], weight[own])
    shared = np.minimum(in_caption, weight[~own]) * weight[~own]
    product = np.bincount(grams.text[~own] - n, shared, texts - n)
    norms = norm[n:] * norm[words.image[n:]]
    return np.asarray(np.divide(product, norms, out=np.zeros(texts - n), where=norms != 0))


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
