"""Small samples of a block as columns: for a worker's answer, which then has a tenth of the objects to pickle."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mmcli.core.errors import RowError
from mmcli.core.records import Modality, Sample

# Larger arrays travel without a copy as they are (see transport).
SMALL = 4096

Outcomes = Sequence[tuple[Sample | RowError, ...]]


@dataclass(slots=True)
class Packed:
    """Records with one Sample each, of one modality, with the same arrays.

    arrays  name -> (the values of all, one behind the other; the shape of each, or one shape where all have it)
    """

    modality: Modality
    arrays: dict[str, tuple[np.ndarray, tuple[int, ...] | list[tuple[int, ...]]]]
    lengths: list[int]
    groups: list[Hashable]
    costs: list[int]


def pack(outcomes: Outcomes | Packed) -> Outcomes | Packed:
    """As columns, where the samples are small and alike. 64 vectors of 8 numbers: 1.6 instead of 5.5 us each."""
    if isinstance(outcomes, Packed):
        return outcomes
    samples = [one[0] for one in outcomes if len(one) == 1 and isinstance(one[0], Sample)]
    if len(samples) < max(2, len(outcomes)):
        return outcomes
    first = samples[0]
    names = first.arrays.keys()
    if not all(s.modality == first.modality and s.arrays.keys() == names for s in samples):
        return outcomes
    arrays = {}
    for name, model in first.arrays.items():
        column = [s.arrays[name] for s in samples]
        if sum([a.nbytes for a in column]) > SMALL * len(column) or {a.dtype for a in column} != {model.dtype}:
            return outcomes
        shapes = [a.shape for a in column]
        # Rows of an array of numbers would be numbers, not arrays.
        same = model.ndim > 0 and shapes.count(model.shape) == len(shapes)
        arrays[name] = (np.concatenate([a.reshape(-1) for a in column]), model.shape if same else shapes)
    return Packed(
        first.modality, arrays, [s.length for s in samples], [s.group for s in samples], [s.cost for s in samples]
    )


def unpack(packed: Outcomes | Packed) -> Outcomes:
    """What was packed; the arrays are views of what all of them share."""
    if not isinstance(packed, Packed):
        return packed
    names = list(packed.arrays)
    columns = [_rows(*packed.arrays[name], len(packed.lengths)) for name in names]
    samples = zip(zip(*columns, strict=True), packed.lengths, packed.groups, packed.costs, strict=True)
    return [
        (Sample(packed.modality, dict(zip(names, arrays, strict=True)), length, group, cost),)
        for arrays, length, group, cost in samples
    ]


def _rows(values: np.ndarray, shapes: tuple[int, ...] | list[tuple[int, ...]], count: int) -> Iterator[np.ndarray]:
    if isinstance(shapes, tuple):
        yield from values.reshape(count, *shapes)
        return
    stop = 0
    for shape in shapes:
        start, stop = stop, stop + math.prod(shape)
        yield values[start:stop] if len(shape) == 1 else values[start:stop].reshape(shape)
