"""Small samples of a block as columns: a worker's answer then has next to no objects to pickle."""

from __future__ import annotations

from collections.abc import Sequence

from mmcli.core.errors import RowError
from mmcli.core.records import Sample
from mmcli.core.samples import Packed, Samples

# Larger arrays travel without a copy as they are (see transport).
SMALL = 4096

Outcomes = Sequence[tuple[Sample | RowError, ...]]


def pack(outcomes: Outcomes) -> Outcomes:
    """As columns (Packed), where the samples are small and of one kind; else as they are."""
    samples = [one[0] for one in outcomes if len(one) == 1 and isinstance(one[0], Sample)]
    if len(samples) < max(2, len(outcomes)):
        return outcomes
    for name in samples[0].arrays:
        sizes = [s.arrays[name].nbytes for s in samples if name in s.arrays]
        if sum(sizes) > SMALL * len(samples):
            return outcomes
    packed = Samples.of(samples)
    return outcomes if packed is None else Packed(packed)
