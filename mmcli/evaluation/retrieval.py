"""Retrieval with two sets of vectors: R@1, R@5, R@10 and the median rank, both ways.

Items with the same key belong together: an image and its captions. A query is right at k when any of its own is
among the first k: a hit rate, which is what papers call R@k with several captions an image (Karpathy & Fei-Fei
2015).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmcli.evaluation.bootstrap import Resampling, Score, score

CUTOFFS = (1, 5, 10)
# Cosines nearer than this are equal: float32 products of equal vectors differ by up to 3e-7, by where in a block
# they stand. Equal ones count against the model, or one whose vectors are all alike would be perfect.
TIE = 1e-6
# Vectors of one key that are so alike are one item: an image that stands in several rows, once for each caption.
SAME = 1e-5
# The rank of a query that has nothing to find: behind every k, however few candidates there are.
NEVER = np.iinfo(np.int64).max
# Bytes of one block of similarities.
BLOCK_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Items:
    """One side: unit vectors float32 [n, D], their int64 keys [n], ascending, and keys without a vector."""

    vectors: np.ndarray
    keys: np.ndarray
    missing: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray, keys: np.ndarray) -> Items:
        """Of rows: [n, D] with NaN where a row has none, and the number of each one's key."""
        valid = np.isfinite(vectors).all(axis=1)
        order = np.flatnonzero(valid)[np.argsort(keys[valid], kind="stable")]
        unit = vectors[order].astype(np.float32)
        length = np.linalg.norm(unit, axis=1, keepdims=True)
        unit /= np.where(length, length, 1)
        sorted_keys = keys[order]
        first = np.searchsorted(sorted_keys, sorted_keys)
        repeated = (np.einsum("nd,nd->n", unit, unit[first]) > 1 - SAME) & (first != np.arange(len(unit)))
        lost = np.setdiff1d(keys[~valid], sorted_keys)
        return cls(unit[~repeated], sorted_keys[~repeated], lost)


def evaluate(
    names: tuple[str, str], left: Items, right: Items, answered: np.ndarray, resampling: Resampling
) -> tuple[list[Score], list[str], tuple[np.ndarray, np.ndarray]]:
    """Scores, notes, and the ranks of both ways.

    answered  bool [keys]: which have vectors on both sides; the others' queries are misses. Resampled are keys,
              an image with its captions, since what belongs together does not err independently.
    """
    forward, backward = ranks(left, right)
    to_right = _Ranked.of(forward, left, len(right.keys))
    to_left = _Ranked.of(backward, right, len(left.keys))

    def statistic(weights: np.ndarray) -> np.ndarray:
        return np.array([*to_right.scores(weights), *to_left.scores(weights)])

    ways = [f"{names[0]}_to_{names[1]}", f"{names[1]}_to_{names[0]}"]
    metrics = [*(f"r_at_{k}" for k in CUTOFFS), "median_rank"]
    scores = score([f"{way}_{m}" for way in ways for m in metrics], statistic, answered, resampling)
    notes = [f"{len(left.keys):,} {names[0]} items and {len(right.keys):,} {names[1]} items are ranked"]
    return scores, notes, (to_right.ranks, to_left.ranks)


def ranks(left: Items, right: Items) -> tuple[np.ndarray, np.ndarray]:
    """Rank of the best own item for each query, int64 [left], [right]; 1 is first, NEVER: there is none.

    One pass over blocks of the similarity matrix serves both ways.
    """
    rows, columns = _pairs(left.keys, right.keys)
    own = (
        np.einsum("pd,pd->p", left.vectors[rows], right.vectors[columns]) if len(rows) else np.zeros(0, np.float32)
    )
    best_left, best_right = (
        np.full(len(left.keys), np.inf, np.float32),
        np.full(len(right.keys), np.inf, np.float32),
    )
    _lower_to_best(best_left, rows, own)
    _lower_to_best(best_right, columns, own)
    better_left, better_right = np.zeros(len(left.keys), np.int64), np.zeros(len(right.keys), np.int64)
    step = max(1, BLOCK_BYTES // (4 * max(1, len(right.keys))))
    for start in range(0, len(left.keys), step):
        stop = min(start + step, len(left.keys))
        scores = left.vectors[start:stop] @ right.vectors.T
        # What belongs to the query itself is no rival.
        first, last = np.searchsorted(rows, [start, stop])
        scores[rows[first:last] - start, columns[first:last]] = -np.inf
        better_left[start:stop] = np.count_nonzero(scores >= (best_left[start:stop, None] - TIE), axis=1)
        better_right += np.count_nonzero(scores >= best_right - TIE, axis=0)
    return (
        np.where(np.isinf(best_left), NEVER, better_left + 1),
        np.where(np.isinf(best_right), NEVER, better_right + 1),
    )


def _pairs(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All (i, j) with left[i] == right[j], by i; both sorted."""
    first, last = np.searchsorted(right, left, "left"), np.searchsorted(right, left, "right")
    counts = last - first
    rows = np.repeat(np.arange(len(left)), counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows, np.repeat(first, counts) + within


def _lower_to_best(best: np.ndarray, index: np.ndarray, own: np.ndarray) -> None:
    """best[i] = the highest of its own; inf stays where there is none."""
    highest = np.full(len(best), -np.inf, np.float32)
    np.maximum.at(highest, index, own)
    found = ~np.isinf(highest)
    best[found] = highest[found]


@dataclass(frozen=True, slots=True)
class _Ranked:
    """Queries in the order of their ranks, those without a vector last, and whose keys they are.

    last  what the median is where it is NEVER: one more than there are candidates
    """

    ranks: np.ndarray
    keys: np.ndarray
    last: int

    @classmethod
    def of(cls, found: np.ndarray, queries: Items, candidates: int) -> _Ranked:
        all_ranks = np.concatenate([found, np.full(len(queries.missing), NEVER)])
        keys = np.concatenate([queries.keys, queries.missing])
        order = np.argsort(all_ranks, kind="stable")
        return cls(all_ranks[order], keys[order], candidates + 1)

    def scores(self, weights: np.ndarray) -> list[float]:
        """R@1, R@5, R@10, median rank; `weights` float64 [keys]. The median is the lower one of two."""
        reached = np.cumsum(weights[self.keys])
        total = reached[-1] if len(reached) else 0.0
        if not total:
            return [np.nan] * (len(CUTOFFS) + 1)
        hits = np.concatenate([[0.0], reached])[np.searchsorted(self.ranks, CUTOFFS, "right")]
        median = int(self.ranks[np.searchsorted(reached, total / 2)])
        return [*(hits / total), float(self.last if median == NEVER else median)]


def number_keys(sides: Sequence[Sequence[object]]) -> tuple[list[np.ndarray], int]:
    """Keys as numbers, the same on all sides, and how many there are."""
    numbers: dict[object, int] = {}
    found = [np.array([numbers.setdefault(key, len(numbers)) for key in side], np.int64) for side in sides]
    return found, len(numbers)
