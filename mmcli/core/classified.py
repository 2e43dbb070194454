"""What a batch is classified as, as columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np

from mmcli.core.records import Classified


@dataclass(frozen=True, slots=True, eq=False)
class ClassifiedRows(Sequence[Classified]):
    """Of each of n inputs, the best of a set of labels.

    labels   all that there are
    scores   float32 [n, k], descending; NaN where the model's scores are not finite
    indices  int64 [n, k]: their labels
    margin   float32 [n]; None: there is but one label
    entropy  float32 [n]
    counts   int64 [n]: how many scores reach the threshold; None: one label alone is asked for
    top_k    how many of the k are told
    """

    labels: Sequence[str]
    scores: np.ndarray
    indices: np.ndarray
    margin: np.ndarray | None
    entropy: np.ndarray
    counts: np.ndarray | None
    top_k: int

    def __len__(self) -> int:
        return len(self.scores)

    @overload
    def __getitem__(self, index: int) -> Classified: ...

    @overload
    def __getitem__(self, index: slice) -> ClassifiedRows: ...

    def __getitem__(self, index: int | slice) -> Classified | ClassifiedRows:
        if isinstance(index, slice):
            return self._part(index)
        return next(iter(self._part(slice(index, index + 1 or None))))

    def _part(self, which: slice) -> ClassifiedRows:
        return replace(
            self,
            scores=self.scores[which],
            indices=self.indices[which],
            margin=None if self.margin is None else self.margin[which],
            entropy=self.entropy[which],
            counts=None if self.counts is None else self.counts[which],
        )

    def __iter__(self) -> Iterator[Classified]:
        nothing = [None] * len(self)
        margins = nothing if self.margin is None else self.margin.tolist()
        counts = nothing if self.counts is None else self.counts.tolist()
        rows = zip(self.scores.tolist(), self.indices.tolist(), margins, self.entropy.tolist(), counts, strict=True)
        for scores, indices, margin, entropy, count in rows:
            names = [self.labels[index] for index in indices]
            top = tuple(zip(names[: self.top_k], scores, strict=False))
            yield Classified(top, margin, entropy, None if count is None else tuple(names[:count]))

    @classmethod
    def scatter(cls, pieces: Sequence[tuple[np.ndarray, ClassifiedRows]], count: int) -> ClassifiedRows:
        """Pieces of one model, each with its places among `count` rows; zeros where there is nothing."""
        _, first = pieces[0]
        # Where a threshold is given, a batch has as many scores as reach it in any row.
        width = max(one.scores.shape[1] for _, one in pieces)
        found = cls(
            first.labels,
            np.zeros((count, width), np.float32),
            np.zeros((count, width), np.int64),
            None if first.margin is None else np.zeros(count, np.float32),
            np.zeros(count, np.float32),
            None if first.counts is None else np.zeros(count, np.int64),
            first.top_k,
        )
        for rows, one in pieces:
            k = one.scores.shape[1]
            found.scores[rows, :k], found.indices[rows, :k] = one.scores, one.indices
            found.entropy[rows] = one.entropy
            if found.margin is not None:
                found.margin[rows] = one.margin
            if found.counts is not None:
                found.counts[rows] = one.counts
        return found
