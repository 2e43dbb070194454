"""Logits of a set of labels -> the best of them, with what tells whether to trust them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mmcli.core.classified import ClassifiedRows
from mmcli.models.options import Ranking
from mmcli.models.pending import PendingVectors

Activation = Literal["softmax", "sigmoid"]


@dataclass(slots=True)
class Ranked:
    """A batch.

    scores   float32 [n, k], descending
    indices  int64 [n, k], of their labels
    margin   float32 [n]; entropy: float32 [n]
    counts   int64 [n]: how many scores reach the threshold
    """

    scores: torch.Tensor
    indices: torch.Tensor
    margin: torch.Tensor
    entropy: torch.Tensor
    counts: torch.Tensor


def rank(logits: torch.Tensor, activation: Activation, ranking: Ranking) -> Ranked:
    """Float logits [n, L] -> Ranked; of equal scores that of the first label is the best.

    A row with a logit that is not finite has NaN scores.
    softmax: one label applies; sigmoid: each is scored alone.
    """
    logits = logits.float()
    # Three passes over all labels: 8 us a row of 1,000 on one core, where softmax and entr take 25.
    if activation == "softmax":
        total = logits.logsumexp(dim=-1, keepdim=True)
        entropy = total[:, 0] - (torch.exp(logits - total) * logits).sum(dim=-1)
    else:
        softplus = torch.nn.functional.softplus(logits)
        entropy = (softplus - logits * logits.sigmoid()).mean(dim=-1)
    entropy = torch.where(entropy.isfinite(), entropy.clamp(min=0), torch.nan)
    counts = torch.zeros_like(entropy, dtype=torch.int64)
    kept = max(2, ranking.top_k)
    if ranking.threshold is not None:
        counts = (logits.sigmoid() >= ranking.threshold).sum(dim=-1)
        kept = max(kept, int(counts.max()))
    best, indices = _largest(logits, min(logits.shape[-1], kept))
    scores = torch.exp(best - total) if activation == "softmax" else best.sigmoid()
    scores = torch.where(entropy.isnan()[:, None], torch.nan, scores)
    margin = scores[:, 0] - scores[:, 1] if scores.shape[-1] > 1 else torch.full_like(entropy, torch.nan)
    return Ranked(scores, indices, margin, entropy, counts)


def _largest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logits [n, count], descending, and where they are; of equal ones the first comes first.

    By the logits: softmax and sigmoid saturate, and would make ties of them. topk leaves open which of two equal
    ones comes first, and that may depend on the size of the batch.
    """
    more = min(logits.shape[-1], count + 1)
    values, indices = logits.topk(more, dim=-1)
    tied: Any = (values[:, -1] == values[:, count - 1]).nonzero()[:, 0] if more > count else []
    values, indices = values[:, :count], indices[:, :count]
    if len(tied):
        # The last one kept has an equal that is not kept.
        ordered = logits[tied].sort(dim=-1, descending=True, stable=True)
        values[tied], indices[tied] = ordered.values[:, :count], ordered.indices[:, :count]
    indices, order = indices.sort(dim=-1)
    values, again = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, indices.gather(-1, again)


def classified(ranked: Ranked, labels: Sequence[str], ranking: Ranking) -> ClassifiedRows:
    """One for each row of the batch; waits for the device."""
    return ClassifiedRows(
        labels,
        ranked.scores.numpy(force=True),
        ranked.indices.numpy(force=True),
        None if ranked.scores.shape[-1] < 2 else ranked.margin.numpy(force=True),
        ranked.entropy.numpy(force=True),
        None if ranking.threshold is None else ranked.counts.numpy(force=True),
        ranking.top_k,
    )


class PendingClassified:
    """Logits on their way from a CUDA device, ranked on the host, which goes on until it asks for the result.

    To look for ties on the device would be to wait for all of the batch.
    """

    def __init__(
        self, logits: torch.Tensor, activation: Activation, labels: Sequence[str], ranking: Ranking
    ) -> None:
        self._logits = PendingVectors(logits.float())
        self._activation, self._labels, self._ranking = activation, labels, ranking

    def result(self) -> ClassifiedRows:
        """Wait for them. Raises RuntimeError when the device has failed meanwhile."""
        logits = torch.from_numpy(self._logits.result())
        return classified(rank(logits, self._activation, self._ranking), self._labels, self._ranking)


def classify(
    logits: torch.Tensor, activation: Activation, labels: Sequence[str], ranking: Ranking
) -> ClassifiedRows | PendingClassified:
    """Logits [n, L] -> one output for each row."""
    if logits.device.type == "cuda":
        return PendingClassified(logits, activation, labels, ranking)
    return classified(rank(logits, activation, ranking), labels, ranking)
